"""Tests of ``link.py``: the way between two ranks is measured."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_ddg.comm.link import measure_link
from lightning_ddg.comm.mailbox import GroupMailbox
from tests.harness import run_ranks


def measure() -> float:
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    group = dist.new_group([0, 1], backend="gloo")
    assert group is not None
    rank = dist.get_rank()
    transport = GroupMailbox(group, torch.device("cpu"), timedelta(seconds=60), ["Rank 0", "Rank 1"])
    try:
        return measure_link(transport, 1 - rank, torch.device("cpu"), first=rank == 1)
    finally:
        transport.close()
        dist.destroy_process_group()


def test_a_byte_takes_some_time_and_both_ranks_see_it() -> None:
    first, second = run_ranks(measure, 2)
    # No memory moves a terabyte in a second, and no loopback is as slow as a megabyte.
    assert all(1e-12 < seconds < 1e-6 for seconds in (first, second))
