"""Tests of ``ownership.py``: every tensor has one owner, and an optimizer keeps its own stage's parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.plugin.ownership import OptimizerGroups, Ownership, check_state_form, keep_options
from tests.plugin.test_checkpoint import grouped, network, step


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
    owner = Ownership(root, root.segments()).by_name
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
    parts = [Ownership(root, root.segments(), stage).own_keys(state) for stage in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(state)
    assert "net.2._extra_state" in parts[1]
    assert "head._extra_state" in parts[1]
    moved = [root.net[2:], root.net[:2]]
    assert "net.2._extra_state" in Ownership(root, moved, 1).own_keys(state)


def test_renamed_keys_are_found_by_their_memory() -> None:
    root = Root()
    renamed = {
        f"model.{name.replace('.', '_')}" if isinstance(value, Tensor) else name: value
        for name, value in root.state_dict().items()
    }
    assert "model.net_0_weight" in renamed
    parts = [Ownership(root, root.segments(), stage).own_keys(renamed) for stage in (1, 2)]
    assert sorted(parts[0] + parts[1]) == sorted(renamed)
    assert {"model.net_0_weight", "model.first_weight", "model.net_1_running_mean"} <= set(parts[0])
    assert {"model.net_2_weight", "model.head_weight", "model.count", "net.2._extra_state"} <= set(parts[1])


def test_empty_tensors_share_no_memory() -> None:
    root = nn.Module()
    root.a, root.b = (nn.Module() for _ in range(2))
    root.a.weight, root.b.weight = (nn.Parameter(torch.empty(2, 0)) for _ in range(2))
    segments = [root.a, root.b]
    assert Ownership(root, segments, 1).own_keys({"x": root.a.weight, "y": root.b.weight}) == []
    assert Ownership(root, segments, 1).own_keys(root.state_dict()) == ["a.weight"]


def test_a_buffer_that_a_forward_makes_belongs_where_its_module_does() -> None:
    root = Root()
    owners = [Ownership(root, root.segments(), stage) for stage in (1, 2)]
    root.net[1].register_buffer("later", torch.zeros(1))
    root.net[3].register_buffer("later", torch.zeros(1))
    root.head.register_buffer("later", torch.zeros(1))
    found = [[name for name in owner.own_names if "later" in name] for owner in owners]
    assert found == [["net.1.later"], ["net.3.later", "head.later"]]
    assert owners[0].names_outside(lambda tensor: not tensor.requires_grad) == ["count", "head.later"]


def test_what_lies_outside_the_network() -> None:
    root = Root()
    ownership = Ownership(root, root.segments(), 1, [list(part) for part in root.segments()])
    assert ownership.names_outside(lambda tensor: True) == ["head.weight", "head.bias", "count"]
    assert ownership.names_outside(lambda tensor: not tensor.requires_grad) == ["count"]
    assert [id(one) for one in ownership.parameters_outside] == [id(one) for one in root.head.parameters()]
    assert {name: stage for name, stage in ownership.by_name.items() if name == "count"} == {"count": 2}
    assert ownership.foreign_layers == {root.net[2]: 2, root.net[3]: 2}
    assert Ownership(root, root.segments()).foreign_layers == {}
    assert ownership.parameter_names == [
        ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"],
        ["net.2.weight", "net.2.bias", "net.3.weight", "net.3.bias", "head.weight", "head.bias"],
    ]
    assert [id(one) for one in ownership.own_parameters] == [id(one) for one in root.net[:2].parameters()]


def test_keep_only_keeps_groups_and_own_state() -> None:
    net = network()
    optimizer = grouped(net)
    step(net, optimizer, 1)
    OptimizerGroups(optimizer, Ownership(net, [net[:1], net[1:]], 1))
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 0, 0]
    assert set(optimizer.state) == set(net[0].parameters())
    before = [parameter.detach().clone() for parameter in net[1:].parameters()]
    step(net, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(net[1:].parameters(), before, strict=True))


def ids(groups: Any) -> list[list[int]]:
    return [[id(parameter) for parameter in group] for group in groups]


def test_groups_that_were_added_or_replaced_are_adopted() -> None:
    a, b, c, d, e = (nn.Parameter(torch.zeros(1)) for _ in range(5))
    stages = [nn.ParameterList([a, d]), nn.ParameterList([b, c, e])]
    optimizer = torch.optim.SGD([{"params": [a, b]}, {"params": [c]}], lr=0.1)
    groups = OptimizerGroups(optimizer, Ownership(nn.ParameterList([a, b, c, d, e]), stages, 1))
    before = ids(groups.whole)
    groups.adopt()
    assert ids(groups.whole) == before, "nothing has changed"
    groups.show_all()
    assert ids(group["params"] for group in optimizer.param_groups) == before
    groups.adopt()
    assert ids(group["params"] for group in optimizer.param_groups) == ids([[a], []])

    optimizer.add_param_group({"params": [e, d]})
    groups.adopt()
    assert ids(groups.whole) == ids([[a, b], [c], [e, d]])
    assert ids(group["params"] for group in optimizer.param_groups) == ids([[a], [], [d]])

    # Whoever restores groups by the names of their parameters gives the whole module's.
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [b, a]}]
    groups.adopt()
    assert ids(groups.whole) == ids([[b, a]])
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


class OwnForm(torch.optim.SGD):
    def state_dict(self) -> Any:
        return {"base": super().state_dict(), "slow": []}


def test_an_optimizer_with_a_state_of_its_own_form_is_refused() -> None:
    optimizer = OwnForm(nn.Linear(1, 1).parameters(), lr=0.1)
    message = r"OwnForm.state_dict.. has the keys \['base', 'slow'\].*'param_groups'.*devices=1"
    with pytest.raises(ValueError, match=message):
        check_state_form(optimizer)
    check_state_form(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))
