"""Tests of ``network/cut.py``, the best cut against all cuts. Change them with what makes a cut good or possible."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from torch import nn

from lightning_ddg.network.cut import (
    best_cut,
    best_stages,
    check_cut,
    cut_at,
    forbidden_cuts,
    stage_memory,
    stage_seconds,
)
from lightning_ddg.network.layers import Chain
from lightning_ddg.network.profile import Profile


def best_of_all(costs: Sequence[float], num_stages: int, forbidden: Collection[int]) -> list[int] | None:
    """Return the best cut by looking at every one; None where there is none."""

    def key(starts: tuple[int, ...]) -> tuple[list[float], tuple[int, ...]]:
        loads = [sum(costs[a:b]) for a, b in pairwise([0, *starts, len(costs)])]
        return sorted(loads, reverse=True), starts

    allowed = [position for position in range(1, len(costs)) if position not in forbidden]
    best = min(combinations(allowed, num_stages - 1), key=key, default=None)
    return None if best is None else list(best)


# Whole numbers, so that sums are exact and ties are ties. A small range makes many of them.
@pytest.mark.parametrize("most", [1, 3, 1000])
def test_the_best_cut_is_the_best_of_all(most: int) -> None:
    draw = random.Random(most)
    for _ in range(300):
        num_layers = draw.randint(1, 9)
        num_stages = draw.randint(1, num_layers)
        costs = [draw.randint(0, most) for _ in range(num_layers)]
        forbidden = {position for position in range(1, num_layers) if draw.random() < draw.choice([0, 0.3])}
        expected = best_of_all(costs, num_stages, forbidden)
        if expected is None:
            with pytest.raises(ValueError, match=f"leave only {num_layers - len(forbidden)} parts"):
                best_cut(costs, num_stages, forbidden)
        else:
            assert best_cut(costs, num_stages, forbidden) == expected


def test_ties_are_evened_out_further_and_then_cut_early() -> None:
    assert best_cut([9, 1, 1, 1, 1], 3) == [1, 3]
    assert best_cut([1, 1, 1], 2) == [1]
    assert best_cut([0, 0, 0, 0], 3) == [1, 2]


def test_one_stage_needs_no_cut() -> None:
    assert best_cut([1.0, 2.0], 1) == []


def test_five_hundred_layers() -> None:
    starts = best_cut([1.0] * 512, 8)
    assert starts == list(range(64, 512, 64))


@pytest.mark.parametrize("num_stages", [0, -1])
def test_fewer_stages_than_one_are_refused(num_stages: int) -> None:
    with pytest.raises(ValueError, match=f"num_stages={num_stages}: .* 1 stage or more"):
        best_cut([1.0, 1.0], num_stages)
    with pytest.raises(ValueError, match=f"num_stages={num_stages}: .* 1 stage or more"):
        cut_at(make_chain(), [], num_stages)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_stages=3, but the network has 2 layers.*lower num_stages to 2 or less"):
        best_cut([1.0, 1.0], 3)
    with pytest.raises(ValueError, match="num_stages=6, but the network has 5 layers"):
        cut_at(make_chain(), ["net.1"] * 5, 6)


def test_more_stages_than_ties_allow_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_stages=3, but layers that share .* only 2 parts .*of 4 layers"):
        best_cut([1.0] * 4, 3, {1, 3})


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_no_costs_are_refused(cost: float) -> None:
    with pytest.raises(ValueError, match=f"cost of layer 1 is {cost}"):
        best_cut([1.0, cost], 2)


# Cuts by name.


def make_chain() -> Chain:
    names = ["stem", "net.layer1.0", "net.layer1.1", "net.layer2.0", "head"]
    return Chain([(name, nn.Identity()) for name in names])


def test_names_of_layers_and_of_modules_that_hold_layers() -> None:
    assert cut_at(make_chain(), ["net.layer1.1", "head"], 3) == [2, 4]
    assert cut_at(make_chain(), ["net.layer1", "net.layer2"], 3) == [1, 3]
    assert cut_at(make_chain(), ["net"], 2) == [1]
    assert cut_at(make_chain(), [], 1) == []


def test_a_name_matches_whole_parts_only() -> None:
    chain = Chain([("a", nn.Identity()), ("b10", nn.Identity()), ("b1.0", nn.Identity())])
    assert cut_at(chain, ["b1"], 2) == [2]


def test_a_wrong_number_of_names_is_refused() -> None:
    with pytest.raises(ValueError, match="split_points has 1 names, but num_stages=3 needs 2"):
        cut_at(make_chain(), ["head"], 3)


def test_one_string_is_refused() -> None:
    with pytest.raises(TypeError, match=r"split_points='head' is one string: give a list of names, \['head'\]"):
        cut_at(make_chain(), "head", 2)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'net.layr2' names no layer .* mean 'net.layer2'.* can: 'net.layer1.0', "):
        cut_at(make_chain(), ["net.layr2"], 2)


def test_an_unknown_name_in_a_long_chain_does_not_list_all() -> None:
    chain = Chain([(f"net.{i}", nn.Identity()) for i in range(40)])
    with pytest.raises(ValueError, match=r"'zzz' names no layer that can begin a stage\. Layers .*'net.8' and 31 more"):
        cut_at(chain, ["zzz"], 2)


@pytest.mark.parametrize("points", [["head", "net.layer2"], ["head", "head"], ["net.layer1", "net.layer1.0"]])
def test_names_out_of_order_or_twice_are_refused(points: list[str]) -> None:
    with pytest.raises(ValueError, match=f"'{points[1]}' does not come after '{points[0]}'"):
        cut_at(make_chain(), points, 3)


def test_a_name_that_begins_the_first_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="'stem' begins the first stage"):
        cut_at(make_chain(), ["stem"], 2)


# Ties.


def labelled(*layers: nn.Module) -> Chain:
    return Chain([(f"net.{i}", layer) for i, layer in enumerate(layers)])


def test_tied_parameters_forbid_every_cut_between_them() -> None:
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    last.weight = first.weight
    chain = labelled(nn.ReLU(), first, nn.ReLU(), last, nn.ReLU())
    assert forbidden_cuts(chain) == dict.fromkeys([2, 3], ("net.1.weight", "net.1", "net.3"))


def test_ties_in_a_row_name_the_layers_on_both_sides() -> None:
    a, b, c = (nn.Linear(2, 2, bias=False) for _ in range(3))
    c.weight = b.weight = a.weight
    assert forbidden_cuts(labelled(a, b, c)) == {
        1: ("net.0.weight", "net.0", "net.1"),
        2: ("net.0.weight", "net.1", "net.2"),
    }


def test_a_module_with_state_that_occurs_twice_forbids_the_cuts_between() -> None:
    norm = nn.BatchNorm1d(2, affine=False)
    found = forbidden_cuts(labelled(norm, nn.Linear(2, 2), norm))
    assert found == dict.fromkeys([1, 2], ("net.0.running_mean", "net.0", "net.2"))


def test_what_has_no_state_may_be_shared() -> None:
    act = nn.ReLU()
    assert forbidden_cuts(labelled(act, nn.Linear(2, 2), act)) == {}


def test_a_cut_through_a_tie_is_refused() -> None:
    forbidden = {3: ("net.1.weight", "net.1", "net.3")}
    check_cut([1, 2], forbidden)
    with pytest.raises(ValueError, match=r"Stage 3 .* position 3: 'net.1.weight' is used by 'net.1' and by 'net.3'"):
        check_cut([2, 3], forbidden)


# Measured layers.


def random_profile(draw: random.Random, count: int) -> Profile:
    def numbers(top: int) -> list[int]:
        return [draw.randint(0, top) for _ in range(count)]

    seconds = [[float(n) for n in numbers(6)] for _ in range(2)]
    crossing, crossing_grad = ([0, *numbers(5)[1:]] for _ in range(2))
    return Profile(*seconds, crossing, crossing_grad, numbers(9), numbers(9), numbers(9), recompute=draw.random() < 0.5)


def brute_force(
    profile: Profile, num_stages: int, forbidden: Collection[int], per_byte: float, limit: int | None, copies: int
) -> list[int] | None:
    """Every cut tried: by the dearest stage, then the second dearest, ..., then the earliest."""
    count = len(profile.forward)
    cuts = [
        list(starts)
        for starts in combinations([p for p in range(1, count) if p not in forbidden], num_stages - 1)
        if limit is None or max(stage_memory(profile, starts, copies)) <= limit
    ]
    return min(cuts, default=None, key=lambda s: (sorted(stage_seconds(profile, s, per_byte), reverse=True), s))


@pytest.mark.parametrize("seed", range(150))
def test_best_stages_is_the_best_of_all_cuts(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 9)
    num_stages = draw.randint(1, min(4, count))
    profile = random_profile(draw, count)
    forbidden = draw.sample(range(1, count), draw.randint(0, count - num_stages)) if count > num_stages else []
    # Powers of two, so that sums in another order are the same sums.
    per_byte, copies = draw.choice([0.0, 0.25, 1.0]), draw.randint(0, 3)
    limit = draw.choice([None, draw.randint(20, 200)])
    wanted = brute_force(profile, num_stages, forbidden, per_byte, limit, copies)

    def choose() -> list[int]:
        return best_stages(
            profile,
            num_stages,
            forbidden,
            seconds_per_byte=per_byte,
            max_memory=limit,
            optimizer_copies=copies,
        )

    if wanted is not None:
        assert choose() == wanted
        return
    with pytest.raises(ValueError, match=f"max_memory={limit} bytes cannot be kept with {num_stages} stages.*batch"):
        choose()


def test_the_least_memory_that_is_named_can_be_kept() -> None:
    profile = random_profile(random.Random(3), 8)
    with pytest.raises(ValueError, match="max_memory=1 bytes") as caught:
        best_stages(profile, 3, max_memory=1)
    needed = int(str(caught.value).split("about ")[1].split(" ")[0])
    assert max(stage_memory(profile, best_stages(profile, 3, max_memory=needed))) <= needed
    with pytest.raises(ValueError, match=f"max_memory={needed - 1} bytes"):
        best_stages(profile, 3, max_memory=needed - 1)


def test_memory_of_a_stage() -> None:
    profile = Profile([1.0] * 3, [1.0] * 3, [0, 5, 7], [0, 4, 6], [10, 20, 30], [100, 200, 300])
    # Delay 1: weights, gradients and two of the optimizer; the weights before; two batches; two gradients.
    first = 4 * 100 + 100 + 2 * 10 + 2 * 4
    # Delay 0: one batch, with what was received; two activations.
    last = 4 * 500 + 50 + 5 + 2 * 5
    assert stage_memory(profile, [1], 2) == [first, last]
    assert stage_memory(profile, [], 0) == [2 * 600 + 60]
    # Of what is never trained there is one copy, whatever the delay.
    assert stage_memory(replace(profile, frozen=[1000, 2000, 3000]), [1], 2) == [first + 1000, last + 5000]


def test_forwards_done_again_keep_one_batch_and_move_the_cut() -> None:
    profile = Profile([2.0] * 4, [1.0] * 4, [0, 5, 5, 5], [0, 4, 4, 4], [10] * 4, [100] * 4)
    again = replace(profile, recompute=True)
    assert (best_stages(profile, 2), stage_seconds(profile, [2])) == ([2], [6, 6])
    # The last stage has no delay, and does its forwards once.
    assert stage_seconds(again, [2]) == [10, 6]
    assert (best_stages(again, 2), stage_seconds(again, [1])) == ([1], [5, 9])
    # Of the two batches in flight the first stage keeps nothing that it can read again; the second what it received.
    assert stage_memory(profile, [2, 3], 0) == [4 * 200 + 3 * 20 + 8, 3 * 100 + 2 * 15 + 18, 2 * 100 + 15 + 10]
    assert stage_memory(again, [2, 3], 0) == [4 * 200 + 20 + 8, 3 * 100 + 10 + 2 * 5 + 18, 2 * 100 + 15 + 10]
    # Weights and gradients alone, where nothing is stashed.
    today = replace(again, stash=False)
    assert stage_memory(today, [2, 3], 0) == [2 * 200 + 20 + 8, 2 * 100 + 10 + 2 * 5 + 18, 2 * 100 + 15 + 10]


def test_messages_move_the_cut() -> None:
    profile = Profile([1.0] * 4, [0.0] * 4, [0, 1, 9, 1], [0, 1, 9, 1], [0] * 4, [0] * 4)
    assert best_stages(profile, 2) == [2]
    assert best_stages(profile, 2, seconds_per_byte=0.125) == [1]
    assert stage_seconds(profile, [2], 0.125) == [2 + 2.25, 2 + 2.25]
