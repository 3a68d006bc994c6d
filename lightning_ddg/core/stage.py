"""One stage of a pipeline: forward of batch t, backward of batch t - d, and the weights stashed in between.

This is the arithmetic of one process and one stage; what it receives and sends passes through
:mod:`~lightning_ddg.comm.mailbox`, and when it is called is decided in :mod:`~lightning_ddg.plugin.strategy`.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_ddg.core.tensors import Slot, carries_grad, map_tensors, parameters_replaced, slots_of, tensors_of

_CHANGED = (
    "Weights were changed between a forward and the optimizer's step, but batches in flight need them as they were."
    " Change weights in `on_before_optimizer_step`, in `on_train_batch_end` or by an optimizer's `step`."
)


class _Inlet(torch.autograd.Function):
    """Gives received tensors a place in the graph: what flows back into it is the gradient to send upstream.

    The tensors come out as non-leaf tensors that are nobody's view, so that a stage may begin with an in-place layer.
    """

    @staticmethod
    def forward(ctx: Any, box: list[Any], anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.box = box
        ctx.mark_dirty(*tensors)
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.box[:] = grads
        return (None, None, *([None] * len(grads)))


class _Alias(torch.autograd.Function):
    """Other tensors on the given memory, whose gradients go to the parameters."""

    @staticmethod
    def forward(ctx: Any, memory: list[Tensor], *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # Not `detach`: that would share the count of changes, and the optimizer's would look like an error to autograd.
        return tuple(tensor.data for tensor in memory)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *grads)


class Weights(NamedTuple):
    """The weights of a forward.

    Attributes:
        slots: Where modules keep the parameters.
        tensors: What stands there while the forward runs.
        parameters: The parameters, each once.
        memory: What it runs on, for other weights to be written to when these are no longer needed.
        versions: How often each had been changed by then.
    """

    slots: list[Slot]
    tensors: list[Tensor]
    parameters: list[nn.Parameter]
    memory: list[Tensor]
    versions: list[int]


class InFlight(NamedTuple):
    """A batch between its forward and its backward.

    Attributes:
        outputs: What the stage returned, as far as it carries gradients.
        input_grads: Where the gradients by what was received will be.
        weights: What the forward ran on; ``None``: the parameters themselves.
    """

    outputs: list[Tensor]
    input_grads: list[Any]
    weights: Weights | None


class Stage:
    """A module whose backward runs ``delay`` batches after its forward, with the weights of that forward.

    A forward runs on tensors that share the parameters' memory, so that gradients arrive in ``p.grad``. Before the
    optimizer steps, :meth:`stash` leaves that memory to the batches in flight and gives the parameters a copy of it, so
    that no update, in place or fused, can touch what a backward needs. With ``d`` batches in flight there are ``d + 1``
    sets of weights, the current one included; their memory is used again in turn. Nothing is copied where the delay
    is 0.

    Args:
        module: The layers of this stage, called with what the previous stage returned.
        delay: Batches between a forward and its backward, ``K - k``.
    """

    def __init__(self, module: nn.Module, delay: int) -> None:
        self.module = module
        self.delay = delay
        self._in_flight: deque[InFlight] = deque()
        self._slots = slots_of(module) if delay else []
        self._weights: Weights | None = None
        self._spare: list[Weights] = []

    def __len__(self) -> int:
        return len(self._in_flight)

    def forward(self, *args: Any, received: bool, **kwargs: Any) -> Any:
        """Runs the stage on one batch and keeps what its backward will need.

        Args:
            *args: The network's arguments in the first stage; the previous stage's output, alone, in all others.
            received: Whether the arguments were received, so that gradients by them are wanted.
            **kwargs: The network's keyword arguments (first stage only).

        Returns:
            The stage's output, attached to its graph.

        Raises:
            RuntimeError: If weights were changed since the last forward without :meth:`stash`.
        """
        output, batch = self._run(args, kwargs, received, self._current() if self.delay else None)
        self._in_flight.append(batch)
        return output

    def backward(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Runs the backward of the oldest batch in flight, adding to ``p.grad``.

        Args:
            grads: The gradient by each output tensor that carries one, ``None`` where nothing depends on it.

        Returns:
            The gradient by each received tensor that carries one.
        """
        batch = self._in_flight.popleft()
        pairs = [(o, g) for o, g in zip(batch.outputs, grads, strict=True) if g is not None]
        if pairs:
            outputs, given = zip(*pairs, strict=True)
            # Activation checkpointing runs the forward again here, and must find the weights of that forward.
            with in_place_of_parameters(batch.weights):
                torch.autograd.backward(outputs, given)
        self._reuse(batch.weights)
        return batch.input_grads

    def backward_done(self) -> list[Tensor | None]:
        """Drops the oldest batch, whose backward ran as part of the loss's, and returns the gradients by its inputs."""
        return self._in_flight.popleft().input_grads

    def stash(self) -> None:
        """Lets the weights be changed: batches in flight keep those they have. Call it before every step.

        Raises:
            RuntimeError: If weights have been changed already.
        """
        weights, self._weights = self._weights, None
        if weights is None or not weights.parameters:
            return
        _check_unchanged(weights)
        fresh = self._memory_for(weights.parameters)
        torch._foreach_copy_(fresh, weights.memory)
        for parameter, data in zip(weights.parameters, fresh, strict=True):
            parameter.data = data

    def begin(self, step: int) -> None:
        """Says that a run begins, with the optimizer step of that number."""

    def stepped(self, drained: bool = False) -> None:
        """Makes sure, after a step, that :meth:`stash` came before it.

        Args:
            drained: Whether the step's gradient was drained.

        Raises:
            RuntimeError: If it did not.
        """
        if self._weights is not None and self._weights.parameters:
            raise RuntimeError(_CHANGED)

    def oldest_weights(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The trained parameters, each with its value in the forward of the oldest batch in flight.

        Empty where nothing is stashed: in the last stage, or with no batch in flight.
        """
        weights = self._in_flight[0].weights if self._in_flight else None
        return [] if weights is None else list(zip(weights.parameters, weights.memory, strict=True))

    def skip(self) -> None:
        """Forgets the newest batch in flight."""
        self._in_flight.pop()

    def clear(self) -> None:
        """Forgets all batches in flight."""
        self._in_flight.clear()
        self._spare.clear()
        self._weights = None

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], received: bool, weights: Weights | None
    ) -> tuple[Any, InFlight]:
        input_grads: list[Any] = []
        if received:
            args = (_enter(args[0], input_grads),)
        with in_place_of_parameters(weights):
            output = self.module(*args, **kwargs)
        outputs = [tensor for tensor in tensors_of(output) if carries_grad(tensor)]
        return output, InFlight(outputs, input_grads, weights)

    def _current(self) -> Weights:
        if self._weights is not None:
            _check_unchanged(self._weights)
            return self._weights
        held = [(slot, slot[0][slot[1]]) for slot in self._slots]
        trained = [(slot, parameter) for slot, parameter in held if parameter is not None and parameter.requires_grad]
        unique = {id(parameter): parameter for _, parameter in trained}
        parameters = list(unique.values())
        memory = self._memory_of(parameters)
        given = cast(tuple[Tensor, ...], _Alias.apply(memory, *parameters) if parameters else ())
        aliases = dict(zip(unique, given, strict=True))
        self._weights = Weights(
            [slot for slot, _ in trained],
            [aliases[id(parameter)] for _, parameter in trained],
            parameters,
            memory,
            [parameter._version for parameter in parameters],
        )
        return self._weights

    def _memory_of(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """What a forward runs on."""
        return [parameter.data for parameter in parameters]

    def _memory_for(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Memory of the parameters' sizes that no batch in flight needs."""
        while self._spare:
            spare = self._spare.pop()
            if len(spare.parameters) == len(parameters) and all(map(is_, spare.parameters, parameters)):
                return spare.memory
        # A validation may run in inference mode, whose tensors no optimizer could write to afterwards.
        with torch.inference_mode(False):
            return [torch.empty_like(parameter.data) for parameter in parameters]

    def _reuse(self, weights: Weights | None) -> None:
        """Keeps the memory of weights that no batch in flight needs any more."""
        used = (self._weights, *(batch.weights for batch in self._in_flight))
        if weights is not None and all(other is not weights for other in used):
            self._spare.append(weights)


def _check_unchanged(weights: Weights) -> None:
    if weights.versions != [parameter._version for parameter in weights.parameters]:
        raise RuntimeError(_CHANGED)


def in_place_of_parameters(weights: Weights | None) -> AbstractContextManager[None]:
    return nullcontext() if weights is None else parameters_replaced(zip(weights.slots, weights.tensors, strict=True))


def _enter(value: Any, box: list[Any]) -> Any:
    tensors = [tensor for tensor in tensors_of(value) if carries_grad(tensor)]
    if not tensors:
        return value
    box[:] = [None] * len(tensors)
    anchor = torch.zeros((), requires_grad=True, device=tensors[0].device)
    plain = [tensor.requires_grad_(False) for tensor in tensors]
    entered = dict(zip(map(id, plain), _Inlet.apply(box, anchor, *plain), strict=True))
    return map_tensors(lambda tensor: entered.get(id(tensor), tensor), value)
