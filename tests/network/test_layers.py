"""Tests of ``network/layers.py``. Change them with the meaning of a segment, not with its code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_ddg.network.layers import Chain, Segment


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: float) -> tuple[torch.Tensor, float]:
        return x * scale, scale


class TakesPair(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, float]) -> torch.Tensor:
        x, scale = pair
        return x / scale


def make_chain() -> Chain:
    return Chain([("net.0", nn.Linear(3, 4)), ("net.1.0", nn.ReLU()), ("net.1.1", nn.Linear(4, 2))])


def test_segments_one_after_another_are_the_chain() -> None:
    chain = make_chain()
    x = torch.randn(5, 3)
    whole = nn.Sequential(*chain.layers)(x)
    assert torch.equal(chain.segment(0, 3)(x), whole)
    assert torch.equal(chain.segment(2, 3)(chain.segment(0, 2)(x)), whole)


def test_only_the_first_layer_gets_the_arguments_and_later_ones_get_one_value() -> None:
    segment = Segment([("a", TwoInputs()), ("b", TakesPair())])
    x = torch.ones(2)
    assert torch.equal(segment(x, scale=4.0), x)


def test_layers_are_shared_and_keep_their_names() -> None:
    chain = make_chain()
    segment = chain.segment(1, 3)
    assert len(chain) == 3
    assert [name for name, _ in segment.named_parameters()] == ["net.1.1.weight", "net.1.1.bias"]
    assert segment.get_submodule("net.1.1") is chain.layers[2]
    assert list(segment.state_dict()) == ["net.1.1.weight", "net.1.1.bias"]
    segment.eval()
    assert not chain.layers[2].training
    assert chain.layers[0].training


def test_functional_call_and_deepcopy_reach_the_layers() -> None:
    segment = make_chain().segment(0, 3)
    x = torch.randn(2, 3)
    zeros = {name: torch.zeros_like(p) for name, p in segment.named_parameters()}
    assert torch.equal(torch.func.functional_call(segment, zeros, (x,)), torch.zeros(2, 2))
    clone = copy.deepcopy(segment)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(clone(x), torch.zeros(2, 2))
    assert segment(x).abs().sum() > 0


def test_a_layer_and_a_layer_inside_it_share_a_segment() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    segment = Segment([("block", block), ("block.1", block[1])])
    assert [name for name, _ in segment.named_modules()] == ["", "block", "block.0", "block.1"]
    assert segment.get_submodule("block.1") is block[1]


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (2, 1), (-1, 2), (0, 4)])
def test_positions_outside_the_chain_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"from position {start} to {stop}: the chain has 3 layers"):
        make_chain().segment(start, stop)


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="A chain of 0 layers"):
        Chain([])
    with pytest.raises(ValueError, match="A segment of 0 layers"):
        Segment([])


def test_equal_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="Two layers are labelled 'a'"):
        Chain([("a", nn.ReLU()), ("b", nn.ReLU()), ("a", nn.ReLU())])
