"""Tests of ``placeholder.py``: what stands in for the network's output where that is in another process."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.plugin.placeholder import end_step, or_end_step, zeros_like_output
from lightning_ddg.plugin.redirection import StepDone


class Counting(nn.Module):
    calls: ClassVar[list[torch.Size]] = []

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls.append(x.shape)
        return {"logits": x, "argmax": x.argmax(dim=-1), "name": "a"}


def test_a_placeholder_is_shaped_as_the_output_and_found_once_per_shape() -> None:
    Counting.calls.clear()
    rest = nn.Sequential(nn.Linear(4, 3).double(), nn.BatchNorm1d(3).double(), nn.Dropout(), Counting())
    before = {name: tensor.clone() for name, tensor in rest.state_dict().items()}
    make = zeros_like_output(rest)
    state = torch.get_rng_state()
    for count in (5, 2, 5):
        got = make(torch.ones(count, 4, dtype=torch.float64))
        assert got["logits"].shape == (count, 3)
        assert got["logits"].dtype == torch.float64
        assert got["logits"].device.type == "cpu"
        assert got["logits"].requires_grad
        assert got["argmax"].shape == (count,)
        assert got["argmax"].dtype == torch.int64
        assert not got["argmax"].requires_grad
        assert got["name"] == "a"
        got["logits"].sum().backward()
    assert Counting.calls == [torch.Size([5, 3]), torch.Size([2, 3])]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in rest.state_dict().items())


def test_two_placeholders_share_nothing() -> None:
    make = zeros_like_output(nn.Identity())
    first, second = make(torch.ones(2)), make(torch.ones(2))
    with torch.no_grad():
        first.fill_(7.0)
    assert torch.equal(second, torch.zeros(2))


class NeedsValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.sum())]


MESSAGE = (
    "In manual optimization a rank without the loss needs the shape of the network's output.*"
    r"Use automatic optimization, one process \(devices=1\), or layers whose output shape does not depend on the data"
)


def test_layers_whose_output_shape_depends_on_the_data_are_refused() -> None:
    make = zeros_like_output(NeedsValues())
    with pytest.raises(RuntimeError, match=MESSAGE):
        make(torch.ones(3))


def test_where_no_placeholder_can_be_made_the_step_may_end() -> None:
    make = or_end_step(zeros_like_output(NeedsValues()))
    with pytest.raises(StepDone):
        make(torch.ones(3))
    assert or_end_step(zeros_like_output(nn.Identity()))(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


class KeepsAResult(nn.Module):
    """Like layers with the old ``weight_norm``: it holds a tensor that was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.computed = self.weight * 2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.computed


def test_layers_that_cannot_be_copied_are_refused_in_the_same_words() -> None:
    with pytest.raises(RuntimeError, match=MESSAGE):
        zeros_like_output(KeepsAResult())(torch.ones(2))


class Owner(nn.Module):
    """Hooks a layer by one of its own methods, as modules do that watch their activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.cannot_be_copied = (number for number in range(3))
        self.seen: list[str] = []
        self.layer.register_forward_hook(self.watch)

    def watch(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output.device.type)


def test_hooks_on_the_layers_are_not_copied() -> None:
    owner = Owner()
    assert zeros_like_output(owner.layer)(torch.ones(3, 2)).shape == (3, 2)
    assert owner.seen == []


def test_where_nothing_follows_the_step_ends() -> None:
    with pytest.raises(StepDone):
        end_step(torch.ones(1))
