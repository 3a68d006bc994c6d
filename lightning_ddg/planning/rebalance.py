"""From what the stages of a fit really took to a cut that would be better, and the sentence that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from lightning_ddg.network.balance import best_cut, forbidden_cuts
from lightning_ddg.network.cut import CostModel, Cut
from lightning_ddg.planning.report import split_points_line
from lightning_ddg.planning.tally import Tally
from lightning_ddg.planning.units import show_ms

IDLE = 0.2
# Of the slowest stage's time: below that, what is estimated may be noise.
_BETTER = 0.05


class Proposal(NamedTuple):
    """Another cut, by the layers that begin stages ``2..K``, and what its slowest stage should take for a batch."""

    split_points: list[str]
    seconds: float


def shared_out(costs: Sequence[float], starts: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Share each stage's seconds out among its layers, in proportion to their costs, or evenly if these are 0."""
    shares: list[float] = []
    for (start, stop), whole in zip(pairwise([0, *starts, len(costs)]), seconds, strict=True):
        total = sum(costs[start:stop])
        shares += [whole * cost / total if total else whole / (stop - start) for cost in costs[start:stop]]
    return shares


def better_cut(cut: Cut, seconds: Sequence[float], max_memory: int | None = None) -> Proposal | None:
    """Return the cut whose slowest stage is fastest by what the stages took, if it is clearly faster than now.

    Args:
        cut: The cut that was trained with.
        seconds: For how long each of its stages was busy per batch.
        max_memory: Bytes that no stage may need.
    """
    forbidden, num_stages = forbidden_cuts(cut.chain), len(seconds)
    if cut.costs.model is None:
        layers = shared_out(cut.costs.of_layers, cut.starts, seconds)
        starts = best_cut(layers, num_stages, forbidden)
        slowest = max(sum(layers[start:stop]) for start, stop in pairwise([0, *starts, len(layers)]))
    else:
        model = _scaled(cut.costs.model, cut.starts, seconds)
        starts = model.best_stages(num_stages, forbidden, max_memory)
        slowest = max(model.stage_seconds(starts))
    if slowest > (1 - _BETTER) * max(seconds):
        return None
    return Proposal([cut.chain.names[start] for start in starts], slowest)


def _scaled(model: CostModel, starts: Sequence[int], seconds: Sequence[float]) -> CostModel:
    """What the layers would have cost if each stage had taken what it took, messages left out."""
    model = replace(model, seconds_per_byte=0.0)
    forward, backward = [], []
    bounds = pairwise([0, *starts, len(model.profile.forward)])
    for (start, stop), took, should in zip(bounds, seconds, model.stage_seconds(starts), strict=True):
        if should:
            forward += [took * there / should for there in model.profile.forward[start:stop]]
            backward += [took * back / should for back in model.profile.backward[start:stop]]
        else:
            forward += [0.0] * (stop - start)
            backward += [took / (stop - start)] * (stop - start)
    return replace(model, profile=replace(model.profile, forward=forward, backward=backward))


def idle_warning(cut: Cut, tallies: Sequence[Tally], max_memory: int | None = None) -> str | None:
    """Return what to say where a stage waits for more than a fifth of the time; ``None`` where none does."""
    idlest = max(tallies, key=lambda tally: tally.waiting)
    if idlest.waiting <= IDLE:
        return None
    slowest = max(tallies, key=lambda tally: tally.busy)
    text = (
        f"Stage {tallies.index(idlest) + 1} waits {idlest.waiting:.0%} of the time"
        f" ({idlest.activations / idlest.seconds:.0%} for activations, {idlest.gradients / idlest.seconds:.0%} for"
        f" gradients): stage {tallies.index(slowest) + 1} is busy for {show_ms(slowest.busy)} of its"
        f" {show_ms(slowest.seconds / slowest.batches)} per batch."
    )
    proposal = better_cut(cut, [tally.busy for tally in tallies], max_memory)
    if proposal is None:
        return (
            f"{text} No other cut of the {len(cut.chain)} layers is clearly better: use fewer stages, or return smaller"
            " layers from `configure_stages()`."
        )
    points = split_points_line(proposal.split_points)
    text += f" A better cut, with about {show_ms(proposal.seconds)} per batch: {points}"
    if cut.costs.model is None:
        text += (
            f" (a stage's time shared out among its layers by their {cut.costs.unit}, as they were not measured;"
            " `lightning-ddg plan` measures them)"
        )
    return text
