"""The algorithm in one process: ordinary backprop, each stage's gradients passing through a queue as long as its delay.

A gradient that stage k applies at iteration t is the k-th block of the full gradient at the weights of iteration
t - d(k). In one process that block was computed right then, so it only has to be kept::

    iteration t:   backprop of batch t --+-- block of stage K ------------------------> p.grad     (d = 0)
                                         +-- block of stage K-1 --> [ t-1 ] ----------> p.grad     (d = 1)
                                         +-- block of stage K-2 --> [ t-1 | t-2 ] ----> p.grad     (d = 2)

No weights are stashed and no graph outlives its batch, so it costs what backprop costs. It holds for every rule whose
backward uses the weights of its forward; for the others there is :mod:`~lightning_ddg.core.staged`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_ddg.core.execution import Execution, Observers
from lightning_ddg.core.extrapolation import Outlook
from lightning_ddg.core.gradient_queue import GradientQueue
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.schedule import crossings, delay
from lightning_ddg.core.staleness import PAPER, Staleness
from lightning_ddg.core.tensors import Slot, parameters_replaced, slots_of

Forward = Callable[[Batch, tuple[Any, ...], dict[str, Any]], Any]


class DelayLine(Execution):
    """The execution of all stages in one process.

    Args:
        segments: The stages' modules, input side first. A parameter that several of them have belongs to the first.
        others: Parameters outside the network: they have no delay.
        rule: How updates are applied; one with ``stash``.
        observers: Look on.
        forward: Runs the whole network on a batch; by default, the modules one after the other.
        outlook: What is known of the optimizer's steps, for rules that ask for that.
        slack: ``s`` of the stages' delays.
    """

    def __init__(
        self,
        segments: Sequence[nn.Module],
        others: Sequence[nn.Parameter] = (),
        rule: Staleness = PAPER,
        observers: Observers | None = None,
        forward: Forward | None = None,
        outlook: Outlook | None = None,
        slack: int = 0,
    ) -> None:
        self.stages = range(1, len(segments) + 1)
        self._forward = forward or partial(run_in_turn, segments)
        first: dict[nn.Parameter, int] = {}
        for stage, segment in enumerate(segments):
            for parameter in segment.parameters():
                first.setdefault(parameter, stage)
        parameters = [[parameter for parameter, its in first.items() if its == stage] for stage in range(len(segments))]
        parameters[-1].extend(others)
        count = len(segments)
        self._lines = [
            GradientQueue(own, delay(stage, count, slack), rule.shrink ** crossings(stage, count), rule, outlook)
            for stage, own in enumerate(parameters, start=1)
        ]
        self._observers = observers or Observers()
        self._slots = [slot for segment in segments for slot in slots_of(segment)] if rule.extrapolate else []
        # Until the next step, as with several processes.
        self._ahead: dict[nn.Parameter, Tensor] | None = None
        self._extrapolated: list[tuple[Slot, Tensor]] = []
        self._drained = False

    def begin(self, step: int) -> None:
        self._drained = self.synchronous = False
        self._ahead = None
        for line in self._lines:
            line.begin(step)

    def synchronize(self) -> None:
        self.synchronous = True
        for line in self._lines:
            line.synchronize()

    def train(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for line in self._lines:
            line.updates.count_batch()
        self._extrapolated = self._extrapolate()
        self._observers.before_forward(1)
        with parameters_replaced(self._extrapolated):
            output = self.evaluate(batch, args, kwargs)
        self._observers.after_forward(1)
        return output

    def pass_over(self, batch: Batch) -> None:
        for line in self._lines:
            line.updates.count_batch()
        self._extrapolated = []

    def evaluate(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._forward(batch, args, kwargs)

    def backward(self, loss: Callable[[], object] | None) -> None:
        # What has accumulated since the last step is set aside, so that p.grad is this batch's own gradient.
        *delayed, last = self._lines
        accumulated = [line.take() for line in delayed]
        if loss is not None:
            self._observers.before_backward(1)
            # Activation checkpointing runs the forward again here, and must find the weights of that forward.
            with parameters_replaced(self._extrapolated):
                loss()
            self._observers.after_backward(1)
            last.pending = True
        self._extrapolated = []
        for line in delayed:
            line.append(line.take())
        for stage, line in zip(self.stages, self._lines, strict=True):
            self._observers.in_flight(stage, line)
        for line, before in zip(delayed, accumulated, strict=True):
            due = len(line.queue) > line.lag
            if due or line.pending or self.synchronous:
                line.put(before)
            if due:
                line.apply_oldest()

    def before_step(self) -> None:
        self._ahead = None
        for line in self._lines:
            line.before_step()

    def after_step(self) -> None:
        for line in self._lines:
            line.after_step(self._drained)
        self._drained = False

    def drain(self) -> bool:
        self._observers.before_drain()
        waiting = self.waiting
        self._drained |= waiting
        for line in self._lines:
            if line.queue:
                line.apply_oldest()
            elif not line.pending and not self.synchronous:
                line.take()
        return waiting

    @property
    def waiting(self) -> bool:
        return any(line.queue for line in self._lines)

    def clear(self) -> None:
        for line in self._lines:
            line.pending = False
            line.queue.clear()
            line.updates.forget()
        self._extrapolated, self._ahead = [], None

    def _extrapolate(self) -> list[tuple[Slot, Tensor]]:
        """Return the parameters' slots with what is expected of them; gradients w.r.t. that go to the parameters."""
        if not self._slots or self.synchronous:
            return []
        if self._ahead is None:
            delayed = [line for line in self._lines if line.delay]
            moves = [line.updates.ahead(line.parameters, len(line.queue)) for line in delayed]
            self._ahead = {parameter: by for line in moves for parameter, by in line.items()}
        moved = {parameter: parameter + by for parameter, by in self._ahead.items()}
        held = [(slot, slot[0][slot[1]]) for slot in self._slots]
        return [(slot, moved[parameter]) for slot, parameter in held if parameter in moved]


def run_in_turn(segments: Sequence[nn.Module], batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run modules one after the other, each with its stage's random draws; return what the last returns."""
    for stage, segment in enumerate(segments, start=1):
        with batch.draws(stage):
            args, kwargs = (segment(*args, **kwargs),), {}
    return args[0]
