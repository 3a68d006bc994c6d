"""Tests of ``checkpoint.py``: optimizer states split and join without loss, and what is written is found again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_ddg.plugin.checkpoint import (
    CheckpointAssembler,
    full_optimizer_state,
    local_optimizer_state,
    record_cut,
    recorded_cut,
    stage_optimizer_state,
)
from lightning_ddg.plugin.ownership import OptimizerGroups, Ownership, Weights

Make = Callable[[nn.Module], Optimizer]


def grouped(net: nn.Module) -> Optimizer:
    """Groups whose order is not that of the stages; the stages' parts of the third and fourth are empty."""
    groups: list[dict[str, Any]] = [
        {"params": [net[3].weight, net[0].weight], "lr": 0.1},  # type: ignore[index]
        {"params": [net[0].bias, net[3].bias, net[1].weight], "weight_decay": 0.2},  # type: ignore[index]
        {"params": [net[2].weight]},  # type: ignore[index]
        {"params": [net[1].bias], "lr": 0.3},  # type: ignore[index]
    ]
    return torch.optim.AdamW(groups, lr=0.01)


class Warming(torch.optim.SGD):
    """Keeps a count for all parameters together, and goes by it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.0, momentum=0.9)
        self.state["global"]["steps"] = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["global"]["steps"] += 1
        for group in self.param_groups:
            group["lr"] = 0.01 * self.state["global"]["steps"]
        super().step(closure)


MAKE: dict[str, Make] = {
    "state of its own": lambda net: Warming(net.parameters()),
    "grouped": grouped,
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "fused": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, fused=True),
    "named": lambda net: torch.optim.Adam(net.named_parameters(), lr=0.1),
    "no_state": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))).double()


def step(net: nn.Module, optimizer: Optimizer, times: int) -> None:
    for number in range(times):
        optimizer.zero_grad()
        net(torch.full((1, 2), 1.0 + number, dtype=torch.float64)).square().sum().backward()
        optimizer.step()


def stage_of(net: nn.Sequential, make: Make, stage: int) -> tuple[Optimizer, list[list[nn.Parameter]]]:
    groups = OptimizerGroups(make(net), Ownership(net, [net[:1], net[1:]], stage))
    return groups.optimizer, groups.whole


@pytest.mark.parametrize("name", MAKE)
def test_a_full_state_splits_and_joins_without_loss(name: str) -> None:
    whole_net, make = network(), MAKE[name]
    whole = make(whole_net)
    step(whole_net, whole, 3)
    saved = copy.deepcopy(whole.state_dict())

    states, nets = [], []
    for stage in (1, 2):
        net = network()
        net.load_state_dict(whole_net.state_dict())
        optimizer, groups = stage_of(net, make, stage)
        optimizer.load_state_dict(local_optimizer_state(saved, optimizer, groups))
        step(net, optimizer, 2)
        states.append(stage_optimizer_state(optimizer, groups))
        nets.append((net, optimizer, groups))
    assert not {key for key in states[0].keys() & states[1].keys() if isinstance(key, int)}

    _, optimizer, groups = nets[1]
    joined = full_optimizer_state(optimizer, groups, states)
    assert joined.keys() == saved.keys()
    assert joined["state"].keys() == saved["state"].keys()
    indices = [key for key in joined["state"] if isinstance(key, int)]
    assert indices == sorted(indices)
    if name != "state of its own":
        assert joined["param_groups"] == saved["param_groups"]
    # torch's optimizers update the tensors they have loaded.
    joined = copy.deepcopy(joined)
    for stage, (net, optimizer, _) in enumerate(nets, start=1):
        again = network()
        again.load_state_dict(net.state_dict())
        resumed, resumed_groups = stage_of(again, make, stage)
        resumed.load_state_dict(local_optimizer_state(joined, resumed, resumed_groups))
        step(net, optimizer, 1)
        step(again, resumed, 1)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_the_part_of_a_stage_keeps_its_values() -> None:
    net = network()
    whole = grouped(net)
    step(net, whole, 2)
    saved = whole.state_dict()
    optimizer, groups = stage_of(net, grouped, 1)
    local = local_optimizer_state(saved, optimizer, groups)
    assert [group["params"] for group in local["param_groups"]] == [[0], [1], [], []]
    assert [group["lr"] for group in local["param_groups"]] == [0.1, 0.01, 0.01, 0.3]
    # The first stage's weight and bias come second and third in the user's order.
    assert local["state"][0]["exp_avg"] is saved["state"][1]["exp_avg"]
    assert local["state"][1]["exp_avg"] is saved["state"][2]["exp_avg"]


def test_a_state_of_another_optimizer_is_refused() -> None:
    net = network()
    saved = MAKE["sgd"](net).state_dict()
    optimizer, groups = stage_of(net, grouped, 1)
    with pytest.raises(ValueError, match=r"parameter groups of sizes \[8\], this module's has \[2, 3, 1, 1\]. Resume"):
        local_optimizer_state(saved, optimizer, groups)


def test_a_recorded_cut_is_found_for_as_many_stages_only() -> None:
    checkpoint: dict[str, Any] = {"state_dict": {}}
    assert recorded_cut(checkpoint, 2) is None
    record_cut(checkpoint, 2, ("net.1",))
    assert checkpoint["lightning_ddg"] == {"num_stages": 2, "split_points": ["net.1"]}
    assert recorded_cut(checkpoint, 2) == ["net.1"]
    assert recorded_cut(checkpoint, 3) is None


def test_a_checkpoint_is_completed_by_what_the_others_have() -> None:
    """On rank 0, the last stage: the module's state while its weights are here in part, and copies in any case."""
    net, weights = network(), Weights()
    theirs = {"0.weight": torch.full((2, 2), 7.0), "0.bias": torch.full((2,), 7.0)}
    given: list[set[str]] = []

    def gather(own: dict[Any, Any]) -> list[dict[Any, Any]]:
        given.append(set(own))
        return [theirs]

    assembler = CheckpointAssembler(Ownership(net, [net[:1], net[1:]], 2), weights, [], gather, lambda: False)
    assert not (assembler.module_state()["0.weight"] == 7.0).any()
    assert given == []
    weights.whole = False
    state = assembler.module_state()
    assert state["0.weight"] is theirs["0.weight"]
    average, other = net.state_dict(), {"0.weight": torch.zeros(2, 2)}
    assembler.complete_copies({"state_dict": state, "callbacks": {"Average": {"average": average, "other": other}}})
    assert given == [net.state_dict().keys() - theirs.keys()] * 2, "the module's own state is complete by now"
    assert average["0.bias"] is theirs["0.bias"]
    assert (other["0.weight"] == 0).all()
