"""Tests of ``gathering.py``: readings of two ranks, with queues in the place of the connection."""

from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

from lightning_ddg.core.staged import LocalMailbox
from lightning_ddg.observe.gathering import Gathering
from lightning_ddg.observe.metrics import Reading
from lightning_ddg.planning.tally import Tally


def gatherings() -> list[Gathering]:
    """Those of two ranks; stage 2 is on rank 0."""
    queues: Any = defaultdict(deque)
    return [
        Gathering(
            SimpleNamespace(  # type: ignore[arg-type]
                mailbox=LocalMailbox(rank, 2, queues), is_rank_zero=rank == 0, others=[1 - rank], num_stages=2
            )
        )
        for rank in (0, 1)
    ]


def test_a_batch_is_complete_when_the_readings_of_all_stages_have_come() -> None:
    zero, one = gatherings()
    own, other = Reading(2, 9, 4, Tally(batches=10, seconds=2.0)), Reading(1, 9, 4, Tally(batches=10, seconds=3.0))
    assert zero.add([own]) == []
    assert one.add([other]) == []
    assert zero.add([]) == [{1: other, 2: own}]
    assert zero.add([]) == zero.rest() == []
    assert (zero.totals, one.totals) == ({1: other.tally, 2: own.tally}, {})


def test_the_last_readings_count_in_the_totals_alone_and_what_is_incomplete_is_left() -> None:
    zero, one = gatherings()
    late, early = Reading(1, 7, 7, Tally(due=2)), Reading(1, 3, 3, Tally(due=4))
    one.add([late, early, Reading(1, 8, None, Tally(due=1))])
    assert zero.add([]) == []
    assert zero.totals == {1: Tally(due=7)}
    assert zero.rest() == [{1: early}, {1: late}]
    assert zero.rest() == []
