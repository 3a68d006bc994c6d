"""The one-process execution: ordinary backprop, each stage's gradients passing through a queue as long as its delay.

It has the methods of the K-process execution, :mod:`~lightning_ddg.core.pipeline`, and must give the same weights.

A gradient that stage k applies at iteration t is the k-th block of the full gradient at the weights of iteration
t - d(k); in one process that block was computed right then, so it only has to be kept. No weights are stashed and no
graph outlives its batch. That holds for every rule whose backward uses the weights of its forward; for the others there
is :mod:`~lightning_ddg.core.staged`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lightning_ddg.core.staleness import Staleness, Updates, shrunk
from lightning_ddg.core.tensors import Slot, parameters_replaced, slots_of

Gradients = list[Tensor | None]
Seeded = Callable[[int], AbstractContextManager[None]]


class DelayLine:
    """All stages of a network in one process.

    Args:
        segments: The stages, input side first; stage ``k`` of ``K`` has the delay ``K - k``.
        others: Parameters outside the network: they have no delay.
        seeded: ``seeded(k)`` seeds the random draws of stage ``k`` for the current batch.
        rule: What a stage does with its gradients; a rule with ``stash``.
    """

    def __init__(
        self,
        segments: Sequence[nn.Module],
        others: Sequence[nn.Parameter],
        seeded: Seeded,
        rule: Staleness = Staleness(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self._segments = list(segments)
        self.notices: list[Any] = []
        self._seeded = seeded
        parameters = [list(segment.parameters()) for segment in segments]
        parameters[-1].extend(others)
        self._lines = [_Line(own, len(segments) - stage, rule) for stage, own in enumerate(parameters, start=1)]
        self._shrink = rule.shrink
        self._slots = [slot for segment in segments for slot in slots_of(segment)] if rule.predict else []
        self._predicted: list[tuple[Slot, Tensor]] = []
        self._drained = False

    def train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward of the next training batch; returns the network's output."""
        for line in self._lines:
            line.updates.count_batch()
        self._predicted = self._predict()
        with parameters_replaced(self._predicted):
            return self._forward(args, kwargs)

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward in evaluation; returns the network's output."""
        return self._forward(args, kwargs)

    def backward(self, run: Callable[[], object]) -> None:
        """Runs a backward and replaces the gradients it adds by those that are due.

        Gradients accumulated since the last step stay: what is due is added to them. A stage to which nothing is due
        and nothing was added since then has ``p.grad = None``, so that its optimizer leaves it alone.

        Args:
            run: Runs the backward of the whole network, adding to ``p.grad``.
        """
        delayed = [line for line in self._lines if line.delay]
        accumulated = [_take(line.parameters) for line in delayed]
        # Activation checkpointing runs the forward again here, and must find the weights of that forward.
        with parameters_replaced(self._predicted):
            run()
        self._predicted = []
        for line in self._lines:
            line.pending |= line.delay == 0
        for line, before in zip(delayed, accumulated, strict=True):
            # Once for each boundary that the gradient would cross.
            line.queue.append(shrunk(_take(line.parameters), self._shrink**line.delay))
            due = len(line.queue) > line.delay
            if due or line.pending:
                _put(line.parameters, before)
            if due:
                line.apply_oldest()

    def drain(self) -> bool:
        """Adds the oldest waiting gradient of every stage that has one; whether any had."""
        waiting = self.waiting
        self._drained |= waiting
        for line in self._lines:
            if line.queue:
                line.apply_oldest()
            elif not line.pending:
                _put(line.parameters, [None] * len(line.parameters))
        return waiting

    @property
    def lines(self) -> Sequence[_Line]:
        """The stages' parameters, delays and gradients on their way, stage 1 first; to be looked at only."""
        return self._lines

    @property
    def waiting(self) -> bool:
        """Whether any batch's gradient has not been applied yet."""
        return any(line.queue for line in self._lines)

    def begin(self, step: int) -> None:
        """Says that a run begins, with the optimizer step of that number."""
        self._drained = False
        for line in self._lines:
            line.updates.begin(step)

    def before_step(self) -> None:
        """Lets the weights be changed: no batch in flight needs them here."""
        for line in self._lines:
            line.updates.before(line.parameters)

    def stepped(self) -> None:
        """Says that the optimizer has used the gradients there were."""
        for line in self._lines:
            line.pending = False
            line.updates.after(self._drained)
        self._drained = False

    def skip(self) -> None:
        """Says that no backward will follow the last forward: here it has left nothing behind."""

    def announce(self, notice: Any) -> None:
        """Tells the other stages, of which there is none in another process."""

    def ask(self, names: list[str]) -> None:
        """Asks rank 0 for a decision, which is this one."""

    def asked(self) -> list[str]:
        """What other ranks have asked for: there are none."""
        return []

    def clear(self) -> None:
        """Forgets all waiting gradients."""
        for line in self._lines:
            line.pending = False
            line.queue.clear()
            line.updates.forget()
        self._predicted = []

    def _predict(self) -> list[tuple[Slot, Tensor]]:
        """Where parameters are, and what is expected of them; gradients by that go to the parameters."""
        if not self._slots:
            return []
        parameters = {parameter: line for line in self._lines for parameter in line.parameters}
        ahead = {parameter: line.updates.ahead(parameter) for parameter, line in parameters.items()}
        moved = {parameter: parameter + by for parameter, by in ahead.items() if by is not None}
        held = [(slot, slot[0][slot[1]]) for slot in self._slots]
        return [(slot, moved[parameter]) for slot, parameter in held if parameter in moved]

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for stage, segment in enumerate(self._segments, start=1):
            with self._seeded(stage):
                args, kwargs = (segment(*args, **kwargs),), {}
        return args[0]


class _Line:
    def __init__(self, parameters: list[nn.Parameter], delay: int, rule: Staleness) -> None:
        self.parameters = parameters
        self.delay = delay
        self.updates = Updates(rule, delay)
        self.queue: deque[Gradients] = deque()
        self.pending = False

    def apply_oldest(self) -> None:
        for parameter, grad in zip(self.parameters, self.queue.popleft(), strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        self.pending = True


def _take(parameters: Sequence[nn.Parameter]) -> Gradients:
    grads = [parameter.grad for parameter in parameters]
    _put(parameters, [None] * len(grads))
    return grads


def _put(parameters: Sequence[nn.Parameter], grads: Gradients) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
