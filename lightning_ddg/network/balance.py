"""Positions to cut at: the most even ones, those that a user names, those that are not allowed.

A cut is the list of the K - 1 positions at which stages 2 to K start; position p lies between the layers p - 1 and p.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from itertools import accumulate
from itertools import chain as joined
from math import isfinite

from lightning_ddg.network.layers import Layers

# The costs of the stages, dearest first, and where stages 2, 3, ... start.
_Best = tuple[tuple[float, ...], tuple[int, ...]]


def best_cut(costs: Sequence[float], num_stages: int, forbidden: Collection[int] = ()) -> list[int]:
    """Cut layers into consecutive stages so that the dearest stage is as cheap as it can be.

    Exact, by dynamic programming in O(L^2 K) steps. Among cuts with the same dearest stage, the one whose second
    dearest stage is the cheapest is taken, and so on; among cuts with the same stage costs, the earliest. Positions in
    ``forbidden`` are not cut.

    Raises:
        ValueError: No cut has so many stages, or a cost is negative or not finite.
    """
    sums = sums_of_layers(costs)
    return cheapest_cut(len(costs), num_stages, forbidden, lambda stage, start, stop: sums[start][stop - start])


def sums_of_layers(costs: Sequence[float]) -> list[list[float]]:
    """Return the cost of any consecutive layers: of ``start`` to ``stop - 1``, entry ``[start][stop - start]``.

    They are no differences of running sums, so that stages of equal layers have the very same cost.
    """
    for position, cost in enumerate(costs):
        if not (isfinite(cost) and cost >= 0):
            raise ValueError(f"The cost of layer {position} is {cost}: costs must be finite and not negative.")
    return [[0.0, *accumulate(costs[start:])] for start in range(len(costs))]


def cheapest_cut(
    num_layers: int, num_stages: int, forbidden: Collection[int], cost: Callable[[int, int, int], float]
) -> list[int]:
    """Cut layers as :func:`best_cut` does, where a layer may cost more in one stage than in another.

    ``cost`` says what a stage ``1..K`` costs that starts and stops at two positions; infinity where it cannot have
    these layers. Where every cut is impossible, one of these is returned.

    Raises:
        ValueError: No cut has so many stages.
    """
    check_num_stages(num_layers, num_stages)
    places = [*(p for p in range(1, num_layers) if p not in forbidden), num_layers]
    if len(places) < num_stages:
        ties = dict.fromkeys(forbidden.values()) if isinstance(forbidden, Mapping) else {}
        shared = "; ".join(f"{tensor!r} is used by {before!r} and by {after!r}" for tensor, before, after in ties)
        lower = f"lower num_stages to {len(places)} or less" if len(places) > 1 else "train it in one stage"
        raise ValueError(
            f"num_stages={num_stages}, but layers that share parameters or buffers leave only "
            f"{_counted(len(places), 'part')} that can be cut apart (of {_counted(num_layers, 'layer')})"
            f"{': ' + shared if shared else ''}. Each stage updates its own: give each layer its own (untie them), or "
            f"{lower}."
        )
    # best[j]: stage costs (dearest first) and starts of the best cut of the layers before places[j]. The order of two
    # cuts does not change when the same stage is added to both, so the best cut is made of best cuts.
    best: dict[int, _Best] = {j: ((cost(1, 0, place),), ()) for j, place in enumerate(places)}
    for stage in range(2, num_stages + 1):
        row: dict[int, _Best] = {}
        for j in range(stage - 1, len(places)):
            chosen: _Best | None = None
            for i in range(j - 1, stage - 3, -1):
                loads, starts = best[i]
                if chosen is not None and loads[0] > chosen[0][0]:
                    continue
                load = cost(stage, places[i], places[j])
                if chosen is None or load <= chosen[0][0]:
                    candidate = tuple(sorted((*loads, load), reverse=True)), (*starts, places[i])
                    chosen = candidate if chosen is None else min(chosen, candidate)
                    row[j] = chosen
        best = row
    return list(best[len(places) - 1][1])


def cut_at(chain: Layers, split_points: Sequence[str], num_stages: int) -> list[int]:
    """Turn the names of layers, or of modules that hold layers (the first is meant), into the positions of a cut.

    Raises:
        TypeError: ``split_points`` is one string.
        ValueError: ``num_stages`` does not fit the chain; or the names are too few or too many, unknown, out of order,
            or begin the first stage.
    """
    check_num_stages(len(chain), num_stages)
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
    for position, label in enumerate(chain.names):
        if label.startswith(f"{name}."):
            return position
    parts = [label.split(".") for label in chain.names]
    known = [".".join(path[:depth]) for path in parts for depth in range(len(path), 0, -1)]
    close = get_close_matches(name, dict.fromkeys(known), n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    some = chain.names[1:9]
    more = f" and {len(chain) - 1 - len(some)} more" if len(chain) - 1 > len(some) else ""
    raise ValueError(
        f"split point {name!r} names no layer that can begin a stage.{hint} "
        f"Layers that can: {', '.join(map(repr, some)) or 'none, the network has one layer'}{more}."
    )


def forbidden_cuts(chain: Layers, ties: bool = True) -> dict[int, tuple[str, str, str]]:
    """Find the positions where a cut would separate layers that share a buffer, or, without ``ties``, a parameter.

    Sharing is by identity of the tensor object. Each such position comes with the name of a shared tensor, and the
    labels of two layers that use it, one on each side.
    """
    last_use: dict[int, tuple[int, str]] = {}
    forbidden: dict[int, tuple[str, str, str]] = {}
    for position, label in enumerate(chain.names):
        layer = chain.segment(position, position + 1)
        for name, tensor in joined(() if ties else layer.named_parameters(), layer.named_buffers()):
            if id(tensor) in last_use:
                earlier, first_name = last_use[id(tensor)]
                for between in range(earlier + 1, position + 1):
                    forbidden.setdefault(between, (first_name, chain.names[earlier], label))
                name = first_name
            last_use[id(tensor)] = (position, name)
    return forbidden


def check_cut(starts: Sequence[int], forbidden: Mapping[int, tuple[str, str, str]]) -> None:
    """Raise a ValueError if a stage starts where :func:`forbidden_cuts` says that layers share a tensor."""
    for stage, start in enumerate(starts, start=2):
        if start in forbidden:
            tensor, before, after = forbidden[start]
            raise ValueError(
                f"Stage {stage} cannot start at position {start}: {tensor!r} is used by {before!r} and by {after!r}, "
                "on both sides of the cut, which is possible for a parameter of the paper's rule alone: not for a "
                "buffer, nor with `stash=False` in one process or `extrapolate=True` in several. Move the split point "
                "so that both are in one stage, or give each its own."
            )


def check_num_stages(num_layers: int, num_stages: int, reasons: Sequence[str] = ()) -> None:
    """Raise a ValueError if there are fewer layers than stages; ``reasons`` are why there are no more."""
    if num_stages < 1:
        raise ValueError(f"num_stages={num_stages}: a network is cut into 1 stage or more.")
    if num_stages > num_layers:
        lower = f"lower num_stages to {num_layers} or less" if num_layers > 1 else "train it in one stage"
        why = f" (elsewhere it cannot be cut: {reasons[0]})" if reasons else ""
        raise ValueError(
            f"num_stages={num_stages}, but the network has {_counted(num_layers, 'layer')} and each stage needs at "
            f"least one{why}: {lower}, or return smaller layers from `configure_stages()`."
        )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
