"""One stage of a pipeline: forward of batch t, backward of batch t - d, and the weights stashed in between.

This is the arithmetic of one process and one stage; what it receives and sends passes through
:mod:`~lightning_ddg.transport`, and when it is called is decided in :mod:`~lightning_ddg.strategy`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_ddg.messages import map_tensors, tensors_of


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


class _Reparametrized(nn.Module):
    """Runs any function of the module while the module's parameters are replaced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class _InFlight(NamedTuple):
    outputs: list[Tensor]
    input_grads: list[Any]
    weights: dict[str, Tensor]


class Stage:
    """A module whose backward runs ``delay`` batches after its forward, with the weights of that forward.

    The weights are stashed as differentiable clones (``p.clone()``), so that gradients arrive in ``p.grad`` and no
    update, in place or fused, can touch what the backward needs. Nothing is cloned where the delay is 0.

    Args:
        module: The layers of this stage, called with what the previous stage returned.
        delay: Batches between a forward and its backward, ``K - k``.
    """

    def __init__(self, module: nn.Module, delay: int) -> None:
        self.module = module
        self.delay = delay
        self._holder = _Reparametrized(module)
        self._in_flight: deque[_InFlight] = deque()
        self._weights: dict[str, Tensor] | None = None

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
        """
        input_grads: list[Any] = []
        if received:
            args = (_enter(args[0], input_grads),)
        if self.delay == 0:
            weights: dict[str, Tensor] = {}
            output = self.module(*args, **kwargs)
        else:
            weights = self._stashed()
            output = self._with(weights, lambda: self.module(*args, **kwargs))
        outputs = [tensor for tensor in tensors_of(output) if _carries_grad(tensor)]
        self._in_flight.append(_InFlight(outputs, input_grads, weights))
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
            self._with(batch.weights, lambda: torch.autograd.backward(outputs, given))
        return batch.input_grads

    def backward_done(self) -> list[Tensor | None]:
        """Drops the oldest batch, whose backward ran as part of the loss's, and returns the gradients by its inputs."""
        return self._in_flight.popleft().input_grads

    def weights_changed(self) -> None:
        """Says that the next forward must stash the weights anew."""
        self._weights = None

    def skip(self) -> None:
        """Forgets the newest batch in flight."""
        self._in_flight.pop()

    def clear(self) -> None:
        """Forgets all batches in flight."""
        self._in_flight.clear()
        self._weights = None

    def _stashed(self) -> dict[str, Tensor]:
        if self._weights is None:
            self._weights = {
                f"module.{name}": parameter.clone()
                for name, parameter in self.module.named_parameters()
                if parameter.requires_grad
            }
        return self._weights

    def _with(self, weights: dict[str, Tensor], function: Callable[[], Any]) -> Any:
        return functional_call(self._holder, weights, (function,)) if weights else function()


def _carries_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())


def _enter(value: Any, box: list[Any]) -> Any:
    tensors = [tensor for tensor in tensors_of(value) if _carries_grad(tensor)]
    if not tensors:
        return value
    box[:] = [None] * len(tensors)
    anchor = torch.zeros((), requires_grad=True, device=tensors[0].device)
    plain = [tensor.requires_grad_(False) for tensor in tensors]
    entered = dict(zip(map(id, plain), _Inlet.apply(box, anchor, *plain), strict=True))
    return map_tensors(lambda tensor: entered.get(id(tensor), tensor), value)
