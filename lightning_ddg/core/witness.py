"""What an execution really adds to ``p.grad`` for the first batch of a run, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_ddg.core.execution import Execution
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.schedule import delay

Gradients = list[Tensor | None]


class Witness(Execution):
    """Passes everything on to an execution, and tells once of each stage what its first backwards have added.

    The first is the backward of the first batch, ``d(k)`` batches after its forward or in the first drain. No step
    comes before it, so that it is computed on the weights of the first forward whatever the rule. Where a batch is
    split into micro-batches, as many backwards can be watched: they see these weights too if a backward uses the
    weights of its forward.

    Args:
        execution: Trains the stages.
        num_stages: ``K``.
        parameters: Returns the parameters to which the gradients of a stage are added.
        tell: Is told the stage and the gradient w.r.t. each parameter, ``None`` where nothing was added.
        slack: ``s`` of the stages' delays.

    Attributes:
        count: How many backwards of a stage are added up before it is told of; to be set before the first.
    """

    def __init__(
        self,
        execution: Execution,
        num_stages: int,
        parameters: Callable[[int], Sequence[nn.Parameter]],
        tell: Callable[[int, Gradients], None],
        slack: int = 0,
    ) -> None:
        self.stages = execution.stages
        self._execution = execution
        self._delays = {stage: delay(stage, num_stages, slack) for stage in execution.stages}
        self._parameters, self._tell = parameters, tell
        self._batches = 0
        self.count = 1
        self._sums: dict[int, tuple[int, Gradients]] = {}

    def begin(self, step: int) -> None:
        self._execution.begin(step)

    def synchronize(self) -> None:
        self._execution.synchronize()

    @property
    def synchronous(self) -> bool:  # type: ignore[override]
        return self._execution.synchronous

    def train(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._execution.train(batch, args, kwargs)

    def pass_over(self, batch: Batch) -> None:
        self._execution.pass_over(batch)

    def evaluate(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._execution.evaluate(batch, args, kwargs)

    def backward(self, loss: Callable[[], object] | None) -> None:
        due = [stage for stage, late in self._delays.items() if late <= self._batches]
        self._batches += 1
        with self._watching(due):
            self._execution.backward(loss)

    def before_step(self) -> None:
        self._execution.before_step()

    def after_step(self) -> None:
        self._execution.after_step()

    def drain(self) -> bool:
        with self._watching(self._delays if self._batches else ()):
            return self._execution.drain()

    @property
    def waiting(self) -> bool:
        return self._execution.waiting

    def skip(self) -> None:
        self._execution.skip()

    def clear(self) -> None:
        # What was in flight is not added any more.
        self._delays.clear()
        self._execution.clear()

    @contextmanager
    def _watching(self, due: Iterable[int]) -> Iterator[None]:
        before = {stage: [None if p.grad is None else p.grad.clone() for p in self._parameters(stage)] for stage in due}
        yield
        for stage, old in before.items():
            added = [_added(p.grad, o) for p, o in zip(self._parameters(stage), old, strict=True)]
            seen, total = self._sums.pop(stage, (0, [None] * len(added)))
            total = [_sum(one, other) for one, other in zip(total, added, strict=True)]
            if seen + 1 < self.count:
                self._sums[stage] = seen + 1, total
            else:
                del self._delays[stage]
                self._tell(stage, total)


def _added(after: Tensor | None, before: Tensor | None) -> Tensor | None:
    return after if after is None or before is None else after - before


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    # A copy: gradients are added to in place.
    return (None if other is None else other.clone()) if one is None else one if other is None else one + other
