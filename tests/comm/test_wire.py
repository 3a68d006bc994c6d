"""Tests of ``wire.py``: what is packed arrives as it was, in value, layout and structure, without any process."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.comm.wire import as_bytes, describe, is_dense, pack, unpack
from lightning_ddg.core.pytree import flatten, map_tensors, tensors_of, unflatten
from lightning_ddg.core.tensors import allocate, spec_of


@dataclass
class Sample:
    x: Tensor
    note: str


@dataclass(frozen=True)
class Frozen:
    x: Tensor


class Pair(NamedTuple):
    a: Tensor
    b: Any


def travel(value: Any, payload: bool = True) -> Any:
    """What a receiver makes of a value: bytes copied into tensors made from the description alone."""
    packed = pack(value, payload=payload)
    description = describe(packed.meta)
    tensors = [allocate(spec) for spec in description.specs]
    if description.payload:
        for tensor, sent in zip(tensors, packed.payload, strict=True):
            if sent.numel():
                as_bytes(tensor).copy_(as_bytes(sent))
    else:
        assert packed.payload == []
        for tensor in tensors:
            tensor.zero_()
    return unpack(description, tensors)


def test_pytrees() -> None:
    shared = torch.randn(3)
    numbers = np.arange(4)
    value = {
        "tuple": (torch.randn(2, 3), None, "text", 1.5, True),
        "list": [torch.arange(3), [shared]],
        "sample": Sample(torch.randn(2), "a note"),
        "frozen": Frozen(torch.randn(1)),
        "pair": Pair(torch.randn(2), shared),
        "numpy": numbers,
        "ordered": collections.OrderedDict(b=torch.ones(1), a=torch.zeros(1)),
        3: "three",
    }
    got = travel(value)
    assert list(got) == list(value)
    assert torch.equal(got["tuple"][0], value["tuple"][0])  # type: ignore[index]
    assert got["tuple"][1:] == (None, "text", 1.5, True)
    assert torch.equal(got["list"][0], torch.arange(3))
    assert isinstance(got["sample"], Sample)
    assert got["sample"].note == "a note"
    assert torch.equal(got["sample"].x, value["sample"].x)  # type: ignore[attr-defined]
    assert isinstance(got["frozen"], Frozen)
    assert isinstance(got["pair"], Pair)
    assert got["pair"].b is got["list"][1][0], "one tensor must not become two"
    assert torch.equal(got["pair"].b, shared)
    assert np.array_equal(got["numpy"], numbers)
    assert isinstance(got["ordered"], collections.OrderedDict)
    assert list(got["ordered"]) == ["b", "a"]
    assert len(pack(value).payload) == len(tensors_of(value)) == 8


@pytest.mark.parametrize("value", [None, (), {}, "text", 3, [None, {"a": ()}]])
def test_values_without_tensors(value: Any) -> None:
    assert travel(value) == value
    assert pack(value).payload == []


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.uint8,
     torch.complex64, torch.float8_e4m3fn],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0, 4), (2, 0)])
def test_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (torch.randn(shape, dtype=torch.float64) * 2).to(dtype)
    got = travel(value)
    assert got.shape == value.shape
    assert got.dtype == dtype
    assert as_bytes(got).tolist() == as_bytes(value).tolist()
    assert as_bytes(got).numel() == value.numel() * value.element_size()


def layouts() -> dict[str, Tensor]:
    x = torch.randn(4, 6, 5, 3)
    return {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 2),
        "offset": x[1:],
        "sliced": x[:, ::2],
        "narrow": x[..., :2],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "expanded_scalar": torch.tensor(2.0).expand(5),
        "overlapping": torch.arange(6.0).as_strided((4, 3), (1, 1)),
        "ones_with_odd_strides": torch.randn(3).as_strided((3, 1), (1, 100)),
        "conjugate": torch.randn(3, 2, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "empty_expanded": torch.empty(1, 0).expand(3, 0),
    }


@pytest.mark.parametrize("name", layouts())
def test_layouts(name: str) -> None:
    value = layouts()[name]
    before = value.clone()
    for sent in (value, [value]):
        got = travel(sent)
        got = got if isinstance(got, Tensor) else got[0]
        assert torch.equal(got, before)
        assert is_dense(got)
        if is_dense(value):
            assert got.stride() == value.stride()
    assert torch.equal(value, before)


def test_which_layouts_are_dense() -> None:
    dense = {name for name, tensor in layouts().items() if is_dense(tensor)}
    assert dense == {
        "channels_last", "transposed", "offset", "ones_with_odd_strides", "conjugate", "empty_expanded"
    }  # fmt: skip


def test_a_dense_tensor_is_sent_without_a_copy() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    (sent,) = pack(x).payload
    assert as_bytes(sent).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_snapshot_is_a_copy_on_every_device(device: str) -> None:
    tensor = torch.ones(3, device=device)
    (snapshot,) = pack(tensor, snapshot=True).payload
    (itself,) = pack(tensor).payload
    assert itself is tensor
    assert snapshot is not tensor
    assert snapshot.device.type == device
    assert device == "meta" or snapshot.data_ptr() != tensor.data_ptr()


def test_only_floating_tensors_want_gradients() -> None:
    x = torch.randn(3, requires_grad=True)
    value = (x * 2, x.detach(), torch.arange(3), torch.ones(2, dtype=torch.complex64).requires_grad_(), x > 0)
    got = travel(value)
    assert [tensor.requires_grad for tensor in got] == [True, False, False, True, False]
    assert all(tensor.is_leaf for tensor in got)
    assert all(tensor._base is None for tensor in got), "an in-place layer may take a received tensor first"
    assert travel(x[::2]).requires_grad, "a copy made for the journey wants a gradient as the original does"
    assert not spec_of(torch.arange(2)).requires_grad
    assert type(travel(nn.Parameter(torch.ones(2)))) is Tensor


def test_without_payload() -> None:
    value = {
        "x": torch.randn(2, 3, requires_grad=True),
        "mask": torch.tensor([True]),
        "name": "a",
        "0d": torch.ones(()),
    }
    got = travel(value, payload=False)
    assert got["name"] == "a"
    assert torch.equal(got["x"], torch.zeros(2, 3))
    assert got["x"].requires_grad
    assert torch.equal(got["mask"], torch.tensor([False]))
    assert got["0d"].shape == ()
    assert pack(value, payload=False).meta != pack(value).meta


def test_a_description_depends_on_shapes_and_not_on_values() -> None:
    a, b = (torch.randn(2), {"x": torch.ones(3)}), (torch.randn(2), {"x": torch.zeros(3)})
    assert pack(a).meta == pack(b).meta
    for other in (
        (torch.randn(3), {"x": torch.ones(3)}),
        (torch.randn(2).double(), {"x": torch.ones(3)}),
        (torch.randn(2, requires_grad=True), {"x": torch.ones(3)}),
        (torch.randn(2), {"y": torch.ones(3)}),
        [torch.randn(2), {"x": torch.ones(3)}],
    ):
        assert pack(other).meta != pack(a).meta


def test_sparse_tensors_travel_inside_the_description() -> None:
    sparse = torch.eye(3).to_sparse()
    got = travel({"sparse": sparse, "dense": torch.ones(2)})
    assert torch.equal(got["sparse"].to_dense(), torch.eye(3))
    assert torch.equal(travel(sparse).to_dense(), torch.eye(3))


def test_map_tensors() -> None:
    shared = torch.ones(2)
    calls: list[Tensor] = []

    def double(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return tensor * 2

    got = map_tensors(double, {"a": shared, "b": Pair(shared, "text"), "c": None})
    assert len(calls) == 1
    assert torch.equal(got["a"], torch.full((2,), 2.0))
    assert got["a"] is got["b"].a
    assert got["b"].b == "text"
    assert map_tensors(double, torch.ones(1)).item() == 2.0
    assert map_tensors(double, "text") == "text"
    structure, tensors = flatten([shared, "text"])
    assert unflatten(structure, ["any value"]) == ["any value", "text"]
    assert tensors[0] is shared
