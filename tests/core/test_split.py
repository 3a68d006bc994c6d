"""Tests of ``split.py``: what of a batch is split, what goes along whole, what is refused; and the way back."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors

from lightning_ddg.core.schedule import delay_in_updates, enough_micro_batches, least_micro_batches
from lightning_ddg.core.split import even_sizes, join, length_of, split, weighted_mean

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Tensor
    name: str = "n"


@pytest.mark.parametrize(
    ("length", "parts", "sizes"),
    [(12, 3, [4, 4, 4]), (11, 4, [3, 3, 3, 2]), (5, 1, [5]), (2, 4, [1, 1]), (1, 3, [1]), (0, 2, [0])],
)
def test_parts_are_as_even_as_can_be(length: int, parts: int, sizes: list[int]) -> None:
    assert even_sizes(length, parts) == sizes


@pytest.mark.parametrize(
    ("length", "num_stages", "parts"),
    [(12, 4, 3), (8, 4, 4), (7, 4, 3), (2, 4, 2), (12, 8, 12), (127, 8, 7), (5, 2, 1), (5, 1, 1), (0, 4, 1)],
)
def test_enough_micro_batches_are_even_where_they_can_be(length: int, num_stages: int, parts: int) -> None:
    assert enough_micro_batches(length, num_stages) == parts


def test_the_delay_in_updates_is_one_with_as_many_micro_batches_as_the_first_stage_is_late() -> None:
    assert [delay_in_updates(8, m) for m in (1, 2, 3, 4, 6, 7, 12)] == [7, 4, 3, 2, 2, 1, 1]
    assert delay_in_updates(1, 1) == 0
    assert [delay_in_updates(3, m, slack=2) for m in (1, 2, 4, 6)] == [6, 3, 2, 1]
    assert [enough_micro_batches(length, 3, slack=2) for length in (12, 21, 4)] == [6, 7, 4]
    assert least_micro_batches(3, slack=2) == 6
    assert least_micro_batches(1, slack=2) == 1


def test_what_is_of_samples_is_split_and_the_rest_goes_along() -> None:
    x, mask, scale = torch.arange(10.0).reshape(5, 2), torch.ones(1, 4, 4), torch.tensor(2.0)
    batch = {
        "pair": Pair(x, x[:, 0]),
        "names": ["a", "b", "c", "d", "e"],
        "keys": ("k", "l", "m", "n", "o"),
        "size": (5, 5, 5, 5, 5),
        "sample": Sample(x + 1),
        "object": SimpleNamespace(x=x, path=Path("/a/b/c/d")),
        "mask": mask,
        "scale": scale,
        "again": x,
        "array": np.arange(5),
        "number": 5,
        "text": "abcde",
        "tasks": [{"id": i} for i in range(5)],
        "labels": [torch.tensor(i) for i in range(5)],
    }
    first, second = split(batch, [3, 2])
    assert torch.equal(first["pair"].x, x[:3])
    assert torch.equal(second["pair"].x, x[3:])
    assert isinstance(first["pair"], Pair)
    assert (first["names"], second["names"]) == (["a", "b", "c"], ["d", "e"])
    assert second["keys"] == ("n", "o")
    assert second["size"] == batch["size"]
    assert torch.equal(second["sample"].x, x[3:] + 1)
    assert torch.equal(second["object"].x, x[3:])
    assert second["object"].path == Path("/a/b/c/d")
    assert second["mask"].shape == (1, 4, 4)
    assert second["scale"].item() == 2.0
    assert first["again"] is first["pair"].x, "what is one tensor in the batch is one in its parts"
    assert second["array"].tolist() == [3, 4]
    assert (second["number"], second["text"]) == (5, "abcde")
    assert second["labels"] == [torch.tensor(3), torch.tensor(4)]
    assert second["tasks"] == [{"id": 3}, {"id": 4}]


def test_parts_are_on_the_memory_of_the_batch_but_have_version_counters_of_their_own() -> None:
    x = torch.zeros(4, 2)
    first, second = split(x, [2, 2])
    weight = torch.ones(2, 2, requires_grad=True)
    kept = (first @ weight).sum()
    second.add_(1)
    assert x[2:].eq(1).all()
    kept.backward()


def test_one_part_is_the_batch() -> None:
    batch = [torch.zeros(3, 2)]
    assert split(batch, [3])[0] is batch


def test_a_part_that_wants_a_gradient_hands_it_to_the_batch() -> None:
    x = torch.ones(4, 2, requires_grad=True)
    split(x, [1, 3])[1].sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == 6


def test_subclasses_of_tensors_stay_what_they_are() -> None:
    boxes = tv_tensors.BoundingBoxes(torch.zeros(4, 4), format="XYXY", canvas_size=(8, 8))
    images = tv_tensors.Image(torch.zeros(4, 3, 8, 8))
    _, (image, box) = split((images, boxes), [3, 1])
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(box, tv_tensors.BoundingBoxes)
    assert box.canvas_size == (8, 8)
    assert box.shape == (1, 4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            [torch.zeros(4, 2), torch.zeros(3)],
            r"first tensor, batch\[0\] of shape \(4, 2\), has 4 samples, but .*batch",
        ),
        ({"x": torch.zeros(4, 2), "w": [torch.zeros(4), torch.zeros(2, 7)]}, r"batch\['w'\]\[1\] of shape \(2, 7\)"),
        (Sample(torch.zeros(())), "of the type Sample .* holds no tensor with a dimension of samples"),
        ("text", "of the type str cannot be split"),
        ({"x": torch.eye(3).to_sparse()}, r"batch\['x'\] is a sparse_coo tensor"),
        ([torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])], r"batch\[0\] is a nested tensor"),
        (
            SimpleNamespace(x=torch.zeros(4), edges=torch.zeros(2, 9)),
            r"a tensor inside of batch \(SimpleNamespace\) of",
        ),
        ((torch.zeros(1, 5), torch.zeros(4, 2)), r"has 1 samples, but the first dimension of batch\[1\]"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        length_of(batch)
    assert "or leave micro_batches out" in str(error.value)
    with pytest.raises(ValueError, match=message):
        split(batch, [2, 2])


def test_many_others_are_named_in_part() -> None:
    with pytest.raises(ValueError, match=r"batch\[4\] of shape \(6,\), \.\.\. is another one"):
        length_of([torch.zeros(2), *(torch.zeros(n) for n in (3, 4, 5, 6, 7))])


def test_sizes_make_up_the_batch() -> None:
    with pytest.raises(ValueError, match=r"sizes=\[2, 3\] do not make up the 4 samples"):
        split(torch.zeros(4), [2, 3])


def test_what_has_been_split_is_put_together_again() -> None:
    x = torch.arange(10.0).reshape(5, 2)
    batch = {"pair": Pair(x, x[:, 0]), "names": list("abcde"), "sample": Sample(x), "number": 3, "by": OrderedDict(a=x)}
    joined = join(split(batch, [2, 2, 1]), [2, 2, 1])
    assert torch.equal(joined["pair"].x, x)
    assert joined["names"] == list("abcde")
    assert torch.equal(joined["sample"].x, x)
    assert joined["number"] == 3
    assert isinstance(joined["by"], OrderedDict)


def test_numbers_are_averaged_by_the_samples() -> None:
    joined = join([(torch.tensor(1.0), 2.0), (torch.tensor(4.0), 5.0)], [2, 1])
    assert joined == (torch.tensor(2.0), 3.0)
    assert weighted_mean([torch.tensor(1.0).bfloat16()] * 300, [1] * 300).item() == 1.0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            [{"n": torch.tensor(3)}, {"n": torch.tensor(3)}],
            r"output\['n'\] \(tensors of torch.int64 and shapes \(\), \(\)",
        ),
        ([{"c": torch.zeros(7)}, {"c": torch.zeros(7)}], r"output\['c'\] .* micro-batches of 2, 1 samples"),
        ([{"a": 1}, {"b": 1}], r"output \(a dict\) cannot be put together from 2 micro-batches"),
        ([{"a": 1}, {"a": 2}], r"output\['a'\] \(a int\)"),
        ([(torch.zeros(2), 1), (torch.zeros(1),)], r"output \(a tuple\) has 2, 1 items"),
    ],
)
def test_what_cannot_be_put_together_is_refused_by_name(parts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join(parts, [2, 1])
