"""What a step computes and gives to the network's next call, as a hidden state: in several processes it is refused.

The rank that reads runs the step up to the network's call, and rank 0, with the loss, all of it. What both give to the
network must be the same; it is not where a value that only rank 0 has flows back into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isclose, isnan
from typing import Any

import torch
from torch import Tensor

from lightning_ddg.core.execution import Channel
from lightning_ddg.core.pytree import tensors_of
from lightning_ddg.core.schedule import stage_of_rank
from lightning_ddg.network.replay.chain import ReplayedSegment
from lightning_ddg.network.replay.crossing import Path, arguments_of
from lightning_ddg.network.replay.tracked import Tracked
from lightning_ddg.plugin.site import Site

ARGUMENTS = Channel("arguments")

_ALWAYS = 3


class Feedback:
    """Compares what two ranks give to the network: in the first batches, and then ever more rarely.

    Args:
        site: What the run is built of.
    """

    def __init__(self, site: Site) -> None:
        self._ranks = site.ranks
        self._calls = 0

    def check(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called when a training step calls the network.

        Args:
            name: How the step calls the network.
            args: What it gives to it.
            kwargs: What it gives to it by name.

        Raises:
            RuntimeError: On rank 0, if the rank that reads gives it something else.
        """
        number, self._calls = self._calls, self._calls + 1
        if not self._ranks.others or not _is_compared(number):
            return
        if self._ranks.reads:
            self._ranks.mailbox.send(0, ARGUMENTS, _sums(args, kwargs))
        elif self._ranks.is_rank_zero:
            given = self._ranks.mailbox.take(self._ranks.reading_rank, ARGUMENTS)
            own = _sums(args, kwargs)
            if not _are_same(given, own):
                raise RuntimeError(
                    f"In batch {number} of this run, the first stage's process gives something else to the network"
                    f" ({name}) than the process with the loss: the step seems to keep what it has computed from the"
                    " network's output, such as a hidden state, for the network's next call, and that is in another"
                    " process. Keep it inside the network, in the layer that makes it and uses it, or train in one"
                    " process (`devices=1`)."
                )


class StepFeedback:
    """Compares what the code between the layers gives to them on rank 0 with what their own ranks give to them.

    That is done as seldom as :class:`Feedback` does it, and only for what each process computes for itself.

    Args:
        site: What the run is built of.
        segment: This process's stage.
    """

    def __init__(self, site: Site, segment: ReplayedSegment) -> None:
        self._ranks, self._segment = site.ranks, segment
        self._runs = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Compare what happens inside, which is a stage's run of a batch.

        Raises:
            RuntimeError: On rank 0, if something is not the same.
        """
        number, self._runs = self._runs, self._runs + 1
        if not _is_compared(number):
            yield
            return
        seen: dict[Path, tuple[str, list[float]]] = {}

        def watch(name: str, path: Path, own: bool, call: Any) -> None:
            tensors = list(arguments_of(call))
            if own != self._ranks.is_rank_zero and not any(isinstance(tensor, Tracked) for tensor in tensors):
                seen[path] = name, _sums(*call)

        with self._segment.watched(watch):
            yield
        if not self._ranks.is_rank_zero:
            self._ranks.mailbox.send(0, ARGUMENTS, seen)
            return
        for rank in self._ranks.others:
            for path, (name, given) in self._ranks.mailbox.take(rank, ARGUMENTS).items():
                if path in seen and not _are_same(given, seen[path][1]):
                    raise RuntimeError(
                        f"In batch {number} of this run, the process of stage {stage_of_rank(rank, self._ranks.size)}"
                        f" gives something else to its layer {name!r} than the process with the loss would: the step"
                        " goes by something that only one process knows, such as what it has kept of the batch before."
                        " Keep that in the layer that makes it and uses it, or train in one process (`devices=1`)."
                    )


def _is_compared(number: int) -> bool:
    return number < _ALWAYS or not number & (number - 1)


def _are_same(given: Sequence[float], own: Sequence[float]) -> bool:
    return len(given) == len(own) and all(map(_same, given, own))


def _sums(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
    with torch.no_grad():
        return [float(part) for tensor in tensors_of((args, kwargs)) for part in _parts(tensor.detach())]


def _parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    values = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    return values.sum().abs(), values.abs().sum()


def _same(one: float, other: float) -> bool:
    # Devices may round differently.
    return isclose(one, other, rel_tol=1e-3, abs_tol=1e-6) or (isnan(one) and isnan(other))
