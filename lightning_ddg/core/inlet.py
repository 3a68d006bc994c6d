"""Where received tensors enter a stage's graph, and where the gradients w.r.t. them come out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ddg.core.pytree import map_tensors, tensors_of
from lightning_ddg.core.tensors import carries_grad


class Inlet:
    """The input side of a stage, for one batch.

    The tensors that enter come out as non-leaf tensors that are nobody's view, so that a stage may begin with an
    in-place layer. What flows back into them is kept here.

    Attributes:
        grads: After the backward: the gradient w.r.t. each received tensor that carries one, ``None`` where nothing
            depends on it. Where the user's code runs the backward of the loss in several passes, their sum.
    """

    def __init__(self) -> None:
        self.grads: list[Tensor | None] = []

    def enter(self, value: Any) -> Any:
        """Return a received pytree as part of a graph that ends here."""
        tensors = [tensor for tensor in tensors_of(value) if carries_grad(tensor)]
        if not tensors:
            return value
        self.grads = [None] * len(tensors)
        anchor = torch.zeros((), requires_grad=True, device=tensors[0].device)
        plain = [tensor.requires_grad_(False) for tensor in tensors]
        entered = dict(zip(map(id, plain), _Enter.apply(self, anchor, *plain), strict=True))
        return map_tensors(lambda tensor: entered.get(id(tensor), tensor), value)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inlet: Inlet, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.inlet = inlet
        ctx.mark_dirty(*tensors)
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        pairs = zip(ctx.inlet.grads, grads, strict=True)
        ctx.inlet.grads = [new if old is None else old if new is None else old + new for old, new in pairs]
        return (None, None, *([None] * len(grads)))
