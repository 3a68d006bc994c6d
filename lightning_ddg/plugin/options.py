"""What a user chooses: the strategy's arguments, and the Trainer's options beside them, with what is checked of each.

What is wrong with the arguments alone is said when they are given; what depends on the processes, the devices or the
module, as soon as these are known.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

from lightning_ddg.core.schedule import enough_micro_batches, least_micro_batches
from lightning_ddg.core.staleness import PAPER, Staleness
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import (
    LightningModule,
    MixedPrecision,
    ModelPruning,
    Precision,
    Trainer,
    is_param_in_hook_signature,
)
from lightning_ddg.plugin.warn import warn_on_rank_zero

_SHOWN = 3
_CHOICES = {
    "balance": ("time", "parameters", "flops"),
    "drain": ("epoch", "fit", "never"),
    "start_method": ("popen", "spawn", "fork", "forkserver"),
}


#: What `staleness` may be as a word.
CORRECTED = "corrected"


def rules(staleness: Staleness | str | None, micro_batches: int | Literal["auto"]) -> dict[str, Any]:
    """Return the options that are asked for by rules for stale gradients, or by a word for them.

    Raises:
        ValueError: If the word is not known.
    """
    if staleness == CORRECTED:
        staleness, micro_batches = Staleness(extrapolate=True), "auto" if micro_batches == 1 else micro_batches
    elif isinstance(staleness, str):
        raise ValueError(
            f"staleness={staleness!r} is not known. Use {CORRECTED!r}, or Staleness(...) with its options."
        )
    return {"staleness": PAPER if staleness is None else staleness, "micro_batches": micro_batches}


@dataclass(frozen=True)
class Options:
    """The strategy's own arguments, as :class:`~lightning_ddg.DDGStrategy` explains them; ``max_memory`` in bytes.

    Raises:
        TypeError: If a value has another type.
        ValueError: If a value has no meaning, or two do not go together; the message names them and the remedy.
    """

    num_stages: int | Literal["auto"] = "auto"
    split_points: list[str] | None = None
    balance: Literal["time", "parameters", "flops"] = "time"
    max_memory: int | None = None
    compile: bool | dict[str, Any] = False
    drain: Literal["epoch", "fit", "never"] = "epoch"
    micro_batches: int | Literal["auto"] = 1
    eval_micro_batches: int | Literal["auto"] = 1
    slack: int = 0
    recompute: bool = False
    verify: bool = True
    staleness: Staleness = field(default_factory=Staleness)
    process_group_backend: str | None = None
    timeout: timedelta = timedelta(minutes=30)
    start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known. Use one of {', '.join(map(repr, known))}.")
        _check_stages(self.num_stages, self.split_points)
        check_slack(self.slack)
        if not isinstance(self.timeout, timedelta) or self.timeout <= timedelta(0):
            raise ValueError(f"timeout={self.timeout!r} is not a limit. Use a positive datetime.timedelta.")
        _check_compile(self.compile, self.num_stages)
        _check_staleness(self.staleness, self.recompute, self.compile)
        if not isinstance(self.verify, bool):
            raise TypeError(f"verify={self.verify!r} is not a bool. Use True or False.")
        _check_memory_limit(self.max_memory, self.split_points, self.balance)
        for name in ("micro_batches", "eval_micro_batches"):
            number = getattr(self, name)
            if number != "auto" and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(
                    f"{name}={number!r} is not a number of micro-batches. Use a positive integer or 'auto'."
                )

    @property
    def compile_options(self) -> dict[str, Any] | None:
        """Arguments of ``torch.compile``; ``None`` if nothing is compiled."""
        if isinstance(self.compile, dict):
            return self.compile
        return {} if self.compile else None

    def stages(self, world_size: int) -> int:
        """Return the number of stages ``K`` that ``world_size`` processes train."""
        if self.num_stages != "auto":
            return self.num_stages
        if world_size > 1:
            return world_size
        return 2 if self.split_points is None else len(self.split_points) + 1

    def replicas(self, world_size: int) -> int:
        """Return how many pipelines ``world_size`` processes make: D, 1 where one process trains all stages."""
        return 1 if world_size == 1 else world_size // self.stages(world_size)

    def micro_batches_for(self, num_stages: int) -> int:
        """Return after how many micro-batches each stage steps; 1 where batches are not split."""
        return least_micro_batches(num_stages, self.slack) if self.micro_batches == "auto" else self.micro_batches

    def eval_micro_batches_for(self, num_stages: int) -> int:
        """Return into how many micro-batches a batch is split in evaluation, if it has as many samples."""
        return 4 * num_stages if self.eval_micro_batches == "auto" else self.eval_micro_batches

    def micro_batches_of(self, length: int, num_stages: int) -> int:
        """Return into how many micro-batches a batch of so many samples is split."""
        if self.micro_batches == "auto":
            return enough_micro_batches(length, num_stages, self.slack)
        return max(1, min(length, self.micro_batches))

    # ---- checks against what is known later

    def check_world_size(self, world_size: int) -> None:
        """Refuse several processes that are no multiple of the stages, and one with a limit to each stage's device.

        Raises:
            ValueError: Naming the numbers.
        """
        if world_size == 1:
            if self.max_memory is not None:
                raise ValueError(
                    f"max_memory={self.max_memory} bytes limits a stage's device, but with one process all stages share"
                    " one. Leave it out, or use as many devices as stages."
                )
            return
        if self.num_stages == 1:
            raise ValueError(
                f"num_stages=1 cuts nothing, so that {world_size} processes would be replicas of the whole network. Use"
                f" strategy='ddp', which is that, or num_stages='auto', or devices=1."
            )
        if self.num_stages != "auto" and world_size % self.num_stages:
            raise ValueError(
                f"num_stages={self.num_stages} stages cannot be trained by {world_size} processes: each process trains"
                f" one stage. Use devices={self.num_stages}, or a multiple for as many replicas,"
                f" num_stages={world_size} or num_stages='auto', or one process."
            )
        named = world_size if self.split_points is None else len(self.split_points) + 1
        if self.num_stages == "auto" and named != world_size:
            raise ValueError(
                f"split_points={self.split_points!r} make {named} stages, but there are {world_size} processes,"
                f" and each trains one stage. Use devices={named}, or name {world_size - 1} split points."
            )

    def check_launch(self, started_by: str | None) -> None:
        """Refuse to start processes where somebody else has, or in a way that needs a script where there is none.

        Args:
            started_by: Who has started the processes; ``None`` if they have yet to be started.

        Raises:
            ValueError: Naming the way that works there.
        """
        if started_by is not None and self.start_method != "popen":
            raise ValueError(
                f"start_method={self.start_method!r} would start processes, but they have been started already"
                f" ({started_by}). Use strategy='ddg' (start_method='popen'), which takes those there are."
            )
        if started_by is None and self.start_method != "fork" and (hasattr(sys, "ps1") or sys.flags.interactive):
            raise ValueError(
                f"start_method={self.start_method!r} starts a script again, but this is a notebook or an interactive"
                " session. Use strategy='ddg_notebook' (start_method='fork'), or one process (devices=1)."
            )

    def check_micro_batches(self, module: LightningModule, num_stages: int) -> None:
        """Refuse to split the batches of a step that runs its own backward; warn of layers that mix a batch's samples.

        Raises:
            ValueError: Naming the module's class.
        """
        if self.micro_batches_for(num_stages) == 1:
            return
        name = type(module).__name__
        if not module.automatic_optimization:
            raise ValueError(
                f"micro_batches={self.micro_batches!r} splits each batch for one step of the optimizer, but {name}"
                " steps by itself (automatic_optimization=False). Leave micro_batches out, or use automatic"
                " optimization."
            )
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                f"micro_batches={self.micro_batches!r} splits each batch, but `{name}.training_step` fetches its own"
                " (`dataloader_iter`). Take `batch` and `batch_idx` instead, or leave micro_batches out."
            )
        norms = [where for where, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        if norms:
            shown = ", ".join(map(repr, norms[:_SHOWN])) + (f" and {len(norms) - _SHOWN} more" * (len(norms) > _SHOWN))
            warn_on_rank_zero(
                f"micro_batches={self.micro_batches!r}: BatchNorm normalises each micro-batch by itself, and so with"
                f" the statistics of fewer samples than a batch has: {shown}. So it is with all pipelines that split"
                " batches. Normalisations of single samples (GroupNorm, LayerNorm) are not changed."
            )

    def check_casts(self, plugin: Precision) -> None:
        """Refuse today's weights in a backward that would use those cast in its forward.

        Raises:
            ValueError: Naming the precision.
        """
        if isinstance(plugin, MixedPrecision) and not self.staleness.stash and not self.recompute:
            raise ValueError(
                f"stash=False uses today's weights in a backward, but precision={plugin.precision!r} keeps copies of"
                " the weights from its forward. Use recompute=True with it, or another precision: 'bf16-true' or"
                " '32-true'."
            )

    def allow_ties(self, *, one_process: bool) -> bool:
        """Return whether stages may share parameters.

        In one process several backwards at once would add to one ``p.grad``; in several, a stage cannot know where
        another's parameter will be.
        """
        return self.staleness.stash if one_process else not self.staleness.extrapolate

    def check_carried(self, num_stages: int) -> None:
        """Refuse micro-batches where the step leaves something for its next run.

        Raises:
            ValueError: Naming the option.
        """
        if self.micro_batches_for(num_stages) > 1:
            raise ValueError(
                f"micro_batches={self.micro_batches!r} runs the training step several times a batch, but the step"
                " leaves something in attributes, such as a hidden state, which the next micro-batch would find, of"
                " other samples. Keep that inside the network, or leave micro_batches out."
            )

    def check_kept(self, *, one_process: bool) -> None:
        """Refuse what runs a step more than once a batch, where the step leaves something for its next run.

        Raises:
            ValueError: Naming the option.
        """
        if one_process and not self.staleness.stash:
            option = "stash=False in one process"
        elif self.recompute and not one_process:
            option = "recompute=True"
        else:
            return
        raise ValueError(
            f"{option} runs the training step more than once a batch, but the step leaves something in attributes for"
            " the next batch, such as a hidden state. Keep that inside the network, or leave the option out."
        )

    def check_recurrent(self, segments: Iterable[nn.Module], device: torch.device) -> None:
        """Refuse today's weights in a backward of layers that keep their weights in a form of their own.

        Raises:
            ValueError: Naming the kind of layer and the device.
        """
        if self.staleness.stash or device.type != "cuda":
            return
        modules = (module for segment in segments for module in segment.modules())
        kinds = {type(module).__name__ for module in modules if isinstance(module, nn.RNNBase)}
        if kinds:
            raise ValueError(
                f"stash=False uses today's weights in a backward, but on {device} {', '.join(sorted(kinds))} keeps them"
                " in another form from its forward. Leave stash=False out, or train on the CPU."
            )


def _check_stages(num_stages: Any, split_points: Any) -> None:
    if num_stages != "auto" and (not isinstance(num_stages, int) or isinstance(num_stages, bool) or num_stages < 1):
        raise ValueError(f"num_stages={num_stages!r} is not a number of stages. Use a positive integer or 'auto'.")
    if isinstance(split_points, str):
        raise TypeError(
            f"split_points={split_points!r} is a string. Use a list of submodule names:"
            f" split_points=[{split_points!r}]."
        )
    if split_points is not None and num_stages != "auto" and len(split_points) != num_stages - 1:
        raise ValueError(
            f"split_points={split_points!r} begin {len(split_points)} stages after the first, but"
            f" num_stages={num_stages} needs {num_stages - 1}. Name the submodules that begin stages 2 to {num_stages}."
        )


def check_slack(slack: Any) -> None:
    """Refuse what is no number of batches.

    Raises:
        ValueError: Naming the value.
    """
    if isinstance(slack, bool) or not isinstance(slack, int) or slack < 0:
        raise ValueError(
            f"slack={slack!r} is not a number of batches. Use 0 (none), or the positive integer that"
            " `lightning-ddg plan --latency_ms` names for your link."
        )


def _check_compile(compile: Any, num_stages: Any) -> None:
    if not isinstance(compile, bool | dict):
        raise TypeError(f"compile={compile!r} is neither a bool nor a dictionary of torch.compile's options. Use True.")
    if compile is not False and num_stages == 1:
        raise ValueError(
            "compile needs stages to compile, but num_stages=1 cuts nothing. Compile the network in your module:"
            " `self.net.compile()`."
        )
    asked = compile if isinstance(compile, dict) else {}
    graphs = asked.get("mode") if asked.get("mode") in ("reduce-overhead", "max-autotune") else None
    if graphs is not None or (asked.get("options") or {}).get("triton.cudagraphs"):
        raise ValueError(
            f"compile={compile!r} records CUDA graphs, which a new forward overwrites, while stages have several"
            " batches in flight. Use mode='max-autotune-no-cudagraphs', or no mode."
        )


def _check_staleness(staleness: Any, recompute: Any, compile: Any) -> None:
    if not isinstance(staleness, Staleness):
        raise TypeError(f"staleness={staleness!r} is no Staleness. Use lightning_ddg.Staleness(...), or leave it out.")
    if not isinstance(recompute, bool):
        raise TypeError(f"recompute={recompute!r} is not a bool. Use True or False.")
    if not staleness.stash and not recompute and compile is not False:
        raise ValueError(
            "stash=False uses today's weights in a backward, but what is compiled may keep weights in another form from"
            " its forward. Use recompute=True with it, or leave `compile` out."
        )


def _check_memory_limit(max_memory: int | None, split_points: Any, balance: str) -> None:
    if max_memory is None:
        return
    other = f"{split_points=}" if split_points is not None else f"{balance=}"
    if split_points is not None or balance != "time":
        raise ValueError(
            f"max_memory={max_memory} bytes has no part in a cut by {other}: it is kept by the cut by measured time."
            " Leave out one of the two."
        )


# ---- the Trainer's options


def check_started(started: int, devices: int, num_nodes: int, local_rank: int, environment: str) -> None:
    """Refuse a Trainer that counts otherwise than whoever has started its processes.

    Args:
        started: The number of processes started.
        devices: The Trainer's number of processes on a node.
        num_nodes: The Trainer's number of nodes.
        local_rank: Which process of its node this is.
        environment: Who has started it, for the message.

    Raises:
        ValueError: Naming the numbers.
    """
    asked = f"devices={devices} and num_nodes={num_nodes} ask for {devices * num_nodes}"
    if started != devices * num_nodes:
        raise ValueError(
            f"{asked} processes, but {started} have been started ({environment}). Let devices x num_nodes be {started},"
            f" or start {devices * num_nodes}. A script that trains in turn with several numbers of stages can use"
            " strategy='ddg_spawn' throughout."
        )
    if started > 1 and local_rank >= devices:
        raise ValueError(
            f"{asked} processes, {devices} on each node, but this is process {local_rank} of its node, counted from 0"
            f" ({environment}). Let `devices` be the number of processes on each node."
        )


def check_backend(backend: str, devices: Sequence[torch.device]) -> None:
    """Refuse to let NCCL connect processes that share a device.

    Raises:
        ValueError: Naming the devices.
    """
    if "nccl" in backend and len(set(devices)) < len(devices):
        raise ValueError(
            f"process_group_backend={backend!r} cannot connect processes that share a device, as those on"
            f" {', '.join(map(str, devices))} do. Use process_group_backend='gloo', or a device for each process."
        )


def check_precision(plugin: Any) -> None:
    """Refuse a precision that scales the loss.

    Raises:
        ValueError: For ``"16-mixed"``.
    """
    if getattr(plugin, "scaler", None) is not None or getattr(plugin, "precision", None) == "16-mixed":
        raise ValueError(
            f"precision={plugin.precision!r} scales the loss, and has to skip a batch whose gradient overflows, on all"
            " stages; but the last stage has applied that batch's gradient before the first has computed its own. Use"
            " precision='bf16-mixed'."
        )


def check_trainer(trainer: Trainer, layer_sync: Any, one_process: bool, replicas: int = 1) -> None:
    """Refuse options and callbacks of a Trainer that stages cannot serve.

    Args:
        trainer: The Trainer.
        layer_sync: Its plugin that synchronises layers between replicas, if any.
        one_process: Whether one process trains all stages.
        replicas: How many pipelines there are.

    Raises:
        ValueError: For ``sync_batchnorm=True``, and in several processes for a time-based ``val_check_interval`` and
            for pruning.
    """
    interval = compat.validation_interval(trainer)
    if interval is not None and not one_process:
        raise ValueError(
            f"A time-based `val_check_interval` ({interval} seconds) is measured by each process for itself, so that"
            " the stages would validate at different batches. Give a number of batches or a fraction of an epoch"
            " instead."
        )
    if layer_sync is not None and replicas > 1:
        raise ValueError(
            f"sync_batchnorm=True synchronises BatchNorm over {replicas} replicas, which DDGStrategy does not do: it"
            " would lock their stages together. Remove sync_batchnorm=True, or use one pipeline (devices=num_stages),"
            " whose BatchNorm sees the whole batch."
        )
    if layer_sync is not None:
        raise ValueError(
            "sync_batchnorm=True synchronises the replicas of a layer, but each stage has only one, and its BatchNorm"
            " sees the whole batch already. Remove sync_batchnorm=True."
        )
    callbacks = () if one_process else trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, ModelPruning):
            raise ValueError(
                f"{type(callback).__name__} replaces parameters while training, by comparing the weights of all stages,"
                " but a process knows only its own stage's. Prune after the fit, or train in one process (devices=1)."
            )
