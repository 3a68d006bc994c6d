"""Tests of ``network/cut.py`` and ``balance.py``: the best cut against all cuts, cuts by name, who decides."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from torch import nn

from lightning_ddg.network.balance import best_cut, check_cut, cut_at, forbidden_cuts
from lightning_ddg.network.cut import CostModel, Costs, Cut, decide_cut
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
            with pytest.raises(ValueError, match=f"leave only {num_layers - len(forbidden)} part"):
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
    assert forbidden_cuts(chain, ties=False) == dict.fromkeys([2, 3], ("net.1.weight", "net.1", "net.3"))
    assert forbidden_cuts(chain) == {}


def test_ties_in_a_row_name_the_layers_on_both_sides() -> None:
    a, b, c = (nn.Linear(2, 2, bias=False) for _ in range(3))
    c.weight = b.weight = a.weight
    assert forbidden_cuts(labelled(a, b, c), ties=False) == {
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


def random_model(draw: random.Random, count: int) -> CostModel:
    def numbers(top: int) -> list[int]:
        return [draw.randint(0, top) for _ in range(count)]

    seconds = [[float(n) for n in numbers(6)] for _ in range(2)]
    crossing, crossing_grad = ([0, *numbers(5)[1:]] for _ in range(2))
    profile = Profile(*seconds, crossing, crossing_grad, numbers(9), numbers(9), numbers(9))
    return CostModel(profile, recompute=draw.random() < 0.5)


def brute_force(model: CostModel, num_stages: int, forbidden: Collection[int], limit: int | None) -> list[int] | None:
    """Every cut tried: by the dearest stage, then the second dearest, ..., then the earliest."""
    count = len(model.profile.forward)
    cuts = [
        list(starts)
        for starts in combinations([p for p in range(1, count) if p not in forbidden], num_stages - 1)
        if limit is None or max(model.stage_memory(starts)) <= limit
    ]
    return min(cuts, default=None, key=lambda s: (sorted(model.stage_seconds(s), reverse=True), s))


@pytest.mark.parametrize("seed", range(150))
def test_best_stages_is_the_best_of_all_cuts(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 9)
    num_stages = draw.randint(1, min(4, count))
    model = random_model(draw, count)
    forbidden = draw.sample(range(1, count), draw.randint(0, count - num_stages)) if count > num_stages else []
    # Powers of two, so that sums in another order are the same sums.
    model = replace(model, seconds_per_byte=draw.choice([0.0, 0.25, 1.0]), optimizer_copies=draw.randint(0, 3))
    limit = draw.choice([None, draw.randint(20, 200)])
    wanted = brute_force(model, num_stages, forbidden, limit)

    def choose() -> list[int]:
        return model.best_stages(num_stages, forbidden, limit)

    if wanted is not None:
        assert choose() == wanted
        return
    with pytest.raises(ValueError, match=f"max_memory={limit} bytes cannot be kept with {num_stages} stages.*batch"):
        choose()


def test_the_least_memory_that_is_named_can_be_kept() -> None:
    model = random_model(random.Random(3), 8)
    with pytest.raises(ValueError, match="max_memory=1 bytes") as caught:
        model.best_stages(3, max_memory=1)
    needed = int(str(caught.value).split("about ")[1].split(" ")[0])
    assert max(model.stage_memory(model.best_stages(3, max_memory=needed))) <= needed
    with pytest.raises(ValueError, match=f"max_memory={needed - 1} bytes"):
        model.best_stages(3, max_memory=needed - 1)


def test_memory_of_a_stage() -> None:
    profile = Profile([1.0] * 3, [1.0] * 3, [0, 5, 7], [0, 4, 6], [10, 20, 30], [100, 200, 300])
    # Delay 1: weights, gradients and two of the optimizer; the weights before; two batches; two gradients.
    first = 4 * 100 + 100 + 2 * 10 + 2 * 4
    # Delay 0: one batch, with what was received; two activations.
    last = 4 * 500 + 50 + 5 + 2 * 5
    assert CostModel(profile).stage_memory([1]) == [first, last]
    assert CostModel(profile, optimizer_copies=0).stage_memory([]) == [2 * 600 + 60]
    # Slack 2: a delay of 3, and four messages that may have arrived before their turn.
    slack = [4 * 100 + 3 * 100 + 4 * 10 + 4 * 4, 4 * 500 + 50 + 5 + 4 * 5]
    assert CostModel(profile, slack=2).stage_memory([1]) == slack
    # Of what is never trained there is one copy, whatever the delay.
    assert CostModel(replace(profile, frozen=[1000, 2000, 3000])).stage_memory([1]) == [first + 1000, last + 5000]


def test_forwards_done_again_keep_one_batch_and_move_the_cut() -> None:
    profile = Profile([2.0] * 4, [1.0] * 4, [0, 5, 5, 5], [0, 4, 4, 4], [10] * 4, [100] * 4)
    model = CostModel(profile, optimizer_copies=0)
    again = replace(model, recompute=True)
    assert (model.best_stages(2), model.stage_seconds([2])) == ([2], [6, 6])
    # The last stage has no delay, and does its forwards once.
    assert again.stage_seconds([2]) == [10, 6]
    assert (again.best_stages(2), again.stage_seconds([1])) == ([1], [5, 9])
    # Of the two batches in flight the first stage keeps nothing that it can read again; the second what it received.
    assert model.stage_memory([2, 3]) == [4 * 200 + 3 * 20 + 8, 3 * 100 + 2 * 15 + 18, 2 * 100 + 15 + 10]
    assert again.stage_memory([2, 3]) == [4 * 200 + 20 + 8, 3 * 100 + 10 + 2 * 5 + 18, 2 * 100 + 15 + 10]
    # Weights and gradients alone, where nothing is stashed.
    today = replace(again, stash=False)
    assert today.stage_memory([2, 3]) == [2 * 200 + 20 + 8, 2 * 100 + 10 + 2 * 5 + 18, 2 * 100 + 15 + 10]


def test_messages_move_the_cut() -> None:
    profile = Profile([1.0] * 4, [0.0] * 4, [0, 1, 9, 1], [0, 1, 9, 1], [0] * 4, [0] * 4)
    assert CostModel(profile).best_stages(2) == [2]
    model = CostModel(profile, seconds_per_byte=0.125)
    assert model.best_stages(2) == [1]
    assert model.stage_seconds([2]) == [2 + 2.25, 2 + 2.25]


# Who decides.


def chain(*widths: int) -> Chain:
    """Layers ``net.0, net.1, ...``; a layer of width w has w parameters."""
    return Chain([(f"net.{number}", nn.Linear(width, 1, bias=False)) for number, width in enumerate(widths)])


def unmeasured() -> Costs:
    raise AssertionError("nothing need be measured")


def decide(
    layers: Chain,
    num_stages: int,
    split_points: list[str] | None = None,
    recorded: list[str] | None = None,
    measure: Callable[[], Costs] | None = None,
    ties: bool = True,
) -> Cut:
    by_parameters = measure or (lambda: Costs.by_parameters(layers))
    return decide_cut(layers, num_stages, split_points, recorded, by_parameters, ties=ties)


def test_the_user_comes_first_then_an_earlier_run_then_the_balance() -> None:
    layers = chain(1, 1, 1, 9)
    assert decide(layers, 2, ["net.1"], ["net.2"], unmeasured).starts == [1]
    assert decide(layers, 2, None, ["net.2"], unmeasured).starts == [2]
    assert decide(layers, 2).starts == [3]
    counted = Costs([5.0, 1.0, 1.0, 1.0], "FLOPs")
    assert decide(layers, 2, measure=lambda: counted) == Cut(layers, [1], counted)
    measured = decide(layers, 2, measure=measured_layers)
    assert (measured.starts, measured.costs.unit, measured.costs.of_layers) == ([2], "measured time", [2.0] * 4)


def test_without_a_measure_the_parameters_decide() -> None:
    cut = decide(chain(1, 1, 1, 9), 2)
    assert (cut.starts, cut.costs) == ([3], Costs([1.0, 1.0, 1.0, 9.0], "parameters"))


@pytest.mark.parametrize("recorded", [["net.1", "net.2"], [], ["other.1"]])
def test_an_earlier_cut_of_another_network_is_ignored(recorded: list[str]) -> None:
    assert decide(chain(1, 1, 1, 9), 2, recorded=recorded).starts == [3]


@pytest.mark.parametrize("recorded", [["net.0", "net.2"], ["net.3", "net.1"], ["net.1", "net.1"]])
def test_an_earlier_cut_that_is_none_of_this_network_is_ignored(recorded: list[str]) -> None:
    """The layers have been put in another order since."""
    assert decide(chain(1, 1, 1, 9), 3, recorded=recorded).starts == decide(chain(1, 1, 1, 9), 3).starts


def test_an_earlier_cut_through_what_is_tied_now_is_ignored() -> None:
    layers = chain(1, 1, 1, 9)
    layers.layers[1].weight = layers.layers[2].weight
    assert decide(layers, 2, recorded=["net.2"]).starts == [2]
    assert decide(layers, 2, recorded=["net.2"], ties=False).starts == [3]


def test_a_cut_of_the_users_that_is_none_is_refused() -> None:
    layers = chain(1, 1, 1, 9)
    with pytest.raises(ValueError, match="'net.9' names no layer"):
        decide(layers, 2, ["net.9"])
    layers.layers[1].weight = layers.layers[2].weight
    with pytest.raises(ValueError, match="is used by 'net.1' and by 'net.2'.*`extrapolate=True` in several"):
        decide(layers, 2, ["net.2"], ties=False)


def measured_layers() -> Costs:
    """Four layers that are equal but for the memory of the last."""
    profile = Profile([1.0] * 4, [1.0] * 4, [0] * 4, [0] * 4, [0] * 4, [10, 10, 10, 40])
    return Costs.measured(CostModel(profile, optimizer_copies=0))


@pytest.mark.parametrize(
    ("max_memory", "starts"),
    [
        (None, [1]),
        (140, [1]),  # The second stage: weights and gradients of 60 bytes, and no copy of the weights.
        (119, [2]),
    ],
)
def test_an_earlier_cut_is_used_again_if_it_keeps_the_limit(max_memory: int | None, starts: list[int]) -> None:
    cut = decide_cut(chain(1, 1, 1, 1), 2, None, ["net.1"], measured_layers, max_memory)
    assert cut.starts == starts
    assert (cut.costs.model is None) == (max_memory is None)


def test_an_earlier_cut_through_a_tie_is_not_used_again_for_keeping_the_limit() -> None:
    layers = chain(1, 1, 1, 1)
    layers.layers[0].weight = layers.layers[1].weight
    assert decide_cut(layers, 2, None, ["net.1"], measured_layers, 140, ties=False).starts == [2]


def test_a_limit_that_nothing_is_known_of_is_refused() -> None:
    with pytest.raises(ValueError, match="max_memory=100 bytes cannot be kept, as the layers could not be measured"):
        decide_cut(chain(1, 1), 2, None, None, lambda: Costs([1.0, 1.0], "parameters"), 100)


def test_too_many_stages_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(ValueError, match="num_stages=3, but the network has 2 layers"):
        decide(chain(1, 1), 3, measure=unmeasured)


def test_what_a_cut_says_of_itself() -> None:
    layers = chain(1, 2, 3, 4)
    cut = Cut(layers, [1, 3], Costs.by_parameters(layers))
    assert cut.bounds == [0, 1, 3, 4]
    assert cut.split_points == ["net.1", "net.3"]
    assert [list(cut.layers_of(stage)) for stage in (1, 2, 3)] == [
        layers.layers[:1],
        layers.layers[1:3],
        layers.layers[3:],
    ]
    assert [sum(p.numel() for p in segment.parameters()) for segment in cut.segments()] == [1, 5, 4]


def test_a_network_that_ties_leave_in_one_part_names_what_is_tied() -> None:
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    last.weight = first.weight
    chain = Chain([("tokens", first), ("body", nn.Linear(2, 2)), ("head", last)])
    message = r"leave only 1 part .*of 3 layers.*'tokens.weight' is used by 'tokens' and by 'head'.*untie them.*in one"
    with pytest.raises(ValueError, match=message):
        best_cut([1.0] * 3, 2, forbidden_cuts(chain, ties=False))


def test_one_layer_is_no_network_to_cut() -> None:
    with pytest.raises(ValueError, match="num_stages=2, but the network has 1 layer and .*train it in one stage, or"):
        best_cut([1.0], 2, {})
