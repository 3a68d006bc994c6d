"""All stages in one process, each with its own stale graphs: for rules under which a backward uses today's weights.

Such a gradient is that of no single set of weights, so it cannot be computed before it is due, as
:mod:`~lightning_ddg.core.delay_line` does. This execution has the methods of the other two and gives the weights of K
processes, at their cost in memory, all of it on one device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lightning_ddg.core.stale_stage import make_stage
from lightning_ddg.core.staleness import Staleness, shrunk
from lightning_ddg.core.tensors import carries_grad, map_tensors

Seeded = Callable[[int], AbstractContextManager[None]]


class Lockstep:
    """The stages of a network, one batch after the other.

    At batch ``t`` every stage runs its forward of ``t``, then its backward of ``t - d(k)`` with the gradient that the
    stage after it has made one batch earlier; then one optimizer steps for all.

    Args:
        segments: The stages, input side first; stage ``k`` of ``K`` has the delay ``K - k``.
        seeded: ``seeded(k)`` seeds the random draws of stage ``k`` for the current batch.
        rule: What a stage does with its gradients.
        recompute: Whether activations are computed again in the backward.
    """

    def __init__(self, segments: Sequence[nn.Module], seeded: Seeded, rule: Staleness, recompute: bool) -> None:
        count = len(segments)
        self.stages = [make_stage(part, count - number, rule, recompute) for number, part in enumerate(segments, 1)]
        self.notices: list[Any] = []
        self._seeded = seeded
        self._shrink = rule.shrink
        # By stage: the gradients by its outputs that have not been used yet. The last one's come from the loss.
        self._given: list[deque[list[Tensor | None]]] = [deque() for _ in segments]
        self._pending = [False] * count
        self._drained = False

    def train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward of the next training batch; returns the network's output."""
        value: Any = None
        for number, stage in enumerate(self.stages, 1):
            with self._seeded(number):
                value = stage.forward(*args, received=number > 1, **kwargs)
            if number < len(self.stages):
                args, kwargs = (map_tensors(_sent, value),), {}
        return value

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward in evaluation; returns the network's output."""
        for number, stage in enumerate(self.stages, 1):
            with self._seeded(number):
                args, kwargs = (stage.module(*args, **kwargs),), {}
        return args[0]

    def backward(self, run: Callable[[], object]) -> None:
        """Runs the backward of each stage that is due, adding to what its gradients have accumulated.

        A stage to which nothing is due and nothing was added since the last step has ``p.grad = None``, so that its
        optimizer leaves it alone.

        Args:
            run: Runs the backward of the loss, which ends at the last stage's inputs.
        """
        *delayed, last = self.stages
        for index, stage in enumerate(delayed):
            if len(stage) > stage.delay:
                self._backward_of_oldest(index)
            elif not self._pending[index]:
                self._clear_gradients(index)
        run()
        self._pass_on(len(delayed), last.backward_done())

    def drain(self) -> bool:
        """Runs the backward of the oldest batch of every stage that has one in flight; whether any had."""
        waiting = self.waiting
        self._drained |= waiting
        # Input side last, so that after few batches a stage need not wait a round for the gradient that it lacks.
        for index in reversed(range(len(self.stages))):
            if self._given[index]:
                self._backward_of_oldest(index)
            elif not self._pending[index]:
                self._clear_gradients(index)
        return waiting

    @property
    def waiting(self) -> bool:
        """Whether any batch's gradient has not been applied yet."""
        return any(len(stage) for stage in self.stages)

    def begin(self, step: int) -> None:
        """Says that a run begins, with the optimizer step of that number."""
        self._drained = False
        for stage in self.stages:
            stage.begin(step)

    def before_step(self) -> None:
        """Lets the weights be changed."""
        for stage in self.stages:
            stage.stash()

    def stepped(self) -> None:
        """Says that the optimizer has changed the weights."""
        for stage in self.stages:
            stage.stepped(self._drained)
        self._drained = False
        self._pending = [False] * len(self.stages)

    def skip(self) -> None:
        """Forgets the batch just trained, of which no backward will follow."""
        for stage in self.stages:
            stage.skip()

    def announce(self, notice: Any) -> None:
        """Tells the other stages, of which there is none in another process."""

    def ask(self, names: list[str]) -> None:
        """Asks rank 0 for a decision, which is this one."""

    def asked(self) -> list[str]:
        """What other ranks have asked for: there are none."""
        return []

    def clear(self) -> None:
        """Forgets the batches in flight."""
        self._pending = [False] * len(self.stages)
        for stage, given in zip(self.stages, self._given, strict=True):
            stage.clear()
            given.clear()

    def _backward_of_oldest(self, index: int) -> None:
        self._pending[index] = True
        self._pass_on(index, self.stages[index].backward(self._given[index].popleft()))

    def _pass_on(self, index: int, grads: list[Tensor | None]) -> None:
        if index:
            self._given[index - 1].append(shrunk(grads, self._shrink))

    def _clear_gradients(self, index: int) -> None:
        for parameter in self.stages[index].module.parameters():
            parameter.grad = None


def _sent(tensor: Tensor) -> Tensor:
    """As a message would bring it: with memory of its own and a graph of its own."""
    return tensor.detach().clone().requires_grad_(carries_grad(tensor))
