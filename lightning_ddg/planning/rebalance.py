"""From what the stages of a fit really took to a cut that would be better, and the sentence that says so.

Numbers and names in, a cut and text out; where a network may be cut at all is decided in
:mod:`~lightning_ddg.network`. What counts as idle, and as better, may be changed here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from lightning_ddg.network.cut import best_cut, best_stages, forbidden_cuts, stage_seconds
from lightning_ddg.network.profile import Profile
from lightning_ddg.observe.metrics import Tally
from lightning_ddg.planning.units import show_ms
from lightning_ddg.plugin.measure import Cut

IDLE = 0.2
# Of the slowest stage's time: below that, what is estimated may be noise.
_BETTER = 0.05


class Proposal(NamedTuple):
    """Another cut.

    Attributes:
        split_points: Names of the layers that begin stages ``2..K``.
        seconds: What its slowest stage should take for a batch.
    """

    split_points: list[str]
    seconds: float


def shared_out(costs: Sequence[float], starts: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Shares each stage's seconds out among its layers, in proportion to what they cost, or evenly if that is nothing.

    Args:
        costs: Cost of each layer, in any unit.
        starts: The start positions of stages 2 to K.
        seconds: Of each stage.
    """
    shares: list[float] = []
    for (start, stop), whole in zip(pairwise([0, *starts, len(costs)]), seconds, strict=True):
        total = sum(costs[start:stop])
        shares += [whole * cost / total if total else whole / (stop - start) for cost in costs[start:stop]]
    return shares


def better_cut(cut: Cut, seconds: Sequence[float], max_memory: int | None = None) -> Proposal | None:
    """The cut whose slowest stage is fastest by what the stages took, if it is clearly faster than now.

    Args:
        cut: The cut that was trained with.
        seconds: What each of its stages was busy per batch.
        max_memory: Bytes that no stage may need.
    """
    forbidden, num_stages = forbidden_cuts(cut.chain), len(seconds)
    if cut.measured is None:
        layers = shared_out(cut.costs, cut.starts, seconds)
        starts = best_cut(layers, num_stages, forbidden)
        slowest = max(sum(layers[start:stop]) for start, stop in pairwise([0, *starts, len(layers)]))
    else:
        profile, copies = cut.measured.profile, cut.measured.optimizer_copies
        today = _scaled(profile, cut.starts, seconds)
        starts = best_stages(today, num_stages, forbidden, max_memory=max_memory, optimizer_copies=copies)
        slowest = max(stage_seconds(today, starts))
    if slowest > (1 - _BETTER) * max(seconds):
        return None
    return Proposal([cut.chain.names[start] for start in starts], slowest)


def _scaled(profile: Profile, starts: Sequence[int], seconds: Sequence[float]) -> Profile:
    """What the layers would have cost if each stage had taken what it took, messages left out."""
    forward, backward = [], []
    modelled = stage_seconds(profile, starts)
    for (start, stop), took, should in zip(
        pairwise([0, *starts, len(profile.forward)]), seconds, modelled, strict=True
    ):
        if should:
            forward += [took * there / should for there in profile.forward[start:stop]]
            backward += [took * back / should for back in profile.backward[start:stop]]
        else:
            forward += [0.0] * (stop - start)
            backward += [took / (stop - start)] * (stop - start)
    return replace(profile, forward=forward, backward=backward)


def idle_warning(cut: Cut, tallies: Sequence[Tally], max_memory: int | None = None) -> str | None:
    """What to say where a stage waits for more than a fifth of the time; ``None`` where none does.

    Args:
        cut: The cut.
        tallies: What was measured of each stage, input side first.
        max_memory: Bytes that no stage may need.
    """
    idlest = max(tallies, key=lambda tally: tally.waiting)
    if idlest.waiting <= IDLE:
        return None
    seconds = [tally.busy for tally in tallies]
    slowest = max(tallies, key=lambda tally: tally.busy)
    text = (
        f"Stage {tallies.index(idlest) + 1} waits {idlest.waiting:.0%} of the time"
        f" ({idlest.activations / idlest.seconds:.0%} for activations, {idlest.gradients / idlest.seconds:.0%} for"
        f" gradients): stage {tallies.index(slowest) + 1} is busy for {show_ms(slowest.busy)} of its"
        f" {show_ms(slowest.seconds / slowest.batches)} per batch."
    )
    proposal = better_cut(cut, seconds, max_memory)
    if proposal is None:
        return (
            f"{text} No other cut of the {len(cut.chain)} layers is clearly better: use fewer stages, or return smaller"
            " layers from `configure_stages()`."
        )
    points = json.dumps(proposal.split_points, ensure_ascii=False)
    text += f" A better cut, with about {show_ms(proposal.seconds)} per batch: split_points: {points}"
    if cut.measured is None:
        text += (
            f" (a stage's time shared out among its layers by their {cut.unit}, as they were not measured;"
            " `lightning-ddg plan` measures them)"
        )
    return text
