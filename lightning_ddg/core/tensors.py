"""Pytrees of tensors, and the places where modules keep their parameters: one helper for each.

A pytree is here whatever pickles, with tensors as its leaves. ``torch.utils._pytree`` knows tuples, lists, dictionaries
and those containers that were registered with it, and takes the rest for a leaf, with its tensors out of sight. Batches
and outputs of networks are data classes and objects of other libraries as often, and no user shall have to register
them. Pickling goes through all of them, and asks of every object whether it is a tensor.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class _Flattener(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor) or obj.layout is not torch.strided or obj.is_quantized:
            return None
        if id(obj) not in self._index:
            self._index[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._index[id(obj)]


class _Unflattener(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Any]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Any:
        return self._tensors[pid]


def flatten(value: Any) -> tuple[bytes, list[Tensor]]:
    """Split a pytree into its structure (bytes) and its tensors; a tensor that occurs twice is listed once.

    Tuples, lists, dicts, dataclasses and any other object that pickles may hold the tensors.
    """
    buffer = io.BytesIO()
    flattener = _Flattener(buffer)
    flattener.dump(value)
    return buffer.getvalue(), flattener.tensors


def unflatten(structure: bytes, tensors: Sequence[Any]) -> Any:
    """Put a pytree together again; the inverse of :func:`flatten`."""
    return _Unflattener(io.BytesIO(structure), tensors).load()


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a pytree, in a fixed order."""
    return [value] if isinstance(value, Tensor) else flatten(value)[1]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply ``function`` to every tensor of a pytree, and leave everything else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    structure, tensors = flatten(value)
    return unflatten(structure, [function(tensor) for tensor in tensors])


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
