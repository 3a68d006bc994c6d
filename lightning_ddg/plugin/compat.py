"""Every touch of Lightning's private parts, each with its reason; the tests say when one has moved.

Nothing else in the package may use a name of Lightning that begins with an underscore. Each function that changes
something returns the function that undoes it.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
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
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    Timer,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as MultiProcessingLauncher
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher as SubprocessScriptLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn  # type: ignore[attr-defined]
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


def on_sigterm(trainer: Trainer, handle: Callable[[int], object]) -> Undo:
    """Lightning's handler waits, inside the signal handler, for a broadcast that other ranks may never join.

    Must be called before Lightning registers its handlers, which is when a strategy has been set up.
    """
    return _replace(trainer._signal_connector, "_sigterm_notifier_fn", lambda number, frame: handle(number))


def mark_sigterm(trainer: Trainer) -> None:
    """Makes Lightning's loops raise ``SIGTERMException`` at the end of the batch."""
    trainer._signal_connector.received_sigterm = True


def save_on_exception_if(trainer: Trainer, allowed: Callable[[BaseException], bool]) -> Undo:
    """Lets callbacks save on an exception only where the other stages are in reach."""
    undo = ExitStack()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False):
            undo.callback(_replace(callback, "on_exception", _if_allowed(callback.on_exception, allowed)))
    return undo.close


def _if_allowed(hook: Callable[..., None], allowed: Callable[[BaseException], bool]) -> Callable[..., None]:
    @functools.wraps(hook)
    def save_or_warn(trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if allowed(exception):
            hook(trainer, module, exception)
        else:
            rank_zero_warn(
                f"No checkpoint is saved on {type(exception).__name__}: the weights of the other stages are out of"
                " reach. For such cases save regularly: ModelCheckpoint(every_n_train_steps=..., save_last=True)."
            )

    return save_or_warn


def bypass_before_batch_transfer(module: LightningModule) -> Undo:
    """On a rank that does not read, the loader yields stand-ins that the user's hooks must not see."""
    return _replace(module, "_on_before_batch_transfer", lambda batch, dataloader_idx=0: batch)


def mute_logging(module: LightningModule) -> Undo:
    """While the layers are measured, the training step must log nothing."""
    return _replace(module, "log", lambda *args, **kwargs: None)


def mute_training_logs(trainer: Trainer, module: LightningModule) -> Undo:
    """On a rank without the loss, what is logged while training is a placeholder; rank 0's values are relayed."""
    log = module.log

    def log_unless_training(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if not trainer.training:
            log(name, value, *args, **kwargs)
        elif isinstance(value, Metric):
            # Lightning resets a metric that it logs; this one has seen placeholders only, and would keep them all.
            value.reset()

    return _replace(module, "log", log_unless_training)


def uses_step_outputs(module: LightningModule) -> bool:
    """Whether hooks may use what a training step has returned or collected, so that every rank must have it.

    Lightning's own callbacks use no more than the loss.
    """
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    hooks = {type(callback).on_train_batch_end.__module__.partition(".")[0] for callback in callbacks}
    return (
        is_overridden("on_train_batch_end", module)
        or is_overridden("on_train_epoch_end", module)
        or bool(hooks - {"lightning", "lightning_ddg"})
    )


def after_hook(module: LightningModule, name: str, function: Callable[[], object]) -> Undo:
    """Calls a function after a hook of the module, which comes after the callbacks'; a strategy's hook is missing."""
    hook = getattr(module, name)

    @functools.wraps(hook)
    def hook_and_function(*args: Any, **kwargs: Any) -> Any:
        result = hook(*args, **kwargs)
        function()
        return result

    return _replace(module, name, hook_and_function)


def remembered_clipping(module: LightningModule) -> tuple[Callable[[], object], Undo]:
    """Remembers how a step in manual optimization clips, for the gradients that are applied outside any step.

    Returns:
        What clips as the last step did, and what undoes this.
    """
    clip = module.clip_gradients
    last: list[Callable[[], object]] = []

    def clip_and_remember(*args: Any, **kwargs: Any) -> None:
        last[:] = [functools.partial(clip, *args, **kwargs)]
        clip(*args, **kwargs)

    return lambda: [again() for again in last], _replace(module, "clip_gradients", clip_and_remember)


def _never_distributed() -> bool:
    return False


def hide_example_input(module: LightningModule) -> Undo:
    """Keeps Lightning from calling a network with it that is spread over several devices.

    The summary of a model and the graph that a logger draws are made by such a call, on each process.
    """
    if module.example_input_array is None:
        return lambda: None
    rank_zero_warn(
        "`example_input_array` is not used in this fit, as each process has one stage only on its device: a summary"
        " shows no sizes, and loggers draw no graph. Leave the attribute out to be rid of this warning."
    )
    return _replace(module, "_example_input_array", None)


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


def keep_callback(trainer: Trainer, callback: Callback) -> None:
    """Puts a callback among those of a learning rate finder, which has taken all others away until it is done."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if callback not in callbacks:
        # Not the first: there the finder looks for its own.
        callbacks.append(callback)


def on_exception_in_fit(trainer: Trainer, tell: Callable[[BaseException], object]) -> Undo:
    """Tells of an exception where it happens: a learning rate finder waits for all ranks before it lets it go on."""
    run = trainer.fit_loop.run

    def run_and_tell() -> None:
        try:
            run()
        except BaseException as error:
            tell(error)
            raise

    return _replace(trainer.fit_loop, "run", run_and_tell)


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


def logger_step(trainer: Trainer) -> int:
    """The step with which Lightning logs the current training batch."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def skips_backward(trainer: Trainer) -> bool:
    """Whether this batch has no backward: stochastic weight averaging ends with an epoch of forwards."""
    return trainer.fit_loop._skip_backward


def time_on_rank_zero(trainer: Trainer, leads: bool) -> Undo:
    """A Timer asks rank 0 whether its time is up, after every batch; waiting for the answer would lock all stages.

    Rank 0 just looks at its clock instead: its ``should_stop`` reaches the other ranks anyway.
    """
    undo = ExitStack()

    def check(timer: Timer) -> None:
        left = timer.time_remaining()
        if leads and left is not None and left <= 0:
            trainer.should_stop = True

    for timer in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(timer, Timer):
            undo.callback(_replace(timer, "_check_time_remaining", lambda _, timer=timer: check(timer)))
    return undo.close


class TimedCheckpoints:
    """The checkpoints with a ``train_time_interval``: they save when allowed to, not when their own clock says so.

    Each would ask rank 0 after every batch whether to save, and lock all stages together by waiting for the answer.

    Args:
        trainer: The Trainer, with all its callbacks.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._allowed: set[str] = set()
        self._undo = ExitStack()
        self._callbacks = {
            f"save {number}": callback
            for number, callback in enumerate(trainer.checkpoint_callbacks)
            if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None
        }
        for name, callback in self._callbacks.items():
            self._undo.callback(self._guard(name, callback))

    def elapsed(self) -> list[str]:
        """Names of those whose interval has passed by this rank's clock."""
        names, now = [], time.monotonic()
        for name, callback in self._callbacks.items():
            last, interval = callback._last_time_checked, callback._train_time_interval
            if last is not None and interval is not None and now - last >= interval.total_seconds():
                names.append(name)
        return names

    def allow(self, names: Collection[str]) -> bool:
        """Lets those of the given names save after this batch, and no other; whether there are any that monitor."""
        self._allowed = set(names) & self._callbacks.keys()
        return any(self._callbacks[name].monitor is not None for name in self._allowed)

    def restore(self) -> None:
        """Gives the callbacks their own hooks back."""
        self._undo.close()

    def _guard(self, name: str, callback: ModelCheckpoint) -> Undo:
        hook = callback.on_train_batch_end

        def save_if_allowed(*args: Any, **kwargs: Any) -> None:
            if name in self._allowed:
                callback._last_time_checked = float("-inf")
                hook(*args, **kwargs)

        return _replace(callback, "on_train_batch_end", save_if_allowed)


def monitors_after_batch(trainer: Trainer) -> bool:
    """Whether a checkpoint that monitors a metric may be saved after this batch."""
    return any(
        isinstance(callback, ModelCheckpoint)
        and callback.monitor is not None
        and callback._every_n_train_steps > 0
        and trainer.global_step % callback._every_n_train_steps == 0
        for callback in trainer.checkpoint_callbacks
    )


def plateaus_after_batch(trainer: Trainer) -> bool:
    """Whether a ReduceLROnPlateau looks at its metric after this batch."""
    return any(
        config.reduce_on_plateau
        and config.interval == "step"
        and (trainer.fit_loop.batch_idx + 1) % config.frequency == 0
        for config in trainer.lr_scheduler_configs
    )


def filter_on_optimizer_by_identity() -> Undo:
    """Lets BaseFinetuning recognise a parameter that an optimizer has by what it is, not by its values.

    Lightning compares values, which are stale for the parameters of other ranks, and may be on another device.
    """
    original = BaseFinetuning.__dict__["filter_on_optimizer"]

    def filter_on_optimizer(optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        params = list(params)
        new = [parameter for parameter in params if id(parameter) not in known]
        if len(new) < len(params):
            rank_zero_warn(f"{len(params) - len(new)} parameters to unfreeze are in the optimizer already.")
        return new

    setattr(BaseFinetuning, "filter_on_optimizer", staticmethod(filter_on_optimizer))  # noqa: B010
    return lambda: setattr(BaseFinetuning, "filter_on_optimizer", original)


def prediction_loader(trainer: Trainer, index: int) -> Any:
    """The (wrapped) loader of a batch to predict."""
    combined = trainer.predict_loop._combined_loader
    assert combined is not None
    return combined.flattened[index]


def training_iterables(trainer: Trainer) -> Any:
    """The (wrapped) training loaders, in the nest the user gave them in; sets the loop's data up if need be."""
    trainer.fit_loop.setup_data()
    combined = trainer.fit_loop._combined_loader
    return None if combined is None else combined.iterables


def refuse_callbacks(trainer: Trainer) -> None:
    """Refuses callbacks that a single rank cannot serve.

    Raises:
        ValueError: For pruning.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            raise ValueError(
                f"{type(callback).__name__} replaces parameters while training, by comparing the weights of all stages,"
                " but a process knows only its own stage's. Prune after the fit, or train in one process (devices=1)."
            )


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
