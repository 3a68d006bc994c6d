"""Tests of pytrees live here: what is taken apart comes together again as it was, in this process and as in another."""

from __future__ import annotations

import threading
from collections import namedtuple
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from lightning_ddg.comm.wire import describe, pack, unpack
from lightning_ddg.core.pytree import flatten, map_tensors, tensors_of, unflatten


class Labelled(Tensor):
    """A tensor with an attribute, and nothing that would keep it."""

    label: str


class Slotted(Tensor):
    __slots__ = ("label",)


def labelled(kind: Any, values: Tensor, label: Any = "fish") -> Any:
    made = values.as_subclass(kind)
    made.label = label
    return made


def through_the_wire(value: Any) -> Any:
    packed = pack(value, snapshot=True)
    return unpack(describe(packed.meta), [tensor.detach().clone() for tensor in packed.payload])


def through_a_map(value: Any) -> Any:
    return map_tensors(lambda tensor: tensor.detach().clone(), value)


BOTH = pytest.mark.parametrize("passed", [through_the_wire, through_a_map])


# ---- subclasses of Tensor


@BOTH
@pytest.mark.parametrize("kind", [Labelled, Slotted])
def test_a_subclass_and_its_attributes_arrive(passed: Any, kind: type) -> None:
    sent = {"one": labelled(kind, torch.arange(6.0).reshape(2, 3)), "plain": torch.ones(2)}
    got = passed(sent)
    assert type(got["one"]) is kind
    assert got["one"].label == "fish"
    assert type(got["plain"]) is Tensor
    assert torch.equal(got["one"].as_subclass(Tensor), sent["one"].as_subclass(Tensor))


@BOTH
def test_a_subclass_that_is_the_whole_value_arrives(passed: Any) -> None:
    boxes = tv_tensors.BoundingBoxes(torch.ones(3, 4), format="CXCYWH", canvas_size=(9, 7))
    got = passed(boxes)
    assert isinstance(got, tv_tensors.BoundingBoxes)
    assert (got.format, got.canvas_size) == (tv_tensors.BoundingBoxFormat.CXCYWH, (9, 7))
    image, mask = passed((tv_tensors.Image(torch.rand(3, 2, 2)), tv_tensors.Mask(torch.zeros(2, 2))))
    assert type(image) is tv_tensors.Image
    assert type(mask) is tv_tensors.Mask


@BOTH
def test_an_attribute_may_hold_tensors(passed: Any) -> None:
    got = passed([labelled(Labelled, torch.ones(2), label={"inner": torch.full((3,), 2.0)})])
    assert torch.equal(got[0].label["inner"], torch.full((3,), 2.0))


@BOTH
def test_a_subclass_that_occurs_twice_is_one(passed: Any) -> None:
    one = labelled(Labelled, torch.ones(2))
    first, second = passed((one, one))
    assert first is second
    assert first.label == "fish"


def test_what_arrives_wants_gradients_as_what_was_sent_did() -> None:
    wanted, not_wanted = labelled(Labelled, torch.ones(2)).requires_grad_(), labelled(Labelled, torch.ones(2))
    first, second = through_the_wire((wanted * 2, not_wanted))
    assert (first.requires_grad, first.is_leaf, second.requires_grad) == (True, True, False)
    first.sum().backward()
    assert first.grad is not None


def test_a_leaf_stays_the_leaf_that_its_pytree_lists() -> None:
    value = map_tensors(lambda tensor: tensor.detach().requires_grad_(), (labelled(Labelled, torch.ones(2)),))
    (leaf,) = tensors_of(value)
    value[0].sum().backward()
    assert leaf.is_leaf
    assert torch.equal(leaf.grad.as_subclass(Tensor), torch.ones(2))
    assert value[0].label == "fish"


def test_what_is_put_together_stays_in_its_graph() -> None:
    source = torch.ones(2, requires_grad=True)
    form, tensors = flatten((labelled(Labelled, torch.ones(2)),))
    (put,) = unflatten(form, [source * 3])
    put.sum().backward()
    assert type(put) is Labelled
    assert torch.equal(source.grad, torch.full((2,), 3.0))
    assert unflatten(form, tensors)[0] is tensors[0]


def test_parameters_and_buffers_arrive_as_tensors() -> None:
    sent = (nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False), nn.Buffer(torch.zeros(3)))
    got = through_the_wire(sent)
    assert [type(tensor) for tensor in got] == [Tensor] * 3
    assert [tensor.requires_grad for tensor in got] == [True, False, False]
    assert torch.equal(got[0], torch.ones(2))
    assert torch.equal(got[2], torch.zeros(3))


# ---- other layouts


@BOTH
def test_sparse_and_quantized_tensors_arrive(passed: Any) -> None:
    sparse, compressed, quantized = passed(
        (
            torch.eye(3).to_sparse(),
            torch.eye(3).to_sparse_csr(),
            torch.quantize_per_tensor(torch.arange(3.0), 0.5, 1, torch.quint8),
        )
    )
    assert torch.equal(sparse.to_dense(), torch.eye(3))
    assert torch.equal(compressed.to_dense(), torch.eye(3))
    assert torch.equal(quantized.dequantize(), torch.arange(3.0))


@BOTH
def test_a_sparse_tensor_that_wants_a_gradient_is_refused(passed: Any) -> None:
    with pytest.raises(TypeError, match=r"A sparse tensor that wants a gradient.*Make it dense \(`to_dense\(\)`\)"):
        passed(torch.eye(3).to_sparse().requires_grad_())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_does_not_travel(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    assert torch.equal(through_a_map([nested])[0].unbind()[1], torch.ones(3))
    with pytest.raises(TypeError, match=r"A nested tensor cannot travel.*as a list \(`nested.unbind\(\)`\), or padded"):
        through_the_wire((nested,))
    with pytest.raises(TypeError, match="A nested tensor cannot travel"):
        through_the_wire(nested)


# ---- classes that pickle does not find


def values_of_local_classes() -> dict[str, Any]:
    Base = namedtuple("Base", ["prediction", "rest"], defaults=[None])

    class Output(Base):
        kind = "quantiles"

    class Typed(NamedTuple):
        prediction: Tensor

    @dataclass
    class Data:
        prediction: Tensor
        rest: int = 3

    class Bare:
        pass

    bare = Bare()
    bare.prediction = torch.ones(2)
    one = torch.ones(2)
    return {"base": Base(one), "sub": Output(one, 1), "typed": Typed(one), "data": Data(one), "bare": bare}


@BOTH
@pytest.mark.parametrize("name", ["base", "sub", "typed", "data", "bare"])
def test_a_value_of_a_local_class_arrives(passed: Any, name: str) -> None:
    sent = values_of_local_classes()[name]
    got = passed([sent])[0]
    assert type(got).__name__ == type(sent).__name__
    assert torch.equal(got.prediction, torch.ones(2))
    assert getattr(got, "rest", None) == getattr(sent, "rest", None)
    assert getattr(got, "kind", None) == getattr(sent, "kind", None)
    assert isinstance(got, type(sent)) == (passed is through_a_map)


def local_class(kind: str) -> Any:
    class Method:
        def __init__(self) -> None:
            self.values = torch.ones(2)

    class Color(Enum):
        RED = 1

    class Own(Tensor):
        def double(self) -> Tensor:
            return self * 2

    return {"method": Method(), "enum": Color.RED, "tensor": torch.ones(2).as_subclass(Own)}[kind]


@pytest.mark.parametrize(("kind", "name"), [("method", "Method"), ("enum", "Color"), ("tensor", "Own")])
def test_a_local_class_with_methods_stays_in_its_process(kind: str, name: str) -> None:
    sent = local_class(kind)
    assert type(through_a_map([sent])[0]) is type(sent)
    with pytest.raises(TypeError, match=rf"local_class.<locals>.{name}.*not known to other processes.*top of a module"):
        through_the_wire([sent])


def test_forms_with_other_local_classes_differ() -> None:
    first, again, other = (values_of_local_classes()["base"] for _ in range(3))
    assert flatten(first)[0] == flatten(first._replace(rest=None))[0]
    assert flatten(again)[0] != flatten(other)[0]
    assert len({flatten(first)[0], flatten(first)[0], flatten(other)[0]}) == 2


def test_a_form_may_travel_within_a_value() -> None:
    form, tensors = flatten(values_of_local_classes()["base"])
    assert torch.equal(unflatten(through_the_wire({"form": form})["form"], tensors).prediction, torch.ones(2))


# ---- what does not pickle


@BOTH
@pytest.mark.parametrize("what", ["lambda", "lock", "file", "generator"])
def test_what_does_not_pickle_is_named(passed: Any, what: str, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        value = {
            "lambda": (lambda: None, "<lambda>"),
            "lock": (threading.Lock(), "lock"),
            "file": (file, "TextIOWrapper"),
            "generator": ((x for x in ()), "<genexpr>"),
        }[what]
        with pytest.raises(TypeError, match=f"{value[1]}.* is in a batch.*cannot be pickled.*open files, generators"):
            passed({"x": torch.ones(2), "y": [value[0]]})
