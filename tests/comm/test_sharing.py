"""Tests of ``sharing.py`` on real processes: weights and states arrive where they are wanted, and nowhere else."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from lightning_ddg.comm.mailbox import GroupMailbox
from lightning_ddg.comm.sharing import gather_to_rank_zero, share_with_all
from tests.harness import run_ranks


def connect() -> GroupMailbox:
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    names = [f"rank {rank}" for rank in range(dist.get_world_size())]
    return GroupMailbox(cast(dist.ProcessGroup, dist.group.WORLD), torch.device("cpu"), timedelta(seconds=30), names)


class Net(nn.Module):
    """Every value is the rank's number; ``count`` is not persistent, ``tied`` a second name."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.tied = self.first
        self.register_buffer("count", torch.tensor(5), persistent=False)
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                tensor.fill_(value)


def values(net: Net) -> dict[str, Any]:
    return {name: float(tensor.flatten()[0]) for name, tensor in (*net.named_parameters(), *net.named_buffers())}


def share(names: list[list[str]], sources: list[int]) -> tuple[dict[str, Any], list[bool]]:
    transport = connect()
    net = Net(10.0 + transport.rank)
    before = [net.first.weight, net.second.running_mean, net.count]
    share_with_all(transport, net, names[transport.rank], sources)
    # What was sent may be modified at once.
    result = values(net)
    with torch.no_grad():
        net.first.weight.fill_(-1.0)
    transport.close()
    kept = [a is b for a, b in zip(before, [net.first.weight, net.second.running_mean, net.count], strict=True)]
    return result, [*kept, net.first.weight.requires_grad, net.first.weight.is_leaf, net.tied is net.first]


def test_every_rank_gets_what_the_others_give() -> None:
    own = [["count", "second.running_mean", "second.weight"], ["first.weight", "tied.weight", "not a tensor's name"]]
    for rank, (got, facts) in enumerate(run_ranks(share, 2, own, [0, 1])):
        assert {name: got[name] for name in ("count", "second.running_mean", "second.weight")} == {
            "count": 10, "second.running_mean": 10.0, "second.weight": 10.0
        }  # fmt: skip
        assert got["first.weight"] == 11.0
        assert got["first.bias"] == got["second.bias"] == 10.0 + rank, "nobody gave it"
        assert all(facts), facts


def test_only_the_sources_give() -> None:
    own = [["first.bias"], ["first.weight"], ["first.weight"]]
    for rank, (got, _) in enumerate(run_ranks(share, 3, own, [0])):
        assert got["first.bias"] == 10.0
        assert got["first.weight"] == 10.0 + rank


def gather() -> Any:
    transport = connect()
    own: dict[Any, Any] = {transport.rank: torch.full((2,), float(transport.rank)), "text": f"of {transport.rank}"}
    got = gather_to_rank_zero(transport, own)
    own[transport.rank].zero_()
    transport.close()
    return got


def test_rank_zero_gets_what_the_others_have() -> None:
    first, *others = run_ranks(gather, 3)
    assert others == [[], []]
    assert [part["text"] for part in first] == ["of 1", "of 2"]
    assert torch.equal(first[0][1], torch.ones(2))
    assert torch.equal(first[1][2], torch.full((2,), 2.0))
