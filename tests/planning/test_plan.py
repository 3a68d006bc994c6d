"""Tests of ``planning/plan.py`` and ``stages.py``: the figures of a plan from a known profile, and of real modules."""

from __future__ import annotations

import random
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg import DDGMixin, DDGStrategy
from lightning_ddg.network.cut import CostModel
from lightning_ddg.network.layers import Chain
from lightning_ddg.network.profile import Profile
from lightning_ddg.planning.plan import Plan, make_plan
from lightning_ddg.planning.simulate import SECONDS_PER_BYTE, synchronous_period
from lightning_ddg.planning.stages import CutPlan
from lightning_ddg.plugin import planned
from lightning_ddg.plugin.planned import plan_module
from tests.networks import Classifier, loader, state_of

# Four layers, of which the second takes half of the time; 4, 8, 12 and 16 bytes of parameters.
PROFILE = Profile(
    forward=[0.001, 0.004, 0.001, 0.002],
    backward=[0.002, 0.008, 0.002, 0.004],
    crossing=[0, 1000, 2000, 3000],
    crossing_grad=[0, 100, 200, 300],
    activations=[10_000, 20_000, 30_000, 40_000],
    parameters=[4, 8, 12, 16],
)
MODEL = CostModel(PROFILE, seconds_per_byte=SECONDS_PER_BYTE)


def chain() -> Chain:
    return Chain([(f"net.{number}", nn.Linear(number + 1, 1, bias=False)) for number in range(4)])


def test_the_figures_of_two_stages() -> None:
    plan = make_plan(chain(), MODEL, [2])
    cut = plan.rows[2]
    assert isinstance(cut, CutPlan)
    assert plan.seconds == pytest.approx(0.024)
    assert plan.split_points(2) == ["net.2"]
    assert cut.work.forward == pytest.approx([0.005, 0.003])
    assert cut.work.backward == pytest.approx([0.010, 0.006])
    # The messages are microseconds, which hide behind the work of the slower stage.
    assert (cut.steady_state.period, cut.steady_state.reason) == (pytest.approx(0.015), "stage 1")
    assert sum(cut.steady_state.busy) == pytest.approx(0.024 / 0.015)
    first, second = cut.stages
    assert (first.layers, second.layers) == (["net.0", "net.1"], ["net.2", "net.3"])
    assert (first.parameters, second.parameters) == (3, 7)
    assert (first.seconds, second.seconds) == (pytest.approx(0.015), pytest.approx(0.009))
    assert (first.share, second.share) == (pytest.approx(0.625), pytest.approx(0.375))
    assert (first.sends, second.sends) == (2000, 200), "activations on, gradients back"
    # The first stage keeps two batches, an older version of its 12 bytes of weights, and two gradients that wait; the
    # second what it received, and two activations that wait.
    assert (first.in_flight, second.in_flight) == (2 * 30_000 + 12 + 2 * 200, 70_000 + 2000 + 2 * 2000)
    # Weights, gradients, two copies of them in the optimizer, and what is in flight.
    assert (first.memory, second.memory) == (60_412 + 4 * 12, 76_000 + 4 * 28)


def test_forwards_done_again_are_work_of_the_stages_but_not_of_backpropagation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make_plan(chain(), replace(MODEL, recompute=True), [2])
    cut = plan.rows[2]
    assert isinstance(cut, CutPlan)
    assert plan.seconds == pytest.approx(0.024)
    assert cut.work.forward == pytest.approx([0.005, 0.003])
    # The first stage's backward has its forward in it, and keeps the input of the batch alone: it reads that itself.
    assert cut.work.backward == pytest.approx([0.015, 0.006])
    assert cut.stages[0].in_flight == 30_000 + 12 + 2 * 200
    unstashed = make_plan(chain(), replace(MODEL, recompute=True, stash=False), [2]).rows[2]
    assert isinstance(unstashed, CutPlan)
    assert [stage.in_flight for stage in unstashed.stages] == [30_000 + 2 * 200, cut.stages[1].in_flight]
    plan.print()
    assert "1.20x" in (printed := capsys.readouterr().out)  # 24 / 20 ms
    assert "60%" in printed


def test_frozen_weights_are_memory_but_not_in_flight() -> None:
    plain, frozen = (
        make_plan(chain(), replace(MODEL, profile=profile), [2]).rows[2]
        for profile in (PROFILE, replace(PROFILE, frozen=[1, 2, 4, 8]))
    )
    assert isinstance(plain, CutPlan)
    assert isinstance(frozen, CutPlan)
    assert [stage.in_flight for stage in frozen.stages] == [stage.in_flight for stage in plain.stages]
    assert [b.memory - a.memory for a, b in zip(plain.stages, frozen.stages, strict=True)] == [3, 12]


def test_memory_depends_on_the_optimizer() -> None:
    adam, sgd = (make_plan(chain(), replace(MODEL, optimizer_copies=copies), [2]).rows[2] for copies in (2, 0))
    assert isinstance(adam, CutPlan)
    assert isinstance(sgd, CutPlan)
    assert [a.memory - b.memory for a, b in zip(adam.stages, sgd.stages, strict=True)] == [2 * 12, 2 * 28]
    assert [stage.in_flight for stage in adam.stages] == [stage.in_flight for stage in sgd.stages]


def test_a_middle_stage_sends_both_ways() -> None:
    plan = make_plan(chain(), MODEL, [3])
    cut = plan.rows[3]
    assert isinstance(cut, CutPlan)
    assert cut.split_points == ["net.1", "net.2"]
    assert [stage.sends for stage in cut.stages] == [1000, 2000 + 100, 200]


def test_one_stage_is_plain_backpropagation() -> None:
    cut = make_plan(chain(), MODEL, [1]).rows[1]
    assert isinstance(cut, CutPlan)
    assert cut.steady_state.busy == pytest.approx([1.0])
    assert cut.split_points == []


def test_a_number_of_stages_that_cannot_be_says_why_in_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    layers = chain()
    shared = nn.BatchNorm1d(2, affine=False)
    layers.layers[1].norm, layers.layers[2].norm = shared, shared
    plan = make_plan(layers, MODEL, [2, 4, 5])
    assert [isinstance(cut, CutPlan) for cut in plan.rows.values()] == [True, False, False]
    plan.print()
    printed = capsys.readouterr().out
    assert "\n4 stages: num_stages=4, but layers that share parameters or buffers leave only 3 parts" in printed
    assert "\n5 stages: num_stages=5, but the network has 4 layers" in printed
    with pytest.raises(ValueError, match="num_stages=4, but layers that share"):
        plan.split_points(4)
    with pytest.raises(ValueError, match=r"num_stages=7 has not been planned, only 2, 4, 5: add it to `num_stages`"):
        plan.split_points(7)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(chain(), MODEL, [2, 3]).print()
    printed = capsys.readouterr().out
    lines = [" ".join(line.replace("│", " ").split()) for line in printed.splitlines()]
    assert "Plain backpropagation on one device: 24.0 ms per batch" in lines
    assert "2 15.0 ms 1.60x 80% stage 1 76.1 kB" in lines
    assert "3 12.0 ms 2.00x 67% stage 2 76.1 kB" in lines
    assert "1 net.0 … net.1 (2) 3 15.0 ms 62.5% 2 kB 60.4 kB 60.5 kB" in lines
    assert "2 net.1 (1) 2 12.0 ms 50.0% 2.1 kB 44.4 kB 44.4 kB" in lines
    assert 'split_points: ["net.2"]' in lines
    assert 'split_points: ["net.1", "net.2"]' in lines


def test_without_details_each_cut_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(chain(), MODEL, [2, 3]).print(details=False)
    printed = capsys.readouterr().out
    assert printed.endswith('split_points: ["net.2"]  # 2 stages\nsplit_points: ["net.1", "net.2"]  # 3 stages\n')
    assert "share" not in printed


def test_the_picture_has_a_panel_for_each_number_of_stages(tmp_path: Path) -> None:
    make_plan(chain(), replace(MODEL, latency=0.03, slack=4), [3]).draw(tmp_path / "far.svg")
    assert "3 stages: " in (tmp_path / "far.svg").read_text()
    make_plan(chain(), MODEL, [2, 3, 9]).draw(tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    for words in (
        "plain backpropagation on one device",
        "2 stages: 1.60 times as fast, limited by stage 1",
        "3 stages: 2.00 times as fast, limited by stage 2",
        "period 24.0 ms",
        "period 15.0 ms",
        "period 12.0 ms",
    ):
        assert text.count(words) >= 1, words
    assert "9 stages" not in text


def test_a_plan_without_any_cut_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be cut into any of the planned numbers of stages"):
        make_plan(chain(), MODEL, [5, 6]).draw(tmp_path / "plan.png")
    with pytest.raises(ValueError, match=r"'plan.gif' is of no known kind"):
        make_plan(chain(), MODEL, [2]).draw("plan.gif")


# ---- real modules


class Touching(Classifier):
    """Logs, draws random numbers and writes into its batch before it calls the network."""

    def __init__(self, network: str = "convnet") -> None:
        super().__init__(network)
        self.net[3].requires_grad_(False)
        self.net[1].eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        x.add_(torch.rand_like(x) + random.random())
        self.log("early", x.mean())
        assert self.net.training
        self(x)
        raise AssertionError("the step ends at the network's call")


def test_planning_leaves_no_trace() -> None:
    module = Touching()
    batch = next(iter(loader("convnet")))
    images = batch[0].clone()
    before, modes = state_of(module), [part.training for part in module.modules()]
    frozen = [parameter.requires_grad for parameter in module.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = DDGStrategy.plan(module, batch, [2, 4])
    assert isinstance(plan, Plan)
    after = state_of(module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [part.training for part in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == frozen
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not {"forward", "log"} & (vars(module).keys() | vars(module.net).keys())
    assert torch.equal(batch[0], images)


def test_a_plan_of_a_real_module_is_a_cut_of_it() -> None:
    module = Classifier("mlp")
    plan = DDGStrategy.plan(module, next(iter(loader("mlp"))))
    assert list(plan.rows) == [2, 3, 4, 5, 6, 7, 8]
    for num_stages, cut in plan.rows.items():
        if num_stages == 8:
            assert isinstance(cut, str)
            continue
        assert isinstance(cut, CutPlan)
        assert [layer for stage in cut.stages for layer in stage.layers] == [f"net.{at}" for at in range(7)]
        assert [stage.layers[0] for stage in cut.stages[1:]] == cut.split_points == plan.split_points(num_stages)
        assert sum(stage.parameters for stage in cut.stages) == sum(p.numel() for p in module.parameters())
        assert sum(stage.share for stage in cut.stages) == pytest.approx(1.0)
        assert cut.steady_state.period >= plan.seconds / num_stages
    # 5 samples in double precision: a value of width 10, 10, 10, 10 or 8 crosses a cut, its gradient comes back.
    cut = plan.rows[7]
    assert isinstance(cut, CutPlan)
    widths = [10, 10, 10, 10, 10, 8]
    wanted = [8 * 5 * (on + back) for on, back in zip([*widths, 0], [0, *widths], strict=True)]
    assert [stage.sends for stage in cut.stages] == wanted


def test_a_plan_can_count_forwards_that_are_done_again() -> None:
    cuts = [
        DDGStrategy.plan(Classifier("mlp"), next(iter(loader("mlp"))), 7, recompute=again).rows[7]
        for again in (False, True)
    ]
    kept, again = cuts
    assert isinstance(kept, CutPlan)
    assert isinstance(again, CutPlan)
    # Every stage has one layer; all but the last two keep less, and the last has nothing to do again.
    assert all(less.memory <= more.memory for less, more in zip(again.stages, kept.stages, strict=True))
    assert sum(stage.memory for stage in again.stages) < sum(stage.memory for stage in kept.stages)


class Listed(DDGMixin, Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(1, 1))

    def configure_stages(self) -> Any:
        return [*self.net]


def test_configure_stages_is_asked() -> None:
    assert DDGStrategy.plan(Listed(), next(iter(loader("mlp"))), 2).split_points(2)


class NeverCalls(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[0].mean()  # type: ignore[no-any-return]


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("bang")


def failing() -> Classifier:
    module = Classifier("mlp")
    module.net.append(Fails())
    return module


class Peeking(nn.Module):
    """Looks at what it is given, so that it cannot be traced, but always calls the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.other(self.one(x))  # type: ignore[no-any-return]


def test_a_network_that_is_only_run_not_traced_is_planned() -> None:
    module = Classifier()
    module.net = Peeking()  # type: ignore[assignment]
    assert DDGStrategy.plan(module, next(iter(loader("mlp"))), 2).split_points(2) == ["net.other"]


class Winding(nn.Module):
    """Its layers depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.other(x)  # type: ignore[no-any-return]


class Lost(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = Winding()  # type: ignore[assignment]


def test_what_cannot_be_planned_is_refused() -> None:
    batch = next(iter(loader("mlp")))
    with pytest.raises(RuntimeError, match="`training_step` did not call the network"):
        plan_module(NeverCalls(), batch)
    with pytest.raises(RuntimeError, match=r"could not be measured one after the other \(ArithmeticError: bang\)"):
        plan_module(failing(), batch)
    with pytest.raises(RuntimeError, match=r"`training_step` failed before it called.*Give the batch as the training"):
        plan_module(Classifier(), 7)
    with pytest.raises(ValueError, match=r"num_stages=\[\] names no number of stages: give one, or several"):
        plan_module(Classifier(), batch, [])
    with pytest.raises(TypeError, match=r"'net' \(\w+\) cannot be run in parts: The forward of \w+ failed"):
        plan_module(Lost(), batch)


def test_numbers_are_planned_once() -> None:
    assert list(plan_module(Classifier(), next(iter(loader("mlp"))), [3, 2, 3]).rows) == [3, 2]


# ---- micro-batches


def test_micro_batches_are_compared_by_time_delay_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    # A third of a batch takes half of its time, not a third.
    half = replace(PROFILE, forward=[t / 2 for t in PROFILE.forward], backward=[t / 2 for t in PROFILE.backward])
    plan = make_plan(chain(), MODEL, [2, 4], {1: MODEL, 3: replace(MODEL, profile=half)})
    assert list(plan.split) == [(2, 1), (2, 3), (4, 1), (4, 3)]
    assert plan.split[2, 1] == plan.rows[2]
    plan.print(details=False)
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "2 1 15.0 ms 1.60x 80% 1 76.1 kB" in lines
    assert "2 3 22.5 ms 1.07x 53% 1 76.1 kB" in lines
    assert "4 1 12.0 ms 2.00x 50% 3 68.7 kB" in lines
    assert "4 3 18.0 ms 1.33x 33% 1 68.7 kB" in lines


def test_a_synchronous_finish_costs_what_all_stages_take_together(capsys: pytest.CaptureFixture[str]) -> None:
    half = replace(PROFILE, forward=[t / 2 for t in PROFILE.forward], backward=[t / 2 for t in PROFILE.backward])
    plan = make_plan(chain(), MODEL, [2, 4], {3: replace(MODEL, profile=half)}, finish=0.1)
    for cut in plan.split.values():
        # Alike, the micro-batches fill and empty the pipeline once.
        assert synchronous_period(cut.work, 3) < 3 * synchronous_period(cut.work)
    plan.print(details=False)
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    # 24 ms is all work; a message takes hardly any time.
    assert "2 1 15.0 ms 24.0 ms 15.9 ms 1.51x" in lines
    assert "4 1 12.0 ms 24.0 ms 13.2 ms 1.82x" in lines
    with pytest.raises(ValueError, match=r"finish=2 is no part of a fit"):
        plan_module(Classifier(), next(iter(loader("mlp"))), 2, finish=2)


def test_a_latency_costs_less_with_slack_and_the_plan_says_how_much_hides_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    half = replace(PROFILE, forward=[t / 2 for t in PROFILE.forward], backward=[t / 2 for t in PROFILE.backward])
    far = replace(MODEL, latency=0.030)
    make_plan(chain(), far, [2, 4], {3: replace(far, profile=half)}).print(details=False)
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert "Links of 30.0 ms one way, slack=0" in lines
    # Stages of 15 and 9 ms: (24 + 2 * 30) / 2, and for 15 ms a batch (84 / 15 - 1) batches more on the way.
    assert "2 1 42.0 ms 0.57x 4 15.0 ms 1.60x 5" in lines
    assert lines[-2].startswith("4 3 ")
    make_plan(chain(), replace(far, slack=4), [2]).print()
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Links of 30.0 ms one way, slack=4" in printed
    assert "delay, slack=4" in printed
    assert re.search(r"2 15\.0 ms 1\.60x 80% stage 1 \S+ kB 5 ", printed)
    assert "2 1 15.0 ms 1.60x 4 15.0 ms 1.60x 5" in printed
    # Five batches in flight instead of one: activations, older weights, and what has arrived before its turn.
    stages = [make_plan(chain(), one, [2]).rows[2] for one in (MODEL, replace(MODEL, slack=4))]
    assert stages[1].stages[0].in_flight > 2 * stages[0].stages[0].in_flight  # type: ignore[union-attr]


@pytest.mark.parametrize("latency", [-1, float("inf"), float("nan"), True, "50"])
def test_what_is_no_latency_or_slack_is_refused(latency: Any) -> None:
    with pytest.raises(ValueError, match=rf"latency_ms={latency!r} is not how long a message is under way: give milli"):
        plan_module(Classifier(), next(iter(loader("mlp"))), 2, latency_ms=latency)
    with pytest.raises(ValueError, match=r"slack=0.5 is not a number of batches. Use 0"):
        plan_module(Classifier(), next(iter(loader("mlp"))), 2, slack=0.5)  # type: ignore[arg-type]


def test_without_micro_batches_there_is_no_such_table(capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(chain(), MODEL, [2]).print()
    assert "micro-batches" not in capsys.readouterr().out


def test_micro_batches_are_measured_on_a_part_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module, sizes = Classifier(), []
    original = planned.measure_profile

    def noted(layers: Any, args: Any, kwargs: Any, **options: Any) -> Any:
        sizes.append(len(args[0]))
        return original(layers, args, kwargs, **options)

    monkeypatch.setattr(planned, "measure_profile", noted)
    plan = plan_module(module, next(iter(loader("mlp"))), [2, 3], micro_batches=[1, 2, 5])
    assert sizes == [5, 5, 3, 1]
    assert list(plan.split) == [(k, m) for k in (2, 3) for m in (1, 2, 5)]
    assert list(plan_module(module, next(iter(loader("mlp"))), 2, micro_batches=2).split) == [(2, 2)]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (6, "micro_batches=6, but the batch has 5 samples"),
        (0, "micro_batches=0 is not a number"),
        (True, "=True is not"),
    ],
)
def test_a_number_of_micro_batches_that_cannot_be_is_refused(count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_module(Classifier(), next(iter(loader("mlp"))), 2, micro_batches=[count])


class TwoCalls(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.log("seen", x.mean())
        return nn.functional.cross_entropy(self.net(x) + self.net(x.flip(1)), y)


def test_a_step_of_several_calls_is_planned_as_it_would_be_cut() -> None:
    batch = next(iter(loader("mlp")))
    plan = plan_module(TwoCalls(), batch, [2, 3], micro_batches=[2])
    assert list(plan.rows) == [2, 3]
    assert plan.split_points(2)[0].startswith("net.")
