"""A stage under another rule than the paper's, or one that computes its activations again instead of keeping them.

What differs from :class:`~lightning_ddg.core.stage.Stage` is here: which weights a backward uses, what is kept of a
batch in
flight, and what is made of a step. The formulas are in :mod:`~lightning_ddg.core.staleness`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor, nn

from lightning_ddg.core.recompute import BufferCopies, Circumstances
from lightning_ddg.core.stage import InFlight, Stage, Weights
from lightning_ddg.core.staleness import Staleness, Updates
from lightning_ddg.core.tensors import Slot, carries_grad, map_tensors, parameters_replaced


def make_stage(module: nn.Module, delay: int, rule: Staleness, recompute: bool) -> Stage:
    """The stage that carries out a rule; the last one has no delay, and no rule changes it."""
    if delay == 0 or (not recompute and rule == Staleness(shrink=rule.shrink)):
        return Stage(module, delay)
    return StaleStage(module, delay, rule, recompute)


class StaleStage(Stage):
    """A stage with a delay, under a rule.

    With ``rule.stash`` off, forwards run on the parameters' own memory, and the optimizer's updates are seen by the
    backwards of batches in flight. With ``rule.predict``, forwards run on memory of their own: the updates go on in the
    parameters, and a step needs no copy for the batches in flight.

    With ``recompute``, of each batch in flight only the inputs and the weights are kept. The forward is run twice with
    gradients, so that both times the same kernels, or the same compiled code, compute the same numbers; the graph of
    the first is dropped as soon as it is there, so that never more than one batch's activations are.

    Args:
        module: The layers of this stage.
        delay: ``K - k``, at least 1.
        rule: The rule.
        recompute: Whether to compute activations again.
    """

    def __init__(self, module: nn.Module, delay: int, rule: Staleness, recompute: bool = False) -> None:
        super().__init__(module, delay)
        self._rule = rule
        self._updates = Updates(rule, delay)
        self._recompute = recompute
        self._buffers = BufferCopies(module)
        self._kept: deque[tuple[Circumstances, bool]] = deque()
        # Without stashing: the memory that batches in flight and the optimizer share.
        self._shared: dict[nn.Parameter, Tensor] = {}

    def forward(self, *args: Any, received: bool, **kwargs: Any) -> Any:
        self._updates.count_batch()
        if not self._recompute:
            return super().forward(*args, received=received, **kwargs)
        kept = Circumstances(self.module, args, kwargs, self._buffers)
        output = super().forward(*args, received=received, **kwargs)
        self._in_flight[-1] = InFlight([], [], self._in_flight[-1].weights)
        self._kept.append((kept, received))
        return map_tensors(lambda tensor: tensor.detach().requires_grad_(carries_grad(tensor)), output)

    def backward(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        for parameter in self._shared:
            self._shared_memory(parameter)
        if self._recompute:
            kept, received = self._kept.popleft()
            weights = self._in_flight[0].weights
            assert weights is not None
            with kept.again(), parameters_replaced(self._unfrozen_since(weights)):
                _, self._in_flight[0] = self._run(kept.args, kept.kwargs, received, weights)
        return super().backward(grads)

    def stash(self) -> None:
        weights, old = self._weights, None
        if self._rule.stash and not self._rule.predict:
            super().stash()
            # What is stashed stays as it is until the backward that it is kept for, and so beyond this step.
            old = weights
        self._weights = None
        if old is None:
            self._updates.before(list(self.module.parameters()))
        else:
            self._updates.before(old.parameters, old.memory)

    def begin(self, step: int) -> None:
        self._updates.begin(step)

    def stepped(self, drained: bool = False) -> None:
        if self._rule.stash:
            super().stepped(drained)
        self._updates.after(drained)

    def oldest_weights(self) -> list[tuple[nn.Parameter, Tensor]]:
        # Those of the rules are not what the parameters were then.
        return super().oldest_weights() if self._rule.stash and not self._rule.predict else []

    def skip(self) -> None:
        super().skip()
        if self._recompute:
            self._kept.pop()

    def clear(self) -> None:
        super().clear()
        self._kept.clear()
        self._updates.forget()

    def _current(self) -> Weights:
        if not self._rule.stash:
            self._weights = None
        return super()._current()

    def _memory_of(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        if not self._rule.stash:
            return [self._shared_memory(parameter) for parameter in parameters]
        if not self._rule.predict:
            return super()._memory_of(parameters)
        memory = self._memory_for(parameters)
        for predicted, parameter in zip(memory, parameters, strict=True):
            ahead = self._updates.ahead(parameter)
            predicted.copy_(parameter.data if ahead is None else parameter.data + ahead)
        return memory

    def _reuse(self, weights: Weights | None) -> None:
        if self._rule.stash:
            super()._reuse(weights)

    def _shared_memory(self, parameter: nn.Parameter) -> Tensor:
        memory = self._shared.setdefault(parameter, parameter.data)
        if parameter.data_ptr() != memory.data_ptr():
            # Whoever replaces a parameter's memory, as some optimizers do, would keep batches in flight from seeing it.
            memory.copy_(parameter.data)
            parameter.data = memory
        return memory

    def _unfrozen_since(self, weights: Weights) -> list[tuple[Slot, Tensor]]:
        """Parameters that a forward did not train and that would be trained if it were run now."""
        then = {id(parameter) for parameter in weights.parameters}
        held = [(slot, slot[0][slot[1]]) for slot in self._slots]
        return [(slot, p.detach()) for slot, p in held if p is not None and p.requires_grad and id(p) not in then]
