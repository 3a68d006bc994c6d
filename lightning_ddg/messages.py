"""What a message is: a nest of tensors and Python values, taken apart into a description and bytes, and back.

Every tensor travels with its shape, strides, dtype, whether it is on the CPU, where it then stays, and whether it wants
a gradient. A new kind of value needs no change
here as long as it pickles; the order in which messages travel is :mod:`~lightning_ddg.transport`'s business.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
        index = self._index.get(id(obj))
        if index is None:
            index = self._index[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return index


class _Unflattener(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Any]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Any:
        return self._tensors[pid]


def flatten(value: Any) -> tuple[bytes, list[Tensor]]:
    """Splits a nest into its structure (bytes) and its tensors; a tensor that occurs twice is listed once.

    Tuples, lists, dicts, dataclasses and any other object that pickles may hold the tensors.
    """
    buffer = io.BytesIO()
    flattener = _Flattener(buffer)
    flattener.dump(value)
    return buffer.getvalue(), flattener.tensors


def unflatten(structure: bytes, tensors: Sequence[Any]) -> Any:
    """Puts a nest together again; the inverse of :func:`flatten`."""
    return _Unflattener(io.BytesIO(structure), tensors).load()


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a nest, in a fixed order."""
    return [value] if isinstance(value, Tensor) else flatten(value)[1]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Applies ``function`` to every tensor of a nest and leaves everything else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    structure, tensors = flatten(value)
    return unflatten(structure, [function(tensor) for tensor in tensors])


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without holes or overlaps, in any order of the dimensions."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def spec_of(tensor: Tensor) -> TensorSpec:
    """The description of a dense tensor (see :func:`is_dense`)."""
    wants_grad = tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
    on_cpu = tensor.device.type == "cpu"
    return TensorSpec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, wants_grad, on_cpu)


def as_bytes(tensor: Tensor) -> Tensor:
    """A flat ``uint8`` view of a dense tensor's memory, shape ``(numel * itemsize,)``."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return torch.as_strided(tensor, (tensor.numel(),), (1,)).view(torch.uint8)


def allocate(spec: TensorSpec, device: torch.device | str = "cpu", pin_memory: bool = False) -> Tensor:
    """An uninitialised tensor for a description. It is nobody's view, so that in-place layers may take it first."""
    return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=device, pin_memory=pin_memory)


class Packed(NamedTuple):
    """A message ready to travel: ``meta`` describes it, ``payload`` are its tensors, dense, in that order."""

    meta: bytes
    payload: list[Tensor]


def pack(value: Any, *, payload: bool = True, snapshot: bool = False) -> Packed:
    """Prepares a nest for sending.

    Args:
        value: The nest.
        payload: ``False`` sends the description only: the receiver gets zeros of the same shapes and dtypes.
        snapshot: Copies the tensors, so that the originals may be modified while the message is on its way.
    """
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
        structure, tensors = None, [value]
    else:
        structure, tensors = flatten(value)
    dense = [tensor if is_dense(tensor) else tensor.contiguous() for tensor in tensors]
    meta = _meta(structure, tuple(spec_of(tensor) for tensor in dense), payload)
    if snapshot and payload:
        dense = [tensor.detach().clone() for tensor in dense]
    return Packed(meta, dense if payload else [])


# Training sends the same few descriptions over and over.
@lru_cache(maxsize=256)
def _meta(structure: bytes | None, specs: tuple[TensorSpec, ...], payload: bool) -> bytes:
    return pickle.dumps((structure, list(specs), payload), pickle.HIGHEST_PROTOCOL)


class Description(NamedTuple):
    """What :attr:`Packed.meta` says."""

    structure: bytes | None
    specs: list[TensorSpec]
    payload: bool


def describe(meta: bytes | memoryview) -> Description:
    """Reads :attr:`Packed.meta`."""
    return Description(*pickle.loads(meta))


def unpack(description: Description, tensors: Sequence[Tensor]) -> Any:
    """Puts the value of a received message together from its tensors, marking those that want a gradient."""
    for spec, tensor in zip(description.specs, tensors, strict=True):
        tensor.requires_grad_(spec.requires_grad)
    return tensors[0] if description.structure is None else unflatten(description.structure, tensors)
