"""Delays and ranks: the whole schedule of decoupled parallel backpropagation.

At iteration t stage k of K runs the forward of batch t and the backward of batch t - d(k), with d(k) = K - k. With
K = 3, input side first (F4: forward of batch 4; B2: backward of batch 2)::

    iteration      0       1       2       3       4
    stage 1       F0      F1      F2 B0   F3 B1   F4 B2     d = 2
    stage 2       F0      F1 B0   F2 B1   F3 B2   F4 B3     d = 1
    stage 3       F0 B0   F1 B1   F2 B2   F3 B3   F4 B4     d = 0

A gradient comes back from the next stage in the iteration after it was made there. Over a link that takes long, a slack
s gives it s iterations more: d(k) = (K - k)(1 + s), which is written in :func:`delay` and nowhere else.

Where a batch is split into micro-batches, these are what travels, one in each iteration, and d counts them; a step is
made when all those of a batch have gone.
"""

from __future__ import annotations


def crossings(stage: int, num_stages: int) -> int:
    """Return how many boundaries the gradient of stage ``k`` has crossed: ``K - k``.

    Raises:
        ValueError: If ``stage`` is not in ``1..num_stages``.
    """
    if not 1 <= stage <= num_stages:
        raise ValueError(f"stage={stage} does not exist: with num_stages={num_stages} there are 1 to {num_stages}.")
    return num_stages - stage


def delay(stage: int, num_stages: int, slack: int = 0) -> int:
    """Return the delay ``d(k) = (K - k)(1 + s)`` of stage ``k``, in batches (arXiv 1804.10574, section 4.1, has s = 0).

    Args:
        stage: ``k``.
        num_stages: ``K``.
        slack: ``s``, the batches more that are in flight between a stage and the next.

    Raises:
        ValueError: If ``stage`` is not in ``1..num_stages``.
    """
    return crossings(stage, num_stages) * (1 + slack)


def stage_of_rank(rank: int, num_stages: int) -> int:
    """Return the stage of a global rank. Rank 0 has the last, with the loss: Lightning's rank 0 logs and decides."""
    return num_stages - rank % num_stages


def rank_of_stage(stage: int, num_stages: int) -> int:
    """Return the rank within its pipeline that has a stage; the inverse of :func:`stage_of_rank` in the first one."""
    return num_stages - stage


def delay_in_updates(num_stages: int, micro_batches: int, slack: int = 0) -> int:
    """Return the greatest delay in updates where a step is made every ``m`` micro-batches: ``ceil(d(1) / m)``."""
    return -(-delay(1, num_stages, slack) // micro_batches)


def least_micro_batches(num_stages: int, slack: int = 0) -> int:
    """Return the fewest micro-batches of a batch for a delay of at most one update: ``d(1)``, and at least 1."""
    return max(1, delay(1, num_stages, slack))


def enough_micro_batches(length: int, num_stages: int, slack: int = 0) -> int:
    """Return into how many micro-batches a batch is split for a delay of at most one update.

    ``d(1)`` are enough; up to twice as many are taken if that splits the batch evenly, and never more than samples.

    >>> [enough_micro_batches(length, 4) for length in (12, 8, 7, 2)]
    [3, 4, 3, 2]
    """
    least = least_micro_batches(num_stages, slack)
    even = (parts for parts in range(least, 2 * least + 1) if length % parts == 0)
    return max(1, min(length, next(even, least)))
