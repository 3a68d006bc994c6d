"""The weight versions of a stage: what its forwards run on while the optimizer goes on changing the parameters.

A batch's backward, d steps after its forward, needs the weights of that forward. So a forward runs on tensors that
share the parameters' memory, and before a step that memory is left to the batches in flight: the parameters move on to
a copy. With d = 2 there are three memories, used in turn (``*``: where the parameters are; ``|``: a step)::

    iteration           0          1          2          3          4
    forward, backward   F0         F1         F2  B0     F3  B1     F4  B2
    memory A            w0*  |     w0         w0  free | w3*        w3
    memory B                 | w1*      |     w1         w1  free | w4*
    memory C                            | w2*          | w2         w2  free

F0 and B0 both see w0, and w2 is stepped with the gradient of batch 0. Nothing is copied for a batch, one copy is made
for a step, and no update, in place or fused, can touch what a backward needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_ddg.core.extrapolation import Outlook
from lightning_ddg.core.staleness import Staleness, Updates
from lightning_ddg.core.tensors import Slot, parameters_replaced, slots_of

_CHANGED = (
    "Weights were changed between a forward and the optimizer's step, but batches in flight need them as they were."
    " Change weights in `on_before_optimizer_step`, in `on_train_batch_end` or by an optimizer's `step`."
)


class Weights(NamedTuple):
    """The weights of a forward.

    Attributes:
        slots: Where modules keep the parameters.
        tensors: What stands there while the forward runs.
        parameters: The trained parameters, each once.
        memory: What the forward runs on, of the parameters' shapes.
        versions: Each parameter's version counter by then.
        addresses: Of each parameter's memory by then.
    """

    slots: list[Slot]
    tensors: list[Tensor]
    parameters: list[nn.Parameter]
    memory: list[Tensor]
    versions: list[int]
    addresses: list[int]

    def in_place(self) -> AbstractContextManager[None]:
        """Put these weights where the modules look for their parameters."""
        return parameters_replaced(zip(self.slots, self.tensors, strict=True))


class Stash:
    """Keeps ``d + 1`` versions of a stage's weights, the current one included: the paper's algorithm."""

    #: Whether the weights of a batch in flight are those that the parameters had then.
    exact = True

    def __init__(self, module: nn.Module, delay: int, rule: Staleness, outlook: Outlook | None = None) -> None:
        self._slots = slots_of(module)
        self._updates = Updates(rule, delay, outlook)
        self._waiting = 0
        self._current: Weights | None = None
        self._spare: list[Weights] = []

    def begin(self, step: int) -> None:
        """Called when a run begins, with the number of its first optimizer step."""
        self._updates.begin(step)

    def for_forward(self, waiting: int = 0) -> Weights:
        """Return what the next forward runs on; ``waiting`` is the number of batches in flight before it.

        Raises:
            RuntimeError: If weights have been changed since the last forward without :meth:`before_step`.
        """
        self._updates.count_batch()
        self._waiting = waiting
        if self._current is None:
            self._current = self._version()
        else:
            _check_unchanged(self._current)
        return self._current

    def pass_over(self) -> None:
        """Called in place of :meth:`for_forward` for a batch that has no forward."""
        self._updates.count_batch()

    def before_backward(self) -> None:
        """Called before a backward."""

    def before_step(self) -> None:
        """Let the weights be changed: batches in flight keep those they have.

        Raises:
            RuntimeError: If weights have been changed already.
        """
        weights, self._current = self._current, None
        if weights is None:
            # No forward has come since the last step: a gradient is drained.
            self._updates.before(self._parameters())
            return
        _check_unchanged(weights)
        if weights.parameters:
            fresh = self._unused_memory(weights.parameters)
            torch._foreach_copy_(fresh, weights.memory)
            for parameter, data in zip(weights.parameters, fresh, strict=True):
                parameter.data = data
        # Nobody writes to the old memory before the backward that it is kept for, and so not before the step's end.
        self._updates.before(weights.parameters, weights.memory)

    def after_step(self, drained: bool) -> None:
        """Apply the rule to a step; ``drained`` says whether its gradient was drained.

        Raises:
            RuntimeError: If :meth:`before_step` did not come before it.
        """
        if self._current is not None and self._current.parameters:
            raise RuntimeError(_CHANGED)
        self._updates.after(drained)

    def release(self, weights: Weights, in_flight: Iterable[Weights | None]) -> None:
        """Use the memory of weights again, unless the next forward or a batch in flight needs them."""
        if all(other is not weights for other in (self._current, *in_flight)):
            self._spare.append(weights)

    def unfrozen_since(self, weights: Weights) -> list[tuple[Slot, Tensor]]:
        """Return the parameters that a forward did not train and that would be trained if it were run now."""
        then = set(map(id, weights.parameters))
        return [(slot, p.detach()) for slot, p in self._trained() if id(p) not in then]

    def clear(self) -> None:
        """Forget all versions but the parameters' own."""
        self._spare.clear()
        self._current = None
        self._updates.forget()

    def _trained(self) -> list[tuple[Slot, nn.Parameter]]:
        held = [(slot, slot[0][slot[1]]) for slot in self._slots]
        return [(slot, parameter) for slot, parameter in held if parameter is not None and parameter.requires_grad]

    def _parameters(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(parameter for _, parameter in self._trained()))

    def _version(self) -> Weights:
        trained, parameters = self._trained(), self._parameters()
        memory = self._memory(parameters)
        given = cast(tuple[Tensor, ...], _Alias.apply(memory, *parameters) if parameters else ())
        aliases = dict(zip(parameters, given, strict=True))
        return Weights(
            [slot for slot, _ in trained],
            [aliases[parameter] for _, parameter in trained],
            parameters,
            memory,
            [parameter._version for parameter in parameters],
            [parameter.data_ptr() for parameter in parameters],
        )

    def _memory(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        return [parameter.data for parameter in parameters]

    def _unused_memory(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        while self._spare:
            spare = self._spare.pop()
            if len(spare.parameters) == len(parameters) and all(map(is_, spare.parameters, parameters)):
                return spare.memory
        # A validation may run in inference mode, whose tensors no optimizer could write to afterwards.
        with torch.inference_mode(False):
            return [torch.empty_like(parameter.data) for parameter in parameters]


class LiveWeights(Stash):
    """``stash=False``: batches in flight see the optimizer's updates, as all share one memory with the parameters."""

    exact = False

    def __init__(self, module: nn.Module, delay: int, rule: Staleness, outlook: Outlook | None = None) -> None:
        super().__init__(module, delay, rule, outlook)
        self._shared: dict[nn.Parameter, Tensor] = {}

    def for_forward(self, waiting: int = 0) -> Weights:
        # A graph of its own for each batch, whatever has happened to the weights since.
        self._current = None
        return super().for_forward(waiting)

    def before_backward(self) -> None:
        for parameter in self._shared:
            self._shared_memory(parameter)

    def before_step(self) -> None:
        self._current = None
        self._updates.before(self._parameters())

    def after_step(self, drained: bool) -> None:
        self._updates.after(drained)

    def release(self, weights: Weights, in_flight: Iterable[Weights | None]) -> None:
        pass

    def _memory(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        return [self._shared_memory(parameter) for parameter in parameters]

    def _shared_memory(self, parameter: nn.Parameter) -> Tensor:
        memory = self._shared.setdefault(parameter, parameter.data)
        if parameter.data_ptr() != memory.data_ptr():
            # Whoever replaces a parameter's memory, as some optimizers do, would keep batches in flight from seeing it.
            memory.copy_(parameter.data)
            parameter.data = memory
        return memory


class ExtrapolatedWeights(Stash):
    """``extrapolate=True``: forwards run, in memory of their own, on the weights expected at their backward."""

    exact = False

    def before_step(self) -> None:
        self._current = None
        self._updates.before(self._parameters())

    def _memory(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        memory, moves = self._unused_memory(parameters), self._updates.ahead(parameters, self._waiting)
        for extrapolated, parameter in zip(memory, parameters, strict=True):
            by = moves.get(parameter)
            extrapolated.copy_(parameter.data if by is None else parameter.data + by)
        return memory


def make_stash(module: nn.Module, delay: int, rule: Staleness, outlook: Outlook | None = None) -> Stash:
    """Return the weight versions that a rule asks for."""
    kind = ExtrapolatedWeights if rule.extrapolate else Stash if rule.stash else LiveWeights
    return kind(module, delay, rule, outlook)


class _Alias(torch.autograd.Function):
    """Other tensors on the given memory, whose gradients go to the parameters."""

    @staticmethod
    def forward(ctx: Any, memory: list[Tensor], *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # Not `detach`: that would share the version counter, and the optimizer's writes would look like an error.
        return tuple(tensor.data for tensor in memory)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *grads)


def _check_unchanged(weights: Weights) -> None:
    if weights.versions != [parameter._version for parameter in weights.parameters]:
        raise RuntimeError(_CHANGED)
    for parameter, memory, address in zip(weights.parameters, weights.memory, weights.addresses, strict=True):
        # By `parameter.data = ...`, of which no version counter knows; the same values do no harm.
        if parameter.data_ptr() != address and not torch.equal(parameter, memory):
            raise RuntimeError(_CHANGED)
