"""The figures of a cut's stages: how long they take, what they send and keep, and how fast they train together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lightning_ddg.network.cut import CostModel
from lightning_ddg.network.layers import Layers
from lightning_ddg.network.profile import parameter_costs
from lightning_ddg.planning.simulate import SteadyState, Work, steady_state


@dataclass(frozen=True)
class StagePlan:
    """One stage of a planned cut.

    Attributes:
        layers: The names of its layers, in order.
        parameters: The number of its parameters.
        seconds: What its forward and backward take.
        share: Its part of the time of all stages, in 0..1.
        sends: Bytes it sends per batch: activations on, gradients back.
        in_flight: Bytes of the batches between forward and backward: activations, the weights stashed for them, and the
            messages that wait for their turn.
        memory: Bytes of all it holds: weights, their gradients, optimizer state, and what is in flight.
    """

    layers: list[str]
    parameters: int
    seconds: float
    share: float
    sends: int
    in_flight: int
    memory: int


@dataclass(frozen=True)
class CutPlan:
    """A network in K stages.

    Attributes:
        stages: The stages, input side first.
        split_points: Names of the layers that begin stages ``2..K``.
        work: How long the work and the messages take.
        steady_state: What the simulated schedule settles into.
    """

    stages: list[StagePlan]
    split_points: list[str]
    work: Work
    steady_state: SteadyState


def work_of(model: CostModel, starts: Sequence[int]) -> Work:
    """Return how long the work of a cut's stages and its messages take; a forward done again is its backward's."""
    profile = model.profile
    bounds = [0, *starts, len(profile.forward)]
    forward, backward = (
        [sum(values[start:stop]) for start, stop in pairwise(bounds)] for values in (profile.forward, profile.backward)
    )
    send, send_grad = (
        [sizes[start] * model.seconds_per_byte for start in starts]
        for sizes in (profile.crossing, profile.crossing_grad)
    )
    work = Work(forward, backward, send, send_grad, model.latency, model.slack)
    return work.recomputed() if model.recompute else work


def plan_cut(chain: Layers, model: CostModel, starts: Sequence[int]) -> CutPlan:
    """Return the figures of a cut, whose stages 2 to K begin at the layers ``starts``."""
    bounds = list(pairwise([0, *starts, len(chain)]))
    work, counts = work_of(model, starts), parameter_costs(chain)
    sends, in_flight, memory = (of(starts) for of in (model.stage_sends, model.stage_in_flight, model.stage_memory))
    stages = [
        StagePlan(chain.names[start:stop], int(sum(counts[start:stop])), seconds, seconds / sum(work.busy), *sizes)
        for (start, stop), seconds, *sizes in zip(bounds, work.busy, sends, in_flight, memory, strict=True)
    ]
    return CutPlan(stages, [chain.names[start] for start in starts], work, steady_state(work))
