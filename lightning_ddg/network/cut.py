"""Where to cut: the best positions, the user's positions, the positions that may not be cut.

A cut is the list of the K - 1 positions at which stages 2 to K start; position p lies between the layers p - 1 and p.
What makes one cut better than another, and what makes a cut impossible, changes here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from itertools import accumulate, pairwise
from itertools import chain as joined
from math import isfinite

from lightning_ddg.core.schedule import delay
from lightning_ddg.network.layers import Layers
from lightning_ddg.network.profile import Profile

Cost = tuple[float, ...]


def best_cut(costs: Sequence[float], num_stages: int, forbidden: Collection[int] = ()) -> list[int]:
    """Cut layers into consecutive stages so that the dearest stage is as cheap as it can be.

    Exact, by dynamic programming in O(L^2 K) steps. Among cuts with the same dearest stage, the one whose second
    dearest stage is the cheapest is taken, and so on; among cuts with the same stage costs, the earliest.

    Args:
        costs: Cost of each layer, in any unit, none negative.
        num_stages: K.
        forbidden: Positions that may not be cut.

    Returns:
        The K - 1 start positions of stages 2 to K, ascending. Each stage has at least one layer.

    Raises:
        ValueError: ``num_stages`` is below 1 or above the number of layers, too many positions are forbidden, or a
            cost is negative or not finite.
    """
    _check_costs(costs)
    # Not differences of running sums: stages of the same layers must have the very same cost.
    load = [[0.0, *accumulate(costs[start:])] for start in range(len(costs))]
    starts = _cheapest(len(costs), num_stages, forbidden, lambda stage, start, stop: load[start][stop - start])
    assert starts is not None
    return starts


def best_stages(
    profile: Profile,
    num_stages: int,
    forbidden: Collection[int] = (),
    *,
    seconds_per_byte: float = 0.0,
    max_memory: int | None = None,
    optimizer_copies: int = 2,
) -> list[int]:
    """Cut measured layers so that the slowest stage, its messages included, is as fast as it can be.

    Exact, as :func:`best_cut`, which is the same without messages and without a limit.

    Args:
        profile: What the layers cost.
        num_stages: K.
        forbidden: Positions that may not be cut.
        seconds_per_byte: What sending or receiving a byte costs a stage.
        max_memory: Bytes that no stage may exceed, as :func:`stage_memory` counts them.
        optimizer_copies: Tensors of a parameter's size that the optimizer keeps for it.

    Returns:
        The K - 1 start positions of stages 2 to K, ascending.

    Raises:
        ValueError: As :func:`best_cut`; or no cut keeps ``max_memory``.
    """
    _check_costs(profile.seconds)
    # Not differences of running sums, as above.
    once, twice = (
        [[0.0, *accumulate(costs[start:])] for start in range(len(costs))]
        for costs in (profile.seconds, _delayed_seconds(profile))
    )
    sent = [there + back for there, back in zip(profile.crossing, profile.crossing_grad, strict=True)] + [0]
    memory = _Memory(profile, num_stages, optimizer_copies)

    def slowness(stage: int, start: int, stop: int) -> float | None:
        if max_memory is not None and memory(stage, start, stop) > max_memory:
            return None
        seconds = twice if delay(stage, num_stages) else once
        return seconds[start][stop - start] + seconds_per_byte * (sent[start] + sent[stop])

    count = len(profile.seconds)
    starts = _cheapest(count, num_stages, forbidden, slowness)
    if starts is None:
        least = _cheapest(count, num_stages, forbidden, memory)
        assert least is not None
        needed = max(stage_memory(profile, least, optimizer_copies))
        raise ValueError(
            f"max_memory={max_memory} bytes cannot be kept with {num_stages} stages: the cut that needs least "
            f"still has a stage of about {needed} bytes. Use more stages, a smaller batch or activation checkpointing."
        )
    return starts


def stage_seconds(profile: Profile, starts: Sequence[int], seconds_per_byte: float = 0.0) -> list[float]:
    """Return how long each stage is busy with a batch: forward, again if recomputed, backward, and its messages.

    Args:
        profile: What the layers cost.
        starts: The start positions of stages 2 to K.
        seconds_per_byte: What sending or receiving a byte costs a stage.
    """
    sent = [there + back for there, back in zip(profile.crossing, profile.crossing_grad, strict=True)] + [0]
    bounds = [0, *starts, len(profile.seconds)]
    return [
        sum((_delayed_seconds(profile) if delay(stage, len(bounds) - 1) else profile.seconds)[start:stop])
        + seconds_per_byte * (sent[start] + sent[stop])
        for stage, (start, stop) in enumerate(pairwise(bounds), start=1)
    ]


def _delayed_seconds(profile: Profile) -> list[float]:
    """Seconds of each layer where it is in a stage with a delay."""
    if not profile.recompute:
        return profile.seconds
    return [forward + once for forward, once in zip(profile.forward, profile.seconds, strict=True)]


def stage_memory(profile: Profile, starts: Sequence[int], optimizer_copies: int = 2) -> list[int]:
    """Return the bytes that each stage needs at its fullest, between a forward and the backward that follows it.

    Stage k of K with the delay d = K - k holds its weights and their gradients, what the optimizer keeps, d older sets
    of weights (unless nothing is stashed), and d + 1 batches in flight: what the layers keep for their backward (of one
    batch only, if forwards are done again), and what was received; and up to two activations and two gradients that
    have arrived before their turn.
    (A neighbour can be no further ahead: its next forward waits for a backward here, and the other way round.) Not
    counted is what a layer needs only while it runs, what lies outside the network, and on the CPU the layers of the
    other stages.

    Args:
        profile: What the layers cost.
        starts: The start positions of stages 2 to K.
        optimizer_copies: Tensors of a parameter's size that the optimizer keeps for it.
    """
    bounds = [0, *starts, len(profile.seconds)]
    memory = _Memory(profile, len(bounds) - 1, optimizer_copies)
    return [memory(stage, start, stop) for stage, (start, stop) in enumerate(pairwise(bounds), start=1)]


class _Memory:
    def __init__(self, profile: Profile, num_stages: int, optimizer_copies: int) -> None:
        self._weights = [0, *accumulate(profile.parameters)]
        self._kept = [0, *accumulate(profile.activations)]
        self._frozen = [0, *accumulate(profile.frozen or [0] * len(profile.parameters))]
        self._crossing, self._crossing_grad = profile.crossing, [*profile.crossing_grad, 0]
        self._num_stages, self._copies = num_stages, 2 + optimizer_copies
        self._recompute, self._stash = profile.recompute, profile.stash

    def __call__(self, stage: int, start: int, stop: int) -> int:
        late = delay(stage, self._num_stages)
        weights = self._weights[stop] - self._weights[start]
        kept = (1 if self._recompute else late + 1) * (self._kept[stop] - self._kept[start])
        received = (late + 1) * self._crossing[start]
        frozen = self._frozen[stop] - self._frozen[start]
        waiting = 2 * (self._crossing[start] + self._crossing_grad[stop])
        older = late if self._stash else 0
        return (self._copies + older) * weights + frozen + kept + received + waiting


def _check_costs(costs: Sequence[float]) -> None:
    for position, cost in enumerate(costs):
        if not (isfinite(cost) and cost >= 0):
            raise ValueError(f"The cost of layer {position} is {cost}: costs must be finite and not negative.")


def _cheapest(
    count: int, num_stages: int, forbidden: Collection[int], cost: Callable[[int, int, int], float | None]
) -> list[int] | None:
    """Cut ``count`` layers; ``cost(stage, start, stop)`` is ``None`` where the stage cannot have these layers."""
    _check_num_stages(count, num_stages)
    places = [*(p for p in range(1, count) if p not in forbidden), count]
    if len(places) < num_stages:
        raise ValueError(
            f"num_stages={num_stages}, but layers that share parameters or buffers leave only {len(places)} parts that "
            f"can be cut apart (of {count} layers): lower num_stages to {len(places)} or less, or give each layer "
            "its own."
        )
    # best[j]: stage costs (dearest first) and starts of the best cut of the layers before places[j]. The order of two
    # cuts does not change when the same stage is added to both, so the best cut is made of best cuts.
    best: list[tuple[Cost, tuple[int, ...]] | None] = [
        None if (load := cost(1, 0, place)) is None else ((load,), ()) for place in places
    ]
    for stage in range(2, num_stages + 1):
        row: list[tuple[Cost, tuple[int, ...]] | None] = [None] * len(places)
        for j in range(stage - 1, len(places)):
            chosen: tuple[Cost, tuple[int, ...]] | None = None
            for i in range(j - 1, stage - 3, -1):
                before = best[i] if i >= 0 else None
                if before is None or chosen is not None and before[0][0] > chosen[0][0]:
                    continue
                load = cost(stage, places[i], places[j])
                if load is None or chosen is not None and load > chosen[0][0]:
                    continue
                candidate = tuple(sorted((*before[0], load), reverse=True)), (*before[1], places[i])
                chosen = candidate if chosen is None else min(chosen, candidate)
            row[j] = chosen
        best = row
    return None if best[-1] is None else list(best[-1][1])


def cut_at(chain: Layers, split_points: Sequence[str], num_stages: int) -> list[int]:
    """Turn the names of the modules that begin stages 2 to K into positions.

    Args:
        chain: The layers.
        split_points: K - 1 names, in order: of a layer, or of a module that holds layers (its first one is meant).
        num_stages: K.

    Returns:
        The K - 1 start positions, ascending.

    Raises:
        TypeError: ``split_points`` is one string.
        ValueError: ``num_stages`` does not fit the chain; or the names are too few or too many, unknown, out of order,
            or begin the first stage.
    """
    _check_num_stages(len(chain), num_stages)
    if isinstance(split_points, str):
        raise TypeError(f"split_points={split_points!r} is one string: give a list of names, [{split_points!r}].")
    if len(split_points) != num_stages - 1:
        raise ValueError(
            f"split_points has {len(split_points)} names, but num_stages={num_stages} needs {num_stages - 1}: give one "
            "name for each stage after the first."
        )
    starts: list[int] = []
    for name in split_points:
        start = _position(chain, name)
        if start == 0:
            raise ValueError(
                f"split point {name!r} begins the first stage, which needs no name: start with the module that begins "
                "stage 2."
            )
        if starts and start <= starts[-1]:
            raise ValueError(
                f"split point {name!r} does not come after {split_points[len(starts) - 1]!r}: give the names in the "
                "order of the network, each once."
            )
        starts.append(start)
    return starts


def _position(chain: Layers, name: str) -> int:
    if name in chain.names:
        return chain.names.index(name)
    inside = (position for position, label in enumerate(chain.names) if label.startswith(f"{name}."))
    position = next(inside, None)
    if position is None:
        close = get_close_matches(name, dict.fromkeys(joined(*map(_with_parents, chain.names))), n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        some = chain.names[1:9]
        more = f" and {len(chain) - 1 - len(some)} more" if len(chain) - 1 > len(some) else ""
        raise ValueError(
            f"split point {name!r} names no layer that can begin a stage.{hint} "
            f"Layers that can: {', '.join(map(repr, some)) or 'none, the network has one layer'}{more}."
        )
    return position


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]


def forbidden_cuts(chain: Layers) -> dict[int, tuple[str, str, str]]:
    """Find the positions where a cut would separate layers that share a parameter or a buffer.

    Sharing is by identity of the tensor object; a module that occurs twice shares all its tensors.

    Returns:
        For each such position: the name of a shared tensor, and the labels of two layers that use it, one on each side.
    """
    last_use: dict[int, tuple[int, str]] = {}
    forbidden: dict[int, tuple[str, str, str]] = {}
    for position, label in enumerate(chain.names):
        layer = chain.segment(position, position + 1)
        for name, tensor in joined(layer.named_parameters(), layer.named_buffers()):
            if name in chain.read_only:
                continue
            if id(tensor) in last_use:
                earlier, first_name = last_use[id(tensor)]
                for between in range(earlier + 1, position + 1):
                    forbidden.setdefault(between, (first_name, chain.names[earlier], label))
                name = first_name
            last_use[id(tensor)] = (position, name)
    return forbidden


def check_cut(starts: Sequence[int], forbidden: Mapping[int, tuple[str, str, str]]) -> None:
    """Refuse a cut that separates layers that share a tensor.

    Args:
        starts: The start positions of stages 2 to K.
        forbidden: What :func:`forbidden_cuts` returned.

    Raises:
        ValueError: A start position is forbidden.
    """
    for stage, start in enumerate(starts, start=2):
        if start in forbidden:
            tensor, before, after = forbidden[start]
            raise ValueError(
                f"Stage {stage} cannot start at position {start}: {tensor!r} is used by {before!r} and by {after!r}, "
                "on both sides of the cut, and each stage updates its own. Move the split point so that both are in "
                "one stage, or give each its own."
            )


def _check_num_stages(num_layers: int, num_stages: int) -> None:
    if num_stages < 1:
        raise ValueError(f"num_stages={num_stages}: a network is cut into 1 stage or more.")
    if num_stages > num_layers:
        raise ValueError(
            f"num_stages={num_stages}, but the network has {num_layers} layers and each stage needs at least one: "
            f"lower num_stages to {num_layers} or less, or return smaller layers from `configure_stages()`."
        )
