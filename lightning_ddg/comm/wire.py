"""What a message is: a pytree of tensors and Python values, taken apart into a description and bytes, and back.

Every tensor travels with its shape, strides, dtype, whether it is on the CPU, where it then stays, and whether it wants
a gradient. What is not a tensor travels inside the description, as bytes of pickle: ``lightning_ddg.core.pytree`` says
why.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ddg.core.admitted import AdmittedUnpickler
from lightning_ddg.core.pytree import flatten, plain, received
from lightning_ddg.core.tensors import TensorSpec, spec_of


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill their memory without holes or overlaps, in any order of the dimensions."""
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


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a flat ``uint8`` view of a dense tensor's memory, shape ``(numel * itemsize,)``."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return torch.as_strided(tensor, (tensor.numel(),), (1,)).view(torch.uint8)


class Packed(NamedTuple):
    """A message ready to travel: ``meta`` describes it, ``payload`` are its tensors, dense, in that order."""

    meta: bytes
    payload: list[Tensor]


def pack(value: Any, *, payload: bool = True, snapshot: bool = False) -> Packed:
    """Prepare a pytree for sending, without its tensors' values unless ``payload``.

    With ``snapshot`` the tensors are copied, so that they may be modified while the message is on its way.
    """
    if type(value) is Tensor and value.layout is torch.strided and not value.is_quantized:
        structure, tensors = None, [value]
    else:
        structure, tensors = flatten(value, travels=True)
    tensors = [plain(tensor) for tensor in tensors]
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
    """Read :attr:`Packed.meta`."""
    return Description(*AdmittedUnpickler(io.BytesIO(meta)).load())


def unpack(description: Description, tensors: Sequence[Tensor]) -> Any:
    """Put a received value together from its tensors, which come to want a gradient where the sent ones did."""
    wants_grad = [spec.requires_grad for spec in description.specs]
    if description.structure is None:
        return tensors[0].requires_grad_(wants_grad[0])
    return received(description.structure, tensors, wants_grad)
