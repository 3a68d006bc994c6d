"""Tests of ``planning/rebalance.py``: where a fit's figures say that the cut should be, and how they say it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import nn

from lightning_ddg.network.cut import CostModel, Costs, Cut
from lightning_ddg.network.layers import Chain
from lightning_ddg.network.profile import Profile
from lightning_ddg.planning.rebalance import better_cut, idle_warning, shared_out
from lightning_ddg.planning.tally import Tally


def chain(count: int = 4, tie: tuple[int, int] | None = None) -> Chain:
    layers: list[nn.Module] = [nn.Linear(3, 3) for _ in range(count)]
    if tie is not None:
        layers[tie[1]].table = layers[tie[0]].table = nn.BatchNorm1d(3, affine=False)
    return Chain([(f"net.{number}", layer) for number, layer in enumerate(layers)])


def tallies(busy: Sequence[float], activations: Sequence[float], gradients: Sequence[float]) -> list[Tally]:
    """Of 10 batches; all in seconds per batch."""
    return [
        Tally(batches=10, seconds=10 * (b + a + g), activations=10 * a, gradients=10 * g)
        for b, a, g in zip(busy, activations, gradients, strict=True)
    ]


def test_a_stages_time_is_shared_out_by_cost_and_evenly_where_that_is_nothing() -> None:
    assert shared_out([1, 3, 0, 0], [2], [2.0, 1.0]) == [0.5, 1.5, 0.5, 0.5]


def test_layers_that_were_not_measured_share_their_stages_time_by_parameters() -> None:
    cut = Cut(chain(), [3], Costs([12.0] * 4, "parameters"))
    proposal = better_cut(cut, [0.030, 0.010])
    assert proposal is not None
    assert proposal.split_points == ["net.2"]
    assert proposal.seconds == pytest.approx(0.020)


def measured(forward: list[float], backward: list[float], sizes: list[int], recompute: bool = False) -> Costs:
    nothing = [0] * len(forward)
    profile = Profile(forward, backward, nothing, nothing, nothing, sizes)
    return Costs.measured(CostModel(profile, recompute=recompute, optimizer_copies=0))


def test_measured_layers_are_scaled_to_what_their_stages_took() -> None:
    # Measured, each stage takes 4; in the fit the first takes twice as much.
    costs = measured([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0] * 4)
    cut = Cut(chain(), [2], costs)
    assert better_cut(cut, [4.0, 4.0]) is None
    proposal = better_cut(cut, [12.0, 4.0])
    assert proposal is not None
    assert proposal == (["net.1"], 10.0)


def test_forwards_that_are_done_again_are_so_in_the_better_cut() -> None:
    cut = Cut(chain(6), [4], measured([1.0] * 6, [1.0] * 6, [0] * 6, recompute=True))
    # A layer takes 3 before the last stage, and 2 in it: 6 and 8 instead of 12 and 4.
    assert better_cut(cut, [12.0, 4.0]) == (["net.2"], 8.0)
    # Its stage has taken twice that.
    assert better_cut(cut, [24.0, 4.0]) == (["net.2"], 12.0)


def test_stages_that_were_measured_as_nothing_share_their_time_evenly() -> None:
    costs = measured([0.0] * 4, [0.0] * 4, [0] * 4)
    cut = Cut(chain(), [3], costs)
    assert better_cut(cut, [6.0, 2.0]) == (["net.2"], 4.0)


def test_the_memory_limit_is_kept() -> None:
    # Two more layers in a first stage of three would be better, but each needs 100 bytes, three times over.
    costs = measured([1.0] * 6, [0.0] * 6, [100] * 6)
    cut = Cut(chain(6), [1], costs)
    free = better_cut(cut, [1.0, 5.0])
    assert free is not None
    assert free.split_points == ["net.3"]
    bound = better_cut(cut, [1.0, 5.0], max_memory=800)
    assert bound is not None
    assert bound.split_points == ["net.2"]


def test_layers_that_share_buffers_stay_together() -> None:
    cut = Cut(chain(tie=(1, 2)), [3], Costs([12.0] * 4, "parameters"))
    assert better_cut(cut, [0.030, 0.010]) is None


def test_where_no_stage_idles_nothing_is_said() -> None:
    cut = Cut(chain(), [3], Costs([12.0] * 4, "parameters"))
    assert idle_warning(cut, tallies([0.030, 0.025], [0.0, 0.005], [0.0, 0.0])) is None
    assert idle_warning(cut, tallies([0.030], [0.0], [0.0])) is None


def test_an_idle_stage_is_named_with_the_slowest_one_and_a_better_cut() -> None:
    cut = Cut(chain(), [3], Costs([12.0] * 4, "parameters"))
    assert idle_warning(cut, tallies([0.030, 0.010], [0.0, 0.015], [0.0, 0.005])) == (
        "Stage 2 waits 67% of the time (50% for activations, 17% for gradients): stage 1 is busy for 30.0 ms of its"
        ' 30.0 ms per batch. A better cut, with about 20.0 ms per batch: split_points: ["net.2"] (a stage\'s time'
        " shared out among its layers by their parameters, as they were not measured; `lightning-ddg plan` measures"
        " them)"
    )


def test_a_measured_cut_is_proposed_as_it_is() -> None:
    costs = measured([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0] * 4)
    cut = Cut(chain(), [2], costs)
    warning = idle_warning(cut, tallies([0.012, 0.004], [0.0, 0.008], [0.0, 0.0]))
    assert warning is not None
    assert warning.endswith('A better cut, with about 10.0 ms per batch: split_points: ["net.1"]')


def test_where_no_cut_is_better_it_says_what_else_helps() -> None:
    cut = Cut(chain(2), [1], Costs([12.0] * 2, "parameters"))
    warning = idle_warning(cut, tallies([0.030, 0.010], [0.0, 0.020], [0.0, 0.0]))
    assert warning is not None
    assert "No other cut of the 2 layers is clearly better: use fewer stages, or return smaller layers" in warning
