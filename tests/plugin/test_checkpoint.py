"""Tests of ``checkpoint.py``: every tensor has one owner, and optimizer states split and join without loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_ddg.plugin.checkpoint import (
    adopt_groups,
    full_optimizer_state,
    keep_only,
    keep_options,
    keys_of_stage,
    local_optimizer_state,
    owner_by_name,
    parameter_groups,
    stage_optimizer_state,
)


class Extra(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.note = 0

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


class Root(nn.Module):
    """Two stages of two layers, a head outside and a second name for a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Extra(), nn.Linear(2, 2))
        self.alias = self.net[3]
        self.first = self.net[0]
        self.head = Extra()
        self.register_buffer("count", torch.zeros(()))

    def segments(self) -> list[nn.Module]:
        return [self.net[:2], self.net[2:]]


def test_owners_by_name() -> None:
    root = Root()
    owner = owner_by_name(root, root.segments())
    assert owner.keys() == {*dict(root.named_parameters(remove_duplicate=False)), *dict(root.named_buffers())}
    first = {name for name, stage in owner.items() if stage == 1}
    assert first == {
        "net.0.weight", "net.0.bias", "first.weight", "first.bias", "net.1.weight", "net.1.bias",
        "net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked",
    }  # fmt: skip
    assert {owner[name] for name in owner.keys() - first} == {2}


def test_every_key_of_a_state_dict_has_one_owner() -> None:
    root = Root()
    state = root.state_dict()
    parts = [keys_of_stage(state, root, root.segments(), stage) for stage in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(state)
    assert "net.2._extra_state" in parts[1]
    assert "head._extra_state" in parts[1]
    moved = [root.net[2:], root.net[:2]]
    assert "net.2._extra_state" in keys_of_stage(state, root, moved, 1)


def test_renamed_keys_are_found_by_their_memory() -> None:
    root = Root()
    renamed = {
        f"model.{name.replace('.', '_')}" if isinstance(value, Tensor) else name: value
        for name, value in root.state_dict().items()
    }
    assert "model.net_0_weight" in renamed
    parts = [keys_of_stage(renamed, root, root.segments(), stage) for stage in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(renamed)
    assert {"model.net_0_weight", "model.first_weight", "model.net_1_running_mean"} <= set(parts[0])
    assert {"model.net_2_weight", "model.head_weight", "model.count", "net.2._extra_state"} <= set(parts[1])


def test_empty_tensors_share_no_memory() -> None:
    root = nn.Module()
    root.a, root.b = (nn.Module() for _ in range(2))
    root.a.weight, root.b.weight = (nn.Parameter(torch.empty(2, 0)) for _ in range(2))
    segments = [root.a, root.b]
    assert keys_of_stage({"x": root.a.weight, "y": root.b.weight}, root, segments, 1) == []
    assert keys_of_stage(root.state_dict(), root, segments, 1) == ["a.weight"]


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
    optimizer = make(net)
    groups = parameter_groups(optimizer)
    keep_only(optimizer, (net[:1], net[1:])[stage - 1].parameters())
    return optimizer, groups


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


def test_keep_only_keeps_groups_and_own_state() -> None:
    net = network()
    optimizer = grouped(net)
    step(net, optimizer, 1)
    keep_only(optimizer, net[0].parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 0, 0]
    assert set(optimizer.state) == set(net[0].parameters())
    before = [parameter.detach().clone() for parameter in net[1:].parameters()]
    step(net, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(net[1:].parameters(), before, strict=True))


def test_a_state_of_another_optimizer_is_refused() -> None:
    net = network()
    saved = MAKE["sgd"](net).state_dict()
    optimizer, groups = stage_of(net, grouped, 1)
    with pytest.raises(ValueError, match=r"parameter groups of sizes \[8\], this module's has \[2, 3, 1, 1\]. Resume"):
        local_optimizer_state(saved, optimizer, groups)


def ids(groups: Any) -> list[list[int]]:
    return [[id(parameter) for parameter in group] for group in groups]


def test_groups_that_were_added_or_replaced_are_adopted() -> None:
    a, b, c, d, e = (nn.Parameter(torch.zeros(1)) for _ in range(5))
    optimizer = torch.optim.SGD([{"params": [a, b]}, {"params": [c]}], lr=0.1)
    groups, own = parameter_groups(optimizer), [a, d]
    keep_only(optimizer, own)
    assert ids(adopt_groups(optimizer, groups, own)) == ids(groups), "nothing has changed"

    optimizer.add_param_group({"params": [e, d]})
    groups = adopt_groups(optimizer, groups, own)
    assert ids(groups) == ids([[a, b], [c], [e, d]])
    assert ids(group["params"] for group in optimizer.param_groups) == ids([[a], [], [d]])

    # Whoever restores groups by the names of their parameters gives the whole module's.
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [b, a]}]
    groups = adopt_groups(optimizer, groups, own)
    assert ids(groups) == ids([[b, a]])
    assert ids(group["params"] for group in optimizer.param_groups) == ids([[a]])


def test_options_of_groups_are_given_back() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam([{"params": [parameter]}], lr=rate, betas=(0.8, 0.9))
    restore = keep_options(optimizer)
    (group,) = optimizer.param_groups
    group["lr"].fill_(7.0)
    group["betas"] = (0.1, 0.2)
    group["params"] = []
    restore()
    assert group["lr"] is rate
    assert float(rate) == 0.5
    assert group["betas"] == (0.8, 0.9)
    assert group["params"] == [], "which parameters there are is not an option"
