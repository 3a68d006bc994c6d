"""A batch split into micro-batches along its first dimension, and what these have given put together again.

The first tensor of a batch says how many samples there are, and each other one has as many. What says nothing
of single samples goes along whole: what is no tensor, a tensor without dimensions, and one whose first dimension is 1.
Lists and arrays as long as the batch are of samples too, and are split, as are tuples of that many texts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ddg.core.pytree import Flattener, dump, formed, tensors_of, unflatten

_SHOWN = 4
_PLAIN = str | bytes | int | float | bool | None


def even_sizes(length: int, parts: int) -> list[int]:
    """Return the sizes of as many parts as asked for, or as there are samples, which differ by 1 at most.

    >>> even_sizes(11, 4)
    [3, 3, 3, 2]
    """
    parts = max(1, min(parts, length))
    return [length // parts + (part < length % parts) for part in range(parts)]


def length_of(batch: Any) -> int:
    """Return how many samples a batch has.

    Raises:
        ValueError: If that is not clear; the message names tensors, their shapes and the remedy.
    """
    found = _named_tensors(batch)
    for name, tensor in found:
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise ValueError(f"{name} is a {kind} tensor, which cannot be split into micro-batches. {_REMEDY}")
    shaped = [(name, tensor) for name, tensor in found if tensor.ndim]
    if not shaped:
        raise ValueError(
            f"A batch of the type {type(batch).__name__} cannot be split into micro-batches: it holds no tensor with a"
            f" dimension of samples. {_REMEDY}"
        )
    (first, tensor), length = shaped[0], shaped[0][1].shape[0]
    others = [f"{name} of shape {tuple(one.shape)}" for name, one in shaped if one.shape[0] not in (1, length)]
    if others:
        raise ValueError(
            f"The batch cannot be split into micro-batches: its first tensor, {first} of shape {tuple(tensor.shape)},"
            f" has {length} samples, but the first dimension of {', '.join(others[:_SHOWN])}"
            f"{', ...' if len(others) > _SHOWN else ''} is another one. {_REMEDY}"
        )
    return length


_REMEDY = (
    "Let all tensors of a batch have the samples as their first dimension (or 1, for what belongs to none), keep what"
    " is not of single samples on the module, or leave micro_batches out."
)


def split(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Return a batch's parts of the given sizes; their tensors are on the batch's memory.

    Raises:
        ValueError: If the batch cannot be split: see :func:`length_of`.
    """
    length = length_of(batch)
    if sum(sizes) != length:
        raise ValueError(f"sizes={list(sizes)} do not make up the {length} samples of the batch.")
    if len(sizes) == 1:
        return [batch]
    splitter = _Splitter(io.BytesIO(), [value for _, value in _leaves(batch) if _is_of_samples(value, length)])
    dump(splitter, batch)
    form = formed(splitter.buffer, splitter)
    stops = [sum(sizes[: part + 1]) for part in range(len(sizes))]
    spans = [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    return [unflatten(form, [_part(value, length, span) for value in splitter.tensors]) for span in spans]


def join(parts: Sequence[Any], sizes: Sequence[int], name: str = "output") -> Any:
    """Put together what micro-batches of the given sizes have given: the inverse of :func:`split`, and means.

    Tensors with a sample in each row are concatenated, and floating numbers averaged by the sizes; containers are
    joined item by item. What else there is must be equal.

    Raises:
        ValueError: If something else differs; the message calls it by ``name`` and its place.
    """
    first = parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        return _joined_tensors(parts, sizes, name)
    if all(type(part) is float for part in parts):
        return sum(part * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes)
    if all(type(part) is type(first) for part in parts):
        if isinstance(first, dict) and all(part.keys() == first.keys() for part in parts):
            joined = {key: join([part[key] for part in parts], sizes, f"{name}[{key!r}]") for key in first}
            return joined if type(first) is dict else type(first)(joined)
        if isinstance(first, list | tuple):
            return _joined_sequences(parts, sizes, name)
        if is_dataclass(first) and not isinstance(first, type):
            names = [field.name for field in fields(first)]
            new = {n: join([getattr(p, n) for p in parts], sizes, f"{name}.{n}") for n in names}
            return replace(first, **new)
        if not isinstance(first, Tensor | np.ndarray) and all(part is first or part == first for part in parts):
            return first
    raise ValueError(
        f"{name} (a {type(first).__name__}) cannot be put together from {len(parts)} micro-batches, as each has another"
        " one. Return tensors with the samples as their first dimension, floating numbers that may be averaged, or what"
        " is the same for all."
    )


def _joined_tensors(parts: Sequence[Tensor], sizes: Sequence[int], name: str) -> Tensor:
    rows = all(part.ndim and part.shape[0] == size for part, size in zip(parts, sizes, strict=True))
    if rows and all(part.shape[1:] == parts[0].shape[1:] for part in parts):
        return torch.cat(list(parts))
    if all(part.ndim == 0 and part.is_floating_point() for part in parts):
        return weighted_mean(parts, sizes)
    shapes = ", ".join(str(tuple(part.shape)) for part in parts[:_SHOWN])
    raise ValueError(
        f"{name} (tensors of {parts[0].dtype} and shapes {shapes}) cannot be put together from micro-batches of"
        f" {', '.join(map(str, sizes[:_SHOWN]))} samples. Return tensors with the samples as their first dimension, and"
        " the same other dimensions, or floating numbers that may be averaged."
    )


def _joined_sequences(parts: Sequence[Any], sizes: Sequence[int], name: str) -> Any:
    first = parts[0]
    if not tensors_of(list(parts)) and all(len(part) == size for part, size in zip(parts, sizes, strict=True)):
        joined = [item for part in parts for item in part]
    elif all(len(part) == len(first) for part in parts):
        joined = [join(same, sizes, f"{name}[{at}]") for at, same in enumerate(zip(*parts, strict=True))]
    else:
        raise ValueError(
            f"{name} (a {type(first).__name__}) has {', '.join(str(len(part)) for part in parts[:_SHOWN])} items in"
            f" micro-batches of {', '.join(map(str, sizes[:_SHOWN]))} samples, and cannot be put together. Return one"
            " item for each sample, or as many in each micro-batch."
        )
    if hasattr(first, "_fields"):
        return type(first)(*joined)
    return type(first)(joined)


def weighted_mean(values: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
    """Return the mean of tensors, each as often as its weight says, in their type."""
    kind = torch.promote_types(values[0].dtype, torch.float32)
    total = values[0].to(kind) * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value.to(kind) * weight
    return (total / sum(weights)).to(values[0].dtype)


class _Splitter(Flattener):
    """Takes a batch apart, and takes some objects in it for leaves besides the tensors."""

    def __init__(self, buffer: io.BytesIO, leaves: Sequence[Any]) -> None:
        super().__init__(buffer)
        self.buffer = buffer
        self._leaves = {id(value): value for value in leaves}

    def persistent_id(self, obj: Any) -> Any:
        if id(obj) in self._leaves and not isinstance(obj, Tensor):
            self.tensors.append(obj)
            return len(self.tensors) - 1
        return super().persistent_id(obj)


def _part(value: Any, length: int, span: slice) -> Any:
    if not isinstance(value, Tensor):
        return value[span]
    if not value.ndim or value.shape[0] != length:
        return value
    part = value[span]
    # With a version counter of its own: a step may change its part in place while another one is in flight.
    return part if part.requires_grad else part.data


def _is_of_samples(value: Any, length: int) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and len(value) == length
    if type(value) is tuple:
        return len(value) == length and all(isinstance(item, str | bytes) for item in value)
    return type(value) is list and len(value) == length


def _leaves(value: Any, name: str = "batch") -> Iterator[tuple[str, Any]]:
    """Walk through the usual containers; lists and tuples without tensors that have dimensions are leaves."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple) and not _is_plain(value):
        for at, item in enumerate(value):
            yield from _leaves(item, f"{name}.{value._fields[at]}" if hasattr(value, "_fields") else f"{name}[{at}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name, None), f"{name}.{field.name}")
    else:
        yield name, value


def _is_plain(value: Sequence[Any]) -> bool:
    return all(isinstance(item, _PLAIN) for item in value) or not any(tensor.ndim for tensor in tensors_of(value))


def _named_tensors(batch: Any) -> list[tuple[str, Tensor]]:
    """All tensors of a batch, those inside of objects of other kinds too, in their order, and how to call them."""
    names = {id(value): name for name, value in _leaves(batch) if isinstance(value, Tensor)}
    finder = _Finder(io.BytesIO())
    dump(finder, batch)
    return [
        (names.get(id(tensor), f"a tensor inside of batch ({type(batch).__name__})"), tensor) for tensor in finder.all
    ]


class _Finder(Flattener):
    """Finds tensors of all kinds, also those that would be taken apart."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer)
        self.all: list[Tensor] = []
        self._seen: set[int] = set()

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            if id(obj) not in self._seen:
                self._seen.add(id(obj))
                self.all.append(obj)
            return 0
        return super().persistent_id(obj)
