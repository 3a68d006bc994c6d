"""What the stages of a cut cost, the cut that costs least, and who decides: the user, an earlier run, a measurement."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import inf

from torch import nn

from lightning_ddg.core.schedule import delay
from lightning_ddg.network.balance import (
    best_cut,
    cheapest_cut,
    check_cut,
    check_num_stages,
    cut_at,
    forbidden_cuts,
    sums_of_layers,
)
from lightning_ddg.network.layers import Layers
from lightning_ddg.network.profile import Profile, parameter_costs


@dataclass(frozen=True)
class CostModel:
    """What the stages of any cut of measured layers cost; a cut is given by the start positions of stages 2 to K.

    Attributes:
        profile: What was measured of the layers.
        recompute: Whether a stage with a delay keeps no activations of batches in flight, and runs its forward again.
        stash: Whether a stage with a delay keeps the weights of batches in flight.
        optimizer_copies: Tensors of a parameter's size that the optimizer keeps for it.
        seconds_per_byte: What sending or receiving a byte costs a stage.
        latency: Seconds that any message is under way besides, at no cost of a stage's.
        slack: ``s`` of the stages' delays.
    """

    profile: Profile
    recompute: bool = False
    stash: bool = True
    optimizer_copies: int = 2
    seconds_per_byte: float = 0.0
    latency: float = 0.0
    slack: int = 0

    def stage_seconds(self, starts: Sequence[int]) -> list[float]:
        """Return how long each stage is busy with a batch: forward, again if recomputed, backward, and its messages."""
        return [self._seconds(*stage) for stage in self._stages(starts)]

    def stage_memory(self, starts: Sequence[int]) -> list[int]:
        """Return the bytes that each stage needs at its fullest, between a forward and the backward that follows it.

        That is its weights and their gradients, what the optimizer keeps, and :meth:`stage_in_flight`. Not counted is
        what a layer needs only while it runs, what lies outside the network, and on the CPU the layers of the other
        stages.
        """
        return [self._memory(*stage) for stage in self._stages(starts)]

    def stage_in_flight(self, starts: Sequence[int]) -> list[int]:
        """Return the bytes that each stage holds of the batches between forward and backward.

        Stage k of K, with the delay d, holds d older sets of weights (unless nothing is stashed) and d + 1
        batches: what the layers keep for their backward (of one batch only, if forwards are done again), and what was
        received; and up to 2 + s activations and as many gradients that have arrived before their turn, with a slack s.
        (A neighbour can be no further ahead: its next forward waits for a backward here, and the other way round.)
        """
        return [self._in_flight(*stage) for stage in self._stages(starts)]

    def stage_sends(self, starts: Sequence[int]) -> list[int]:
        """Return the bytes that each stage sends per batch: activations to the next, gradients to the one before."""
        there, back = self._crossing
        return [there[stop] + back[start] for _, start, stop in self._stages(starts)]

    def best_stages(self, num_stages: int, forbidden: Collection[int] = (), max_memory: int | None = None) -> list[int]:
        """Cut the layers so that the slowest stage, its messages included, is as fast as it can be.

        Raises:
            ValueError: No cut has so many stages, or none keeps all :meth:`stage_memory` below ``max_memory``.
        """

        def seconds(stage: int, start: int, stop: int) -> float:
            late = delay(stage, num_stages, self.slack)
            fits = max_memory is None or self._memory(late, start, stop) <= max_memory
            return self._seconds(late, start, stop) if fits else inf

        def memory(stage: int, start: int, stop: int) -> float:
            return self._memory(delay(stage, num_stages, self.slack), start, stop)

        count = len(self.profile.forward)
        starts = cheapest_cut(count, num_stages, forbidden, seconds)
        if max_memory is not None and max(self.stage_memory(starts)) > max_memory:
            needed = max(self.stage_memory(cheapest_cut(count, num_stages, forbidden, memory)))
            raise ValueError(
                f"max_memory={max_memory} bytes cannot be kept with {num_stages} stages: the cut that needs least "
                f"still has a stage of about {needed} bytes. Use more stages, a smaller batch or activation "
                "checkpointing."
            )
        return starts

    def _stages(self, starts: Sequence[int]) -> list[tuple[int, int, int]]:
        """The delay of each stage, and the positions at which it starts and stops."""
        bounds = pairwise([0, *starts, len(self.profile.forward)])
        return [(delay(stage, len(starts) + 1, self.slack), *span) for stage, span in enumerate(bounds, start=1)]

    def _seconds(self, late: int, start: int, stop: int) -> float:
        there, back = self._crossing
        messages = there[start] + back[start] + there[stop] + back[stop]
        return self._compute[late > 0][start][stop - start] + self.seconds_per_byte * messages

    def _memory(self, late: int, start: int, stop: int) -> int:
        weights, frozen, _ = self._sizes
        at_rest = (2 + self.optimizer_copies) * (weights[stop] - weights[start]) + frozen[stop] - frozen[start]
        return at_rest + self._in_flight(late, start, stop)

    def _in_flight(self, late: int, start: int, stop: int) -> int:
        (weights, _, kept), (there, back) = self._sizes, self._crossing
        older = (late if self.stash else 0) * (weights[stop] - weights[start])
        activations = (1 if self.recompute else late + 1) * (kept[stop] - kept[start])
        return older + activations + (late + 1) * there[start] + (2 + self.slack) * (there[start] + back[stop])

    @cached_property
    def _compute(self) -> tuple[list[list[float]], list[list[float]]]:
        """Seconds of consecutive layers in a stage without a delay, and in one with a delay."""
        once = self.profile.seconds
        late = [forward + both for forward, both in zip(self.profile.forward, once, strict=True)]
        return sums_of_layers(once), sums_of_layers(late if self.recompute else once)

    @cached_property
    def _crossing(self) -> tuple[list[int], list[int]]:
        """Bytes across a cut before each layer, there and back, and across the network's end."""
        return [*self.profile.crossing, 0], [*self.profile.crossing_grad, 0]

    @cached_property
    def _sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Running sums of the bytes of trainable weights, of frozen ones and buffers, and of activations."""
        frozen = self.profile.frozen or [0] * len(self.profile.parameters)
        weights, rest, kept = ([0, *accumulate(s)] for s in (self.profile.parameters, frozen, self.profile.activations))
        return weights, rest, kept


@dataclass(frozen=True)
class Costs:
    """What each layer of a network costs, in a unit as it stands after "share of"; stages too, if it was measured."""

    of_layers: list[float]
    unit: str
    model: CostModel | None = None

    @classmethod
    def measured(cls, model: CostModel) -> Costs:
        """Return costs by measured time."""
        return cls(model.profile.seconds, "measured time", model)

    @classmethod
    def by_parameters(cls, chain: Layers) -> Costs:
        """Return costs by the number of parameters."""
        return cls(parameter_costs(chain), "parameters")


@dataclass(frozen=True)
class Cut:
    """A network's layers and where its stages ``2..K`` begin; ``costs`` were evened out, or are shown instead."""

    chain: Layers
    starts: list[int]
    costs: Costs

    @property
    def bounds(self) -> list[int]:
        """Where each stage begins, and the end of the last."""
        return [0, *self.starts, len(self.chain)]

    @property
    def split_points(self) -> list[str]:
        """Names of the layers that begin stages ``2..K``."""
        return [self.chain.names[start] for start in self.starts]

    def segments(self) -> list[nn.Module]:
        """Return the stages as modules, sharing the layers."""
        return [self.chain.segment(start, stop) for start, stop in pairwise(self.bounds)]

    @property
    def owners(self) -> dict[nn.Module, int]:
        """The stages of the modules with parameters or buffers that lie in one."""
        stages = self.chain.owners(self.starts)
        return {module: stage for module, stage in stages.items() if [*module.parameters(), *module.buffers()]}

    def layers_of(self, stage: int) -> Sequence[nn.Module]:
        """Return the layers of stage ``1..K``."""
        return self.chain.modules(self.bounds[stage - 1], self.bounds[stage])


def decide_cut(
    chain: Layers,
    num_stages: int,
    split_points: list[str] | None,
    recorded: list[str] | None,
    measure: Callable[[], Costs],
    max_memory: int | None = None,
    ties: bool = True,
) -> Cut:
    """Cut where the user says, else where an earlier run did, else evenly.

    Args:
        chain: The layers.
        num_stages: ``K``.
        split_points: The user's choice, if any.
        recorded: An earlier run's choice, if any; ignored where it does not fit the network, or ``max_memory``.
        measure: Returns what to even out, the same on every rank; called only if needed, and then on every rank.
        max_memory: Bytes that no stage may need.
        ties: Whether stages may share parameters.
    """
    check_num_stages(len(chain), num_stages, getattr(chain, "reasons", ()))
    forbidden = forbidden_cuts(chain, ties)
    parameters = Costs.by_parameters(chain)
    if split_points is not None:
        starts = cut_at(chain, split_points, num_stages)
        check_cut(starts, forbidden)
        return Cut(chain, starts, parameters)
    earlier: list[int] | None = None
    if recorded is not None:
        # The network, or the number of stages, may be another one since.
        with suppress(ValueError):
            starts = cut_at(chain, recorded, num_stages)
            check_cut(starts, forbidden)
            earlier = starts
    if earlier is not None and max_memory is None:
        return Cut(chain, earlier, parameters)
    # Refuses a number of stages that is not possible, before anything is measured.
    best_cut(parameters.of_layers, num_stages, forbidden)
    costs = measure()
    model = costs.model
    if model is None:
        if max_memory is not None:
            raise ValueError(
                f"max_memory={max_memory} bytes cannot be kept, as the layers could not be measured (a warning says"
                " why). Make the training step run on the first batch, or leave `max_memory` out and give"
                " `split_points`."
            )
        return Cut(chain, best_cut(costs.of_layers, num_stages, forbidden), costs)
    if earlier is not None and max_memory is not None and max(model.stage_memory(earlier)) <= max_memory:
        return Cut(chain, earlier, costs)
    return Cut(chain, model.best_stages(num_stages, forbidden, max_memory), costs)
