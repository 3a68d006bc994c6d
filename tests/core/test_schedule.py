"""Tests of ``schedule.py``: the formulas against the paper's definitions. Change a figure only with the algorithm."""

from __future__ import annotations

import pytest

from lightning_ddg.core.rng import seed_of
from lightning_ddg.core.schedule import crossings, delay, rank_of_stage, stage_of_rank


def test_the_last_stage_has_no_delay_and_each_earlier_one_a_batch_more() -> None:
    assert [delay(stage, 4) for stage in (1, 2, 3, 4)] == [3, 2, 1, 0]
    assert delay(1, 1) == 0


def test_slack_gives_each_boundary_as_many_batches_more() -> None:
    assert [delay(stage, 4, 2) for stage in (1, 2, 3, 4)] == [9, 6, 3, 0]
    assert [crossings(stage, 4) for stage in (1, 2, 3, 4)] == [3, 2, 1, 0]
    assert delay(1, 1, 5) == 0


@pytest.mark.parametrize(("stage", "num_stages"), [(0, 2), (3, 2), (-1, 4), (1, 0)])
def test_a_stage_that_does_not_exist(stage: int, num_stages: int) -> None:
    with pytest.raises(ValueError, match=f"stage={stage} does not exist: with num_stages={num_stages} there are 1 to"):
        delay(stage, num_stages)


@pytest.mark.parametrize("num_stages", [1, 2, 5])
def test_ranks_and_stages_are_inverse(num_stages: int) -> None:
    assert stage_of_rank(0, num_stages) == num_stages
    assert [rank_of_stage(stage_of_rank(rank, num_stages), num_stages) for rank in range(num_stages)] == list(
        range(num_stages)
    )
    assert [stage_of_rank(rank, num_stages) for rank in range(num_stages, 2 * num_stages)] == [
        stage_of_rank(rank, num_stages) for rank in range(num_stages)
    ]


def test_seeds_are_distinct_and_in_range() -> None:
    keys = [(b, s, t, p) for b in (0, 1, 2**63, 2**64 - 1) for s in range(5) for t in range(200) for p in (0, 1)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Neighbours should differ in about half of the 63 bits.
    distances = [(seed_of(7, 1, t) ^ seed_of(7, 1, t + 1)).bit_count() for t in range(200)]
    assert 25 < sum(distances) / len(distances) < 38


def test_seeds_stay_the_same_from_version_to_version() -> None:
    assert seed_of(0, 0, 0) == 1279368494785126216
    assert seed_of(42, 1, 0) == 6837566976101104647
    assert seed_of(42, 2, 1000, 1) == 4454273432069224408
    assert seed_of(2**64 - 1, 8, 2**40) == 2222396808175972831
