"""What a process can say of its stages while it trains them: how long they wait, how old their gradients are.

A :class:`Gauge` is told by the execution what happens, and adds it up in a
:class:`~lightning_ddg.planning.tally.Tally`. How the figures come to rank 0 is in
:mod:`~lightning_ddg.observe.gathering`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ddg.core.execution import ACTIVATION, GRADIENT, Channel, InFlight, Observer, Observers
from lightning_ddg.planning.tally import Tally

# The batch, or that there is one, comes from the first stage like activations.
_WAITED_FOR = {ACTIVATION.name, "batch", "flag", GRADIENT.name}


def relative_change(now: Sequence[Tensor], then: Sequence[Tensor]) -> Tensor:
    """Return how far weights have moved: ``||w_t - w_{t-d}|| / ||w_t||`` over all tensors together, in the 2-norm.

    Args:
        now: The weights ``w_t``; one tensor or more.
        then: The weights ``w_{t-d}``, of the same shapes.

    Returns:
        A tensor without dimensions; nan where both norms are zero.
    """
    return _norm(new.detach() - old for new, old in zip(now, then, strict=True)) / _norm(new.detach() for new in now)


def cosine(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> Tensor | None:
    """Return the cosine of the angle between two gradients, each over all its tensors together.

    Args:
        one: A gradient, by parameter; ``None`` counts as zero.
        other: The other, of the same shapes.

    Returns:
        A tensor without dimensions, nan where a gradient is zero; ``None`` where one of them has no tensor at all.
    """
    first, second = ([tensor for tensor in grads if tensor is not None] for grads in (one, other))
    if not first or not second:
        return None
    products = [(_flat(a) * _flat(b)).sum() for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    dot = torch.stack(products).sum() if products else torch.zeros((), device=first[0].device)
    return dot / (_norm(first) * _norm(second))


def _flat(tensor: Tensor) -> Tensor:
    # Halves would overflow, or lose what is added last.
    return tensor.detach().to_dense().flatten().to(torch.promote_types(tensor.dtype, torch.float32))


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(_flat(tensor)) for tensor in tensors]
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(norms)))


class Reading(NamedTuple):
    """A stage's figures of the batches since the reading before.

    Attributes:
        stage: ``1..K``.
        batch: Number of the last of the batches, counted through the fit.
        step: The loggers' step of that batch; ``None`` if the fit ended before a reading was due.
        tally: The figures.
    """

    stage: int
    batch: int
    step: int | None
    tally: Tally


class _Clock:
    """Marks moments of a device's work, and tells later what lies between them: nobody waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def mark(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, marks: Iterable[tuple[Any, Any]]) -> float:
        """Return the seconds between all pairs of marks together."""
        if self._device is None:
            return float(sum(after - before for before, after in marks))
        return float(sum(before.elapsed_time(after) for before, after in marks)) / 1e3

    def has_passed(self, mark: Any) -> bool:
        return self._device is None or bool(mark.query())

    def wait_for(self, mark: Any) -> None:
        if self._device is not None:
            mark.synchronize()


class _Track:
    """Of one stage: the batches between forward and backward, and what a window of batches has shown so far."""

    def __init__(self) -> None:
        self._in_flight: deque[tuple[int, int]] = deque()
        self._updates = 0
        self._pending = False
        # By the iteration that is read: the weights, as many iterations earlier as the delay.
        self.kept: dict[int, list[Tensor]] = {}
        # Iterations so far, those of this batch, and those that the batch before had: one, or one for a micro-batch.
        self.iteration, self.within, self.micro_batches = 0, 0, 1
        self.reset()

    def begin(self) -> None:
        """Note that a batch begins."""
        self.micro_batches, self.within = max(1, self.within), 0

    def reset(self) -> None:
        # Not a tally yet: this is added to in every batch.
        self._due = self._delay = self._age = 0
        self.staleness: Tensor | float | None = None
        self.cosine: Tensor | float | None = None

    def backward(self, batch: int, in_flight: int, due: bool) -> None:
        """Note that ``batch`` went forward and that one of those ``in_flight``, itself included, may be due."""
        self._in_flight.append((batch, self._updates))
        # Draining, or forgetting, has made them fewer.
        while len(self._in_flight) > in_flight:
            self._in_flight.popleft()
        if due:
            oldest, updates = self._in_flight.popleft()
            self._pending = True
            self._due += 1
            self._delay += batch - oldest
            self._age += self._updates - updates

    @property
    def tally(self) -> Tally:
        return Tally(due=self._due, delay=self._delay, updates=self._age)

    def stepped(self) -> None:
        self._updates += self._pending
        self._pending = False


@dataclass
class _Window:
    """What is measured between two readings."""

    time: list[tuple[Any, Any]] = field(default_factory=list)
    activations: list[tuple[Any, Any]] = field(default_factory=list)
    gradients: list[tuple[Any, Any]] = field(default_factory=list)


class _Closed(NamedTuple):
    end: Any
    batch: int
    step: int | None
    window: _Window
    tracks: list[tuple[int, Tally, Tensor | float | None, Tensor | float | None]]


class Gauge(Observer):
    """Measures the stages of one process.

    The staleness and the cosine are measured in every ``every``-th batch. The former needs a copy of the weights for
    ``d(k)`` batches where gradients wait in a queue, and nothing where weights are stashed anyway.

    Args:
        observers: Tell what happens to the stages.
        stages: The numbers of the stages.
        optimizers: Update them.
        device: Where the stages are.
        every: Batches between two readings.
        compare: Whether to measure the cosine, where a batch's own gradient is known at once.
    """

    def __init__(
        self,
        observers: Observers,
        stages: Sequence[int],
        optimizers: Sequence[Optimizer],
        device: torch.device,
        every: int,
        compare: bool,
    ) -> None:
        self._every = every
        self._compare = compare
        self._clock = _Clock(device)
        self._tracks = {stage: _Track() for stage in stages}
        self._batch = 0
        self._in_batch = False
        self._mark: Any = None
        self._wait: Any = None
        self._window = _Window()
        self._closed: deque[_Closed] = deque()
        self._undo = [observers.subscribe(self)]
        self._undo += [optimizer.register_step_post_hook(self._stepped).remove for optimizer in optimizers]

    def detach(self) -> None:
        """Stop looking on."""
        while self._undo:
            self._undo.pop()()

    def begin(self, batch: int, counts: bool) -> None:
        """Called when a batch begins; its time ``counts`` once the pipeline has been filled."""
        self._batch, self._in_batch = batch, True
        for track in self._tracks.values():
            track.begin()
        if not counts:
            self._mark = None
        elif self._mark is None:
            self._mark = self._clock.mark()

    def end(self, step: int) -> list[Reading]:
        """Called when the batch has ended, at that step of the loggers; return the readings that have become known."""
        self._count()
        self._in_batch = False
        if self._is_read(self._batch):
            self._close(step)
        readings = []
        while self._closed and self._clock.has_passed(self._closed[0].end):
            readings += self._read(self._closed.popleft())
        return readings

    def pause(self) -> None:
        """Called where what follows is no time of training, until a batch begins that counts."""
        self._count()
        self._mark = None

    def finish(self) -> list[Reading]:
        """Return the readings that are left; the last of each stage is of fewer batches, and has no step."""
        self.pause()
        self._close(None)
        self._clock.wait_for(self._closed[-1].end)
        return [reading for closed in self._closed for reading in self._read(closed)]

    def _is_read(self, batch: int) -> bool:
        return (batch + 1) % self._every == 0

    def _count(self) -> None:
        if self._mark is None or not self._in_batch:
            return
        now = self._clock.mark()
        self._window.time.append((self._mark, now))
        self._mark = now

    def _close(self, step: int | None) -> None:
        tracks = [(stage, track.tally, track.staleness, track.cosine) for stage, track in self._tracks.items()]
        self._closed.append(_Closed(self._clock.mark(), self._batch, step, self._window, tracks))
        self._window = _Window()
        for track in self._tracks.values():
            track.reset()

    def _read(self, closed: _Closed) -> list[Reading]:
        window = closed.window
        timed = Tally(len(window.time), *map(self._clock.between, (window.time, window.activations, window.gradients)))
        readings = []
        for stage, tally, staleness, cosine in closed.tracks:
            for name, count, value in (("staleness", "norms", staleness), ("cosine", "angles", cosine)):
                number = float("nan") if value is None else float(value)
                if isfinite(number):
                    tally += Tally(**{name: number, count: 1})
            readings.append(Reading(stage, closed.batch, closed.step, timed + tally))
        return readings

    # ---- what happens to the stages

    def in_flight(self, stage: int, batches: InFlight) -> None:
        track, delay, due = self._tracks[stage], batches.delay, len(batches) > batches.delay
        track.backward(self._batch, len(batches), due)
        if self._is_read(self._batch) and track.within == 0:
            then = track.kept.get(track.iteration)
            track.kept = {at: weights for at, weights in track.kept.items() if at > track.iteration}
            if due:
                track.staleness = _staleness(batches, then)
                track.cosine = _cosine(batches) if self._compare else None
        # Whether, as many iterations later as the delay, a batch begins that is read, if those till then are like this.
        ahead, within = divmod(track.within + delay, track.micro_batches)
        if delay and not within and self._is_read(self._batch + ahead) and batches.newest_gradient() is not None:
            track.kept[track.iteration + delay] = [weight.detach().clone() for weight in _trained(batches)]
        track.iteration += 1
        track.within += 1

    def before_take(self, source: int, channel: Channel) -> None:
        waits = self._mark is not None and channel.name in _WAITED_FOR
        self._wait = self._clock.mark() if waits else None

    def after_take(self, source: int, channel: Channel) -> None:
        if self._wait is not None:
            waits = self._window.gradients if channel == GRADIENT else self._window.activations
            waits.append((self._wait, self._clock.mark()))
            self._wait = None

    def before_drain(self) -> None:
        self.pause()

    def _stepped(self, *_: object) -> None:
        for track in self._tracks.values():
            track.stepped()


def _staleness(batches: InFlight, kept: list[Tensor] | None) -> Tensor | float | None:
    if not batches.delay:
        return 0.0
    pairs: Sequence[tuple[Tensor, Tensor]] | None = batches.oldest_weights()
    if pairs is None and kept is not None:
        now = _trained(batches)
        # Some may have been frozen, or trained again, since the copy was made.
        pairs = list(zip(now, kept, strict=True)) if len(now) == len(kept) else None
    return relative_change(*zip(*pairs, strict=True)) if pairs else None


def _cosine(batches: InFlight) -> Tensor | float | None:
    if not batches.delay:
        return 1.0
    applied, own = batches.oldest_gradient(), batches.newest_gradient()
    return None if applied is None or own is None else cosine(applied, own)


def _trained(batches: InFlight) -> list[Tensor]:
    return [parameter for parameter in batches.parameters if parameter.requires_grad]
