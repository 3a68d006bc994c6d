"""When two gradients are the same but for rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """How far two computations of the same gradient may lie apart.

    Attributes:
        relative: To the largest gradient in the same tensor.
        floor: Relative to the largest of all: the gradient of a bias before a normalisation, say, is nothing but the
            rounding error of a sum that is 0.
        strict: Whether a gradient of exactly 0, or none, stands for one that is not, never for rounding.
    """

    relative: float
    floor: float
    strict: bool = True


#: By what numbers are computed in. The same operations in the same order give the same bits; this leaves room for
#: another order of summation, and is far below what a lost or doubled part of a gradient makes.
_ROUNDING = {
    torch.float64: Rounding(1e-9, 1e-14),
    torch.float32: Rounding(1e-4, 4e-6),
    torch.float16: Rounding(1e-2, 2e-3),
    torch.bfloat16: Rounding(5e-2, 8e-3),
}


def rounding_of(dtype: torch.dtype, *, reordered: bool = False) -> Rounding:
    """Return what to allow for numbers of a type.

    Args:
        dtype: The type that the gradients are computed in.
        reordered: Whether the two computations use other kernels: compiled, or on another kind of device.
    """
    allowed = _ROUNDING.get(dtype, _ROUNDING[torch.float32])
    return Rounding(min(10 * allowed.relative, 0.2), allowed.floor, strict=False) if reordered else allowed


def difference(got: Tensor | None, wanted: Tensor | None, rounding: Rounding, scale: float) -> str | None:
    """Say how a gradient differs from what it should be, by more than rounding; ``None`` if it does not.

    Args:
        got: What was added to ``p.grad``; ``None`` is as good as 0.
        wanted: What plain backpropagation gives.
        rounding: What is allowed.
        scale: The largest gradient of all parameters.
    """
    size, found = largest(wanted), largest(got)
    floor = rounding.floor * scale
    if (size == 0) != (found == 0):
        if not rounding.strict and max(size, found) <= floor:
            return None
        return f"its gradient is {_up_to(found)} instead of {_up_to(size)}"
    if got is None or wanted is None:
        return None
    got, wanted = _plain(got), _plain(wanted)
    if got.shape != wanted.shape:
        return f"its gradient has the shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    finite = wanted.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return "its gradient is not finite in other places"
    most = float((got - wanted)[finite].abs().max()) if finite.any() else 0.0
    if most <= rounding.relative * size + floor:
        return None
    return f"its gradient is off by up to {most:.3g}, where the largest is {size:.3g}"


def _up_to(size: float) -> str:
    return f"up to {size:.3g}" if size else "0"


def _plain(grad: Tensor) -> Tensor:
    dense = grad.to_dense() if grad.is_sparse else grad
    return dense.float() if dense.dtype in (torch.float16, torch.bfloat16) else dense


def largest(grad: Tensor | None) -> float:
    """Return the largest finite absolute value; infinity if there are others only."""
    if grad is None or not grad.numel():
        return 0.0
    values = _plain(grad).abs()
    finite = values[values.isfinite()]
    return float(finite.max()) if finite.numel() else float("inf")
