"""Tests of ``ranks.py``: one process agrees with itself, several by gloo; weights and states arrive where they should.

A function that runs on the ranks asserts there; ``run_ranks`` shows the first rank's failure.
"""

from __future__ import annotations

import logging
import os
import pickle
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_ddg.comm.link import Link
from lightning_ddg.comm.mailbox import PeerError
from lightning_ddg.comm.ranks import LocalRanks, PipelineRanks, Ranks
from lightning_ddg.core.execution import Channel, Observer
from tests.harness import run_ranks

CPU = torch.device("cpu")
NEWS = Channel("news")


def connect() -> PipelineRanks:
    size = int(os.environ["WORLD_SIZE"])
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=size)
    return PipelineRanks.connect(size, CPU, timedelta(seconds=30), "gloo")


# ---- alone


def test_one_process_agrees_with_itself() -> None:
    ranks: Ranks = LocalRanks(3)
    assert (ranks.rank, ranks.size, ranks.num_stages, ranks.stage, ranks.others) == (0, 1, 3, None, [])
    assert ranks.reads
    assert ranks.is_rank_zero
    ranks.barrier()
    assert ranks.broadcast("text", src=0) == "text"
    assert [ranks.agree(decision, all) for decision in (True, False) for all in (True, False)] == [
        True, True, False, False
    ]  # fmt: skip
    assert ranks.gather({"a": 1}) == []
    ranks.share(nn.Linear(1, 1), ["weight"], [0])
    assert ranks.link(Link(0.0, 0.25)) == Link(0.0, 0.25)
    assert ranks.abort("a reason") == "a reason"
    ranks.disconnect()


def test_one_process_has_no_mesh() -> None:
    with pytest.raises(RuntimeError, match="There is no device mesh in one process, nor before the Trainer"):
        _ = LocalRanks(2).mesh


def test_one_process_has_nobody_to_write_to() -> None:
    mailbox = LocalRanks(2).mailbox
    mailbox.send([], NEWS, "to nobody")
    assert not mailbox.has(1, NEWS)
    alone = r"There is no rank 1 to exchange a message \(news\) with: this process trains all stages"
    with pytest.raises(RuntimeError, match=alone):
        mailbox.take(1, NEWS)
    with pytest.raises(RuntimeError, match=alone):
        mailbox.send([1, 2], NEWS, "to somebody")


# ---- several


class Waits(Observer):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, str]] = []

    def before_take(self, source: int, channel: Channel) -> None:
        self.seen.append(("before", source, channel.name))

    def after_take(self, source: int, channel: Channel) -> None:
        self.seen.append(("after", source, channel.name))


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def agree() -> None:
    ranks = connect()
    last = ranks.size - 1
    assert ranks.rank == int(os.environ["LOCAL_RANK"])
    assert ranks.stage == ranks.size - ranks.rank
    assert ranks.others == [rank for rank in range(ranks.size) if rank != ranks.rank]
    assert ranks.reading_rank == last
    assert ranks.reads == (ranks.rank == last)
    assert ranks.is_rank_zero == (ranks.rank == 0)
    assert ranks.mesh.mesh_dim_names == ("data", "stage")
    assert ranks.mesh.shape == (1, ranks.size)
    ranks.barrier()
    assert ranks.broadcast(f"of {ranks.rank}", src=last) == f"of {last}"
    assert ranks.agree(True)
    assert not ranks.agree(ranks.rank == 1)
    assert ranks.agree(ranks.rank == 1, all=False)
    assert not ranks.agree(False, all=False)
    ranks.disconnect()
    ranks.disconnect()
    again = connect()
    assert again.mesh is ranks.mesh
    again.disconnect()


def test_several_processes_agree_and_keep_their_mesh() -> None:
    run_ranks(agree, 3)


def look_on() -> list[str]:
    log, lines = logging.getLogger("lightning_ddg.comm"), Lines()
    log.addHandler(lines)
    log.setLevel(logging.DEBUG)
    ranks, waits = connect(), Waits()
    end = ranks.observers.subscribe(waits)
    peer = ranks.others[0]
    for number in range(3):
        ranks.mailbox.send(peer, NEWS, number)
    assert [ranks.mailbox.take(peer, NEWS) for _ in range(2)] == [0, 1]
    assert waits.seen == [("before", peer, "news"), ("after", peer, "news")] * 2
    end()
    ranks.mailbox.take(peer, NEWS)
    assert len(waits.seen) == 4
    ranks.disconnect()
    return lines.lines


def test_observers_are_told_of_waits_and_the_log_of_what_is_new() -> None:
    lines = run_ranks(look_on, 2)[0]
    assert lines[0] == "Rank 0 (stage 2) is connected as one of 2, on cpu"
    for verb in ("sends", "receives"):
        assert lines.count(f"Rank 0 (stage 2) {verb} a first message (news): Rank 1 (stage 1)") == 1
    assert "Rank 0 (stage 2) disconnects" in lines


def measure() -> Link:
    ranks = connect()
    link = ranks.link(Link(1.0, 1.0))
    ranks.disconnect()
    return link


def test_a_byte_takes_some_time_and_all_ranks_see_it() -> None:
    first, second, third = run_ranks(measure, 3)
    assert first == second == third
    # No loopback is as slow as a megabyte a second; on a busy machine no byte may seem to take any time.
    assert 0.0 <= first.seconds_per_byte < 1e-6
    # A message of one byte: no two processes talk in a microsecond.
    assert 1e-6 < first.latency < 1.0


# ---- weights and states


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
    ranks = connect()
    net = Net(10.0 + ranks.rank)
    before = [net.first.weight, net.second.running_mean, net.count]
    ranks.share(net, names[ranks.rank], sources)
    # What was sent may be modified at once.
    result = values(net)
    with torch.no_grad():
        net.first.weight.fill_(-1.0)
    ranks.disconnect()
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


def share_what_a_forward_has_made() -> tuple[dict[str, Any], list[str]]:
    ranks = connect()
    net = Net(10.0)
    if ranks.is_rank_zero:
        net.second.register_buffer("index", torch.arange(3), persistent=False)
        net.second.register_buffer("scale", torch.tensor([7.0]))
        net.register_buffer("count", torch.tensor([5, 6]))
    ranks.share(net, ["second.index", "second.scale", "count"], [0])
    ranks.disconnect()
    return {name: tensor.tolist() for name, tensor in net.named_buffers()}, list(net.state_dict())


def test_a_buffer_that_only_its_owner_has_is_made() -> None:
    first, second = run_ranks(share_what_a_forward_has_made, 2)
    assert first == second
    found, saved = second
    assert (found["second.index"], found["second.scale"], found["count"]) == ([0, 1, 2], [7.0], [5, 6])
    assert "second.scale" in saved
    assert "second.index" not in saved


def gather(after_disconnecting: bool) -> Any:
    ranks = connect()
    if after_disconnecting:
        ranks.disconnect()
    own: dict[Any, Any] = {ranks.rank: torch.full((2,), float(ranks.rank)), "text": f"of {ranks.rank}"}
    got = ranks.gather(own)
    own[ranks.rank].zero_()
    ranks.disconnect()
    return got


@pytest.mark.parametrize("after_disconnecting", [False, True])
def test_rank_zero_gets_what_the_others_have(after_disconnecting: bool) -> None:
    first, *others = run_ranks(gather, 3, after_disconnecting)
    assert others == [[], []]
    assert [part["text"] for part in first] == ["of 1", "of 2"]
    assert torch.equal(first[0][1], torch.ones(2))
    assert torch.equal(first[1][2], torch.full((2,), 2.0))


def fail() -> str:
    ranks = connect()
    if ranks.rank == 1:
        reason = ranks.abort("Rank 1 ran out of luck")
    else:
        with pytest.raises(PeerError, match="Rank 1 ran out of luck"):
            ranks.mailbox.take(1, NEWS)
        reason = ranks.abort("a consequence")
    assert ranks.abort("a later one") == reason
    with pytest.raises(PeerError, match="No checkpoint can be assembled, as other stages are out of reach. Rank 1"):
        ranks.gather({})
    ranks.disconnect()
    return reason


def test_the_first_failure_is_known_to_all_and_ends_what_is_collective() -> None:
    assert run_ranks(fail, 2) == ["Rank 1 ran out of luck"] * 2


def test_one_process_can_be_pickled() -> None:
    """As where a Trainer is given to processes that it spawns."""
    assert pickle.loads(pickle.dumps(LocalRanks(3))).replicas.size == 1
