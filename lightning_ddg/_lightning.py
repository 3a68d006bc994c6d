"""Every touch of Lightning's private parts, each with its reason; the tests say when one has moved.

Nothing else in the package may use a name of Lightning that begins with an underscore. Each function that changes
something returns the function that undoes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device as default_process_group_backend,
)
from lightning.fabric.utilities.distributed import _init_dist_connection as init_dist_connection
from lightning.fabric.utilities.optimizer import _optimizer_to_device as optimizer_to_device
from lightning.fabric.utilities.optimizer import _optimizers_to_device as optimizers_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torchmetrics import Metric

# Used as they are; their names are Lightning's own without the underscore.
__all__ = [
    "MultiProcessingLauncher",
    "SubprocessScriptLauncher",
    "default_process_group_backend",
    "init_dist_connection",
    "optimizer_to_device",
    "optimizers_to_device",
    "reset_seed",
]

Undo = Callable[[], None]


def _replace(obj: Any, name: str, value: Any) -> Undo:
    """Sets an instance attribute; undoing removes it again, so that the class's own shows."""
    had, old = name in vars(obj), vars(obj).get(name)
    object.__setattr__(obj, name, value)

    def undo() -> None:
        if had:
            object.__setattr__(obj, name, old)
        else:
            object.__delattr__(obj, name)

    return undo


def silence_sigterm_broadcast(trainer: Trainer) -> Undo:
    """Since 2.5.2 every training batch starts with a broadcast from rank 0, which would lock all stages together."""
    loop = trainer.fit_loop.epoch_loop
    if not hasattr(loop, "_broadcast_sigterm_tensor"):
        return lambda: None
    return _replace(loop, "_broadcast_sigterm_tensor", lambda: None)


def bypass_before_batch_transfer(module: LightningModule) -> Undo:
    """On a rank that does not read, the loader yields stand-ins that the user's hooks must not see."""
    return _replace(module, "_on_before_batch_transfer", lambda batch, dataloader_idx=0: batch)


def mute_logging(module: LightningModule) -> Undo:
    """On a rank without the loss, what a training step logs is a placeholder; rank 0's values are relayed instead."""
    return _replace(module, "log", lambda *args, **kwargs: None)


def _never_distributed() -> bool:
    return False


def keep_metrics_local(module: LightningModule) -> Undo:
    """There is one replica of the data, so a metric is complete on every rank that updates it; syncing would hang."""
    metrics = [child for child in module.modules() if isinstance(child, Metric)]
    before = [metric.distributed_available_fn for metric in metrics]
    for metric in metrics:
        metric.distributed_available_fn = _never_distributed

    def undo() -> None:
        for metric, function in zip(metrics, before, strict=True):
            metric.distributed_available_fn = function

    return undo


def silence_sync_dist_advice() -> Undo:
    """Lightning advises `sync_dist=True` for every epoch metric; with one replica of the data it changes nothing."""
    before = list(warnings.filters)
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*when logging on epoch level.*")
    added = [entry for entry in warnings.filters if entry not in before]

    def undo() -> None:
        for entry in added:
            if entry in warnings.filters:
                warnings.filters.remove(entry)  # type: ignore[attr-defined]

    return undo


def clip_norm_per_stage(plugin: Any, stages: Sequence[Sequence[nn.Parameter]]) -> Undo:
    """In one process, clips the norm of each stage's gradients by itself, as K processes must do."""
    stage_of = {id(parameter): number for number, parameters in enumerate(stages) for parameter in parameters}

    def clip_grad_by_norm(optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        parts: dict[int, list[nn.Parameter]] = {}
        for parameter in plugin.main_params(optimizer):
            parts.setdefault(stage_of.get(id(parameter), len(stages) - 1), []).append(parameter)
        for parameters in parts.values():
            torch.nn.utils.clip_grad_norm_(parameters, clip_val)

    return _replace(plugin, "clip_grad_by_norm", clip_grad_by_norm)


def insert_callback(trainer: Trainer, callback: Callback) -> Undo:
    """Puts a callback before all others: strategies have no hook at the end of a batch or an epoch."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, callback)
    return lambda: callbacks.remove(callback)


def set_rank_zero_only(rank: int) -> None:
    """Tells both of Lightning's rank-zero decorators which rank this is, as its own strategies do."""
    rank_zero_only.rank = fabric_rank_zero_only.rank = rank  # type: ignore[attr-defined]


def keep_in_place(module: nn.Module) -> Undo:
    """Makes ``.to(device)`` of a parent leave a module where it is."""
    return _replace(module, "_apply", lambda fn, recurse=True: module)


def transfer_batch(module: LightningModule, batch: Any, device: torch.device) -> Any:
    """Runs the user's three hooks of a batch's transfer, as the loop does."""
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return module._apply_batch_transfer_handler(batch, device=device, dataloader_idx=0)


def step_arguments(step: Callable[..., Any], batch: Any) -> list[Any]:
    """The arguments of a training step: the batch, and its index where the step asks for one."""
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return [batch, 0] if takes_index else [batch]


def refuse_dataloader_iter(module: LightningModule) -> None:
    """Refuses steps that fetch their batches themselves.

    Raises:
        TypeError: If a step takes ``dataloader_iter``.
    """
    for name in ("training_step", "validation_step", "test_step", "predict_step"):
        if is_param_in_hook_signature(getattr(module, name), "dataloader_iter", explicit=True):
            raise TypeError(
                f"`{type(module).__name__}.{name}` takes `dataloader_iter`, but only one process reads the data. Take"
                " `batch` and `batch_idx` instead."
            )


def clip_values_that_exist(plugin: Any) -> Undo:
    """torch's clipping by value fails without any gradient, which a stage has while it warms up, or is frozen."""

    def clip_grad_by_value(optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        parameters = [parameter for parameter in plugin.main_params(optimizer) if parameter.grad is not None]
        if parameters:
            torch.nn.utils.clip_grad_value_(parameters, clip_val)

    return _replace(plugin, "clip_grad_by_value", clip_grad_by_value)


def seed_workers_as_one_device(loader: Any) -> None:
    """Seeds the loader's worker processes as rank 0's would be, although another rank reads."""
    _auto_add_worker_init_fn(loader, 0)


def is_last_batch(trainer: Trainer) -> bool:
    """Whether the batch just trained ends the epoch or the fit."""
    ends_epoch = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    return ends_epoch or (trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps)


def batch_number(trainer: Trainer) -> int:
    """Number of the current training batch, counted through the whole fit; a resumed fit goes on counting."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def training_iterables(trainer: Trainer) -> Any:
    """The (wrapped) training loaders, in the nest the user gave them in; sets the loop's data up if need be."""
    trainer.fit_loop.setup_data()
    combined = trainer.fit_loop._combined_loader
    return None if combined is None else combined.iterables


def refuse_trainer_flags(trainer: Trainer) -> None:
    """Refuses what cannot agree on all ranks.

    Raises:
        ValueError: For a time-based ``val_check_interval``.
    """
    interval = getattr(trainer, "_val_check_time_interval", None)
    if interval is not None:
        raise ValueError(
            f"A time-based `val_check_interval` ({interval} seconds) is measured by each process for itself, so that"
            " the stages would validate at different batches. Give a number of batches or a fraction of an epoch"
            " instead."
        )
