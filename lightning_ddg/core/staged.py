"""All stages in one process with their graphs in flight: K pipelines, and queues in the place of the messages.

For rules under which a backward uses other weights than its forward, so that its gradient cannot be computed before it
is due, as :mod:`~lightning_ddg.core.delay_line` does. It gives the weights of K processes, at their cost in memory.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_ddg.core.delay_line import run_in_turn
from lightning_ddg.core.execution import Channel, Execution, Mailbox, Observers, Sent
from lightning_ddg.core.extrapolation import Outlook
from lightning_ddg.core.pipeline import Pipeline
from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.schedule import delay, rank_of_stage
from lightning_ddg.core.stage import Stage
from lightning_ddg.core.staleness import Staleness
from lightning_ddg.core.tensors import carries_grad

_Queues = defaultdict[tuple[int, int, Channel], deque[Any]]


class LocalMailbox(Mailbox):
    """One rank's end of queues within a process, which all ranks share: by source, destination and channel."""

    def __init__(self, rank: int, size: int, queues: _Queues) -> None:
        self.rank, self.size, self._queues = rank, size, queues

    def send(self, to: int | Iterable[int], channel: Channel, value: Any, *, snapshot: bool = False) -> None:
        for rank in (to,) if isinstance(to, int) else to:
            self._queues[self.rank, rank, channel].append(map_tensors(_sent, value))

    def take(self, source: int, channel: Channel) -> Any:
        return self._queues[source, self.rank, channel].popleft()

    def has(self, source: int, channel: Channel) -> bool:
        return bool(self._queues[source, self.rank, channel])


class Staged(Execution):
    """The stages of a network, one batch after the other.

    At batch t every stage runs its forward of t, then its backward of ``t - d(k)`` with the gradient that the stage
    after it has made one batch earlier, or 1 + s batches with a slack s; then one optimizer steps for all.

    Args:
        segments: The stages' modules, input side first.
        rule: Which weights a backward uses, and how updates are applied.
        recompute: Whether activations are computed again in the backward.
        observers: Look on.
        outlook: What is known of the optimizer's steps, for rules that ask for that.
        slack: ``s`` of the stages' delays.
    """

    def __init__(
        self,
        segments: Sequence[nn.Module],
        rule: Staleness,
        recompute: bool,
        observers: Observers | None = None,
        outlook: Outlook | None = None,
        slack: int = 0,
    ) -> None:
        count = len(segments)
        self.stages = range(1, count + 1)
        self._segments = list(segments)
        self._observers = observers or Observers()
        queues: _Queues = defaultdict(deque)
        self._pipelines = []
        for number, segment in zip(self.stages, segments, strict=True):
            stage = Stage(segment, delay(number, count, slack), rule, recompute, outlook)
            mailbox = LocalMailbox(rank_of_stage(number, count), count, queues)
            self._pipelines.append(Pipeline(stage, number, count, mailbox, rule.shrink))

    def begin(self, step: int) -> None:
        self.synchronous = False
        for pipeline in self._pipelines:
            pipeline.begin(step)

    def synchronize(self) -> None:
        self.synchronous = True
        for pipeline in self._pipelines:
            pipeline.synchronize()

    def train(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._observers.before_forward(1)
        output: Any = Sent(None)
        for pipeline in self._pipelines:
            output = pipeline.train(batch, args, kwargs)
        self._observers.after_forward(1)
        return output

    def pass_over(self, batch: Batch) -> None:
        for pipeline in self._pipelines:
            pipeline.pass_over(batch)

    def evaluate(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return run_in_turn(self._segments, batch, args, kwargs)

    def backward(self, loss: Callable[[], object] | None) -> None:
        for pipeline in self._pipelines:
            self._observers.in_flight(pipeline.number, pipeline.stage)
        self._observers.before_backward(1)
        for pipeline in self._pipelines:
            pipeline.backward(loss)
        self._observers.after_backward(1)

    def before_step(self) -> None:
        for pipeline in self._pipelines:
            pipeline.before_step()

    def after_step(self) -> None:
        for pipeline in self._pipelines:
            pipeline.after_step()

    def drain(self) -> bool:
        self._observers.before_drain()
        if not self.waiting:
            return False
        # From the output side, so that after few batches no stage waits a round for the gradient that it lacks.
        for pipeline in reversed(self._pipelines):
            if not pipeline.drain():
                pipeline.rest()
        return True

    @property
    def waiting(self) -> bool:
        return any(pipeline.waiting for pipeline in self._pipelines)

    def skip(self) -> None:
        for pipeline in self._pipelines:
            pipeline.skip()

    def clear(self) -> None:
        for pipeline in reversed(self._pipelines):
            pipeline.clear()


def _sent(tensor: Tensor) -> Tensor:
    # As a message would bring it: with memory and a graph of its own.
    return tensor.detach().clone().requires_grad_(carries_grad(tensor))
