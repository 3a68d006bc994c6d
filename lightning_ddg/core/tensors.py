"""Descriptions of tensors, and the places where modules keep their parameters: one helper for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class TensorSpec(NamedTuple):
    """All that a receiver must know of a tensor before its bytes arrive."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    on_cpu: bool


def carries_grad(tensor: Tensor) -> bool:
    """Return whether a gradient w.r.t. a tensor is wanted and can be had."""
    return tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())


def spec_of(tensor: Tensor) -> TensorSpec:
    """Return the description of a dense tensor: one whose elements fill their memory, in any order."""
    on_cpu = tensor.device.type == "cpu"
    return TensorSpec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, carries_grad(tensor), on_cpu)


def allocate(spec: TensorSpec, device: torch.device | str = "cpu", pin_memory: bool = False) -> Tensor:
    """Return an uninitialised tensor for a description; it is nobody's view, so that in-place layers may take it."""
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=device, pin_memory=pin_memory)


def add_gradient(parameter: nn.Parameter, grad: Tensor) -> None:
    """Add to ``p.grad``, out of place: what is there may be held elsewhere."""
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad


#: The dict that holds a parameter, and its name in there.
Slot = tuple[dict[str, Any], str]


def slots_of(module: nn.Module) -> list[Slot]:
    """Return where a module and those inside it keep parameters; one that is kept twice has two slots."""
    names = (name.rpartition(".") for name, _ in module.named_parameters(remove_duplicate=False))
    return [(module.get_submodule(owner)._parameters, name) for owner, _, name in names]


@contextmanager
def parameters_replaced(values: Iterable[tuple[Slot, Any]]) -> Iterator[None]:
    """Put other values where modules hold their parameters."""
    values = list(values)
    before = [table[name] for (table, name), _ in values]
    for (table, name), value in values:
        table[name] = value
    try:
        yield
    finally:
        for ((table, name), _), value in zip(values, before, strict=True):
            table[name] = value
