"""The algorithm's bookkeeping as pure functions: delays, ranks and seeds.

Change a formula here only together with its source in the paper (arXiv 1804.10574) and its test; nothing in this file
knows about processes, devices or Lightning.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1


def delay(stage: int, num_stages: int) -> int:
    """Delay ``d(k) = K - k`` of a stage, in batches (arXiv 1804.10574, section 4.1).

    Args:
        stage: Stage ``k`` in ``1..K``, input side first.
        num_stages: Number of stages ``K``.

    Raises:
        ValueError: If ``stage`` is not in ``1..num_stages``.
    """
    if not 1 <= stage <= num_stages:
        raise ValueError(f"stage={stage} does not exist: with num_stages={num_stages} there are 1 to {num_stages}.")
    return num_stages - stage


def stage_of_rank(rank: int, num_stages: int) -> int:
    """Stage of a global rank. Rank 0 owns the last stage, with the loss: Lightning's rank 0 logs and decides."""
    return num_stages - rank % num_stages


def rank_of_stage(stage: int, num_stages: int) -> int:
    """Rank within its pipeline that owns a stage; the inverse of :func:`stage_of_rank` for the first pipeline."""
    return num_stages - stage


def seed_of(base: int, stage: int, batch: int, purpose: int = 0) -> int:
    """Seed of the random draws of one stage for one batch, in ``0..2**63 - 1``.

    Stage 0 stands for the user's step outside the network, which every rank must draw alike. ``purpose`` separates
    training (0) from evaluation (1). The mixing is the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014),
    so that neighbouring batches and stages get unrelated streams.
    """
    state = base & _MASK
    for value in (stage, batch, purpose):
        state = (state + 0x9E3779B97F4A7C15 * (value + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
