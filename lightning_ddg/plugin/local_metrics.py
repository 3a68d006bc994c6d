"""torchmetrics in several processes: what a metric has seen goes to the replicas, never to other stages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lightning_ddg.comm.replicas import Replicas
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import Strategy

_in_force = ExitStack()


def keep_metrics_local(kind: type[Strategy], replicas: Replicas) -> compat.Undo:
    """With one replica of the data a metric is complete on every rank that updates it; syncing with others would hang.

    With several it is synchronised over the ranks with the same stage, which do the same to it.

    All metrics of the process: those in a callback, in a list, or made in a hook are no submodules of the module. Also
    after the run, when the processes are still connected, until a strategy that is none of this kind sets up several
    processes, or these are connected anew.
    """
    _in_force.close()
    original, world = Metric.sync, dist.group.WORLD

    def gather(value: Tensor, group: Any = None) -> list[Tensor]:
        return replicas.gather(value)

    def sync(
        self: Metric,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        if dist.group.WORLD is world:
            several = replicas.size > 1
            dist_sync_fn, distributed_available = (gather, _always) if several else (dist_sync_fn, _never)
        original(self, dist_sync_fn, process_group, should_sync, distributed_available)

    setattr(Metric, "sync", sync)  # noqa: B010
    _in_force.callback(setattr, Metric, "sync", original)
    _in_force.callback(compat.before_others_set_up(kind, _in_force.close))
    return _in_force.close


def _never() -> bool:
    return False


def _always() -> bool:
    return True
