"""torchmetrics in several processes: each process keeps what it has seen to itself, in a run and after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torchmetrics import Metric

from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import Strategy

_in_force = ExitStack()


def keep_metrics_local(kind: type[Strategy]) -> compat.Undo:
    """There is one replica of the data, so a metric is complete on every rank that updates it; syncing would hang.

    All metrics of the process: those in a callback, in a list, or made in a hook are no submodules of the module. Also
    after the run, when the processes are still connected, until a strategy that is none of this kind sets up several
    processes, or these are connected anew.
    """
    _in_force.close()
    original, world = Metric.sync, dist.group.WORLD

    def sync(
        self: Metric,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any = None,
        should_sync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> None:
        if dist.group.WORLD is world:
            distributed_available = _never
        original(self, dist_sync_fn, process_group, should_sync, distributed_available)

    setattr(Metric, "sync", sync)  # noqa: B010
    _in_force.callback(setattr, Metric, "sync", original)
    _in_force.callback(compat.before_others_set_up(kind, _in_force.close))
    return _in_force.close


def _never() -> bool:
    return False
