"""What a step logs for each micro-batch of a batch, logged once for the batch: means, sums, largest or smallest values.

Lightning keeps the last value that a step has logged, and takes each for one of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Signature, signature
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_ddg.core.split import weighted_mean
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import LightningModule

# Without `self`, as it is called.
_SIGNATURE = Signature(list(signature(LightningModule.log).parameters.values())[1:])


@dataclass
class _Entry:
    """What has been logged by one name: of each micro-batch the value, and how many samples it is of."""

    log: Callable[..., None]
    options: dict[str, Any]
    metric: Metric | None = None
    values: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


class OneLog:
    """Collects what ``self.log`` is called with, and logs it once.

    A mean is weighted by the samples: by ``batch_size`` where the step gives that, else by those of the micro-batch. A
    metric object has seen all samples by then, so that its value over an epoch is exact; its value for the step is the
    mean of the micro-batches'.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        # By name, and by how often that has been logged in the same micro-batch.
        self._entries: dict[tuple[str, int], _Entry] = {}
        self._calls: dict[str, int] = {}
        self._size = 1

    def begin(self, size: int) -> None:
        """Called before a micro-batch, with the number of its samples."""
        self._calls, self._size = {}, size

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect inside, and log at the end."""
        log = self._module.log

        def collect(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
            if not number and not isinstance(value, Metric):
                # It refuses it.
                log(name, value, *args, **kwargs)
                return
            options = _SIGNATURE.bind(name, value, *args, **kwargs).arguments
            self._collect(log, options.pop("name"), options.pop("value"), options)

        undo = compat.replaced(self._module, "log", collect)
        try:
            yield
        finally:
            undo()
        for (name, _), entry in self._entries.items():
            _log_once(name, entry)

    def _collect(self, log: Callable[..., None], name: str, value: Any, options: dict[str, Any]) -> None:
        call = self._calls[name] = self._calls.get(name, 0) + 1
        metric = value if isinstance(value, Metric) else None
        entry = self._entries.setdefault((name, call), _Entry(log, options, metric))
        size = options.get("batch_size")
        entry.sizes.append(self._size if size is None else int(size))
        if metric is not None:
            value = compat.last_value(metric)
        elif not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=torch.get_default_dtype(), device=self._module.device)
        if isinstance(value, Tensor):
            # A copy, as what is logged may be changed in place.
            entry.values.append(value.detach().clone())


def _log_once(name: str, entry: _Entry) -> None:
    options = {**entry.options, "batch_size": sum(entry.sizes)}
    if entry.metric is None:
        entry.log(name, _reduced(entry.values, entry.sizes, options.get("reduce_fx", "mean")), **options)
        return
    if entry.values and len(entry.values) == len(entry.sizes):
        compat.set_last_value(entry.metric, _reduced(entry.values, entry.sizes, "mean"))
    entry.log(name, entry.metric, **options)


def _reduced(values: list[Tensor], sizes: list[int], how: Any) -> Tensor:
    """What a value of the whole batch would be, by the name of a reduction or torch's function."""
    reduction = str(getattr(how, "__name__", how)).lower()
    if reduction in ("sum", "max", "min"):
        stacked = torch.stack([value.reshape(()) for value in values])
        return stacked.sum() if reduction == "sum" else stacked.max() if reduction == "max" else stacked.min()
    if all(not value.is_floating_point() for value in values) and all(torch.equal(values[0], v) for v in values):
        return values[0]
    floating = [value if value.is_floating_point() else value.to(torch.get_default_dtype()) for value in values]
    return weighted_mean(floating, sizes)
