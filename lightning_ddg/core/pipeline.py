"""One stage among K processes: the stage, its two neighbours, and what passes between them.

At iteration t, stage k waits for two messages and for nothing else::

    stage k - 1  -- activation of t -->   stage k   -- activation of t -->   stage k + 1
                 <-- gradient of t - d --           <-- gradient of t - d --

Keep it so: a stage that waited for anything more would wait for backpropagation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_ddg.core.evaluator import Evaluator
from lightning_ddg.core.execution import ACTIVATION, GRADIENT, Execution, Mailbox, Nothing, Observers, Sent
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.schedule import rank_of_stage
from lightning_ddg.core.stage import Stage
from lightning_ddg.core.staleness import shrunk
from lightning_ddg.core.ties import Tie, Ties


class Pipeline(Execution):
    """The execution of stage ``number`` among ``num_stages`` ranks.

    Gradients are multiplied by ``shrink`` when they are sent upstream; ``ties`` are parameters that stages share;
    ``evaluator`` evaluates, by default whole batches.
    """

    def __init__(
        self,
        stage: Stage,
        number: int,
        num_stages: int,
        mailbox: Mailbox,
        shrink: float = 1.0,
        observers: Observers | None = None,
        ties: Sequence[Tie] = (),
        evaluator: Evaluator | None = None,
    ) -> None:
        self.stage = stage
        self.number = number
        self.stages = (number,)
        self._mailbox = mailbox
        self._shrink = shrink
        self._observers = observers or Observers()
        self._ties = Ties(ties, number, num_stages, mailbox, shrink)
        self._upstream = None if number == 1 else rank_of_stage(number - 1, num_stages)
        self._downstream = None if number == num_stages else rank_of_stage(number + 1, num_stages)
        self._evaluator = evaluator or Evaluator(stage.module, number, num_stages, mailbox)
        # Since the last step: whether a gradient has been added to p.grad, and whether one has been drained.
        self._pending = self._drained = False

    def begin(self, step: int) -> None:
        self._drained = self.synchronous = False
        self._ties.shrink = self._shrink
        self.stage.begin(step)

    def synchronize(self) -> None:
        self._clear_gradients()
        self.synchronous = True
        self._ties.shrink = 1.0
        self.stage.synchronize()

    def train(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._ties.refresh()
        args, kwargs = self._received(args, kwargs)
        if self._upstream is not None and args[0] is Nothing.NOTHING:
            return self._forward_nothing()
        self._observers.before_forward(self.number)
        with batch.draws(self.number):
            output = self.stage.forward(*args, received=self._upstream is not None, **kwargs)
        self._observers.after_forward(self.number)
        if self._downstream is None:
            return output
        self._mailbox.send(self._downstream, ACTIVATION, output)
        return Sent(output)

    def pass_over(self, batch: Batch) -> None:
        if self._upstream is None:
            self._ties.refresh()
            self._forward_nothing()
        else:
            self.train(batch, (), {})

    def _forward_nothing(self) -> Sent:
        self.stage.pass_over()
        if self._downstream is not None:
            self._mailbox.send(self._downstream, ACTIVATION, Nothing.NOTHING)
        return Sent(Nothing.NOTHING)

    def evaluate(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._ties.refresh()
        return self._evaluator.evaluate(batch, args, kwargs)

    def backward(self, loss: Callable[[], object] | None) -> None:
        self._observers.in_flight(self.number, self.stage)
        if self._downstream is None:
            if loss is not None:
                self._observers.before_backward(self.number)
                self._ties.backward(loss)
                self._observers.after_backward(self.number)
                self._pending = True
            else:
                self._ties.nothing()
            self._send(self.stage.backward_done())
        elif len(self.stage) > self.stage.lag:
            self._backward_of_oldest(self._downstream)
        else:
            self._clear_gradients()

    def before_step(self) -> None:
        self.stage.before_step()
        self._ties.before_step()

    def after_step(self) -> None:
        self.stage.after_step(self._drained)
        self._pending = self._drained = False

    def drain(self) -> bool:
        self._observers.before_drain()
        if self._downstream is None or not len(self.stage):
            return False
        self._drained = True
        self._backward_of_oldest(self._downstream)
        return True

    def rest(self) -> None:
        """Called instead of :meth:`drain` where this stage has nothing left, but others stepped with it have."""
        self._drained = True
        self._clear_gradients()

    @property
    def waiting(self) -> bool:
        return len(self.stage) > 0

    def skip(self) -> None:
        self.stage.skip()

    def clear(self) -> None:
        self._pending = False
        # So that nobody finds the gradients of these batches later.
        for _ in range(len(self.stage)):
            if self._downstream is not None:
                self._mailbox.take(self._downstream, GRADIENT)
            self._send([])
            self._ties.discard()
        self.stage.clear()

    def _received(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args, kwargs) if self._upstream is None else ((self._mailbox.take(self._upstream, ACTIVATION),), {})

    def _backward_of_oldest(self, downstream: int) -> None:
        grads = self._mailbox.take(downstream, GRADIENT)
        self._observers.before_backward(self.number)
        received: list[Tensor | None] = []
        self._ties.backward(lambda: received.extend(self.stage.backward(grads)))
        self._observers.after_backward(self.number)
        self._pending = True
        self._send(received)

    def _send(self, grads: list[Tensor | None]) -> None:
        if self._upstream is not None:
            factor = 1.0 if self.synchronous else self._shrink
            self._mailbox.send(self._upstream, GRADIENT, shrunk(grads, factor))

    def _clear_gradients(self) -> None:
        if not self._pending and not self.synchronous:
            for parameter in self.stage.parameters:
                parameter.grad = None
