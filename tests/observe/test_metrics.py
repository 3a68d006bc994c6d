"""Tests of ``metrics.py``, and of what DDGMonitor logs of it: against figures reckoned by hand from the weights.

How long anything takes is nowhere asserted, except that layers that sleep make another stage wait.
"""

from __future__ import annotations

import csv
import math
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_ddg import DDGMixin, DDGMonitor, DDGStrategy
from lightning_ddg.core.delay_line import DelayLine
from lightning_ddg.core.execution import ACTIVATION, GRADIENT, OUTPUT, Channel, Observers
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.staged import Staged
from lightning_ddg.core.staleness import PAPER
from lightning_ddg.observe.metrics import Gauge, cosine, relative_change
from tests.harness import run_ranks, run_ranks_raw
from tests.networks import Classifier, ManualClassifier, loader, quiet_trainer, seeded_network

WAITS = {"waits_activations", "waits_gradients"}
AGES = {"delay", "delay_updates", "staleness"}


# ---- mathematics


def test_the_relative_change_is_that_of_all_tensors_together() -> None:
    now, then = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], [torch.tensor([3.0, 2.0]), torch.tensor([[4.0]])]
    assert float(relative_change(now, then)) == pytest.approx(2 / 5)
    assert float(relative_change(now, now)) == 0.0
    assert math.isnan(relative_change([torch.zeros(2)], [torch.zeros(2)]))


def test_halves_are_added_up_in_single_precision() -> None:
    many = [torch.full((5000,), 10.0, dtype=torch.float16)]
    assert float(relative_change(many, [torch.zeros_like(many[0])])) == pytest.approx(1.0)
    assert float(cosine(many, many) or 0) == pytest.approx(1.0)


def test_the_cosine_counts_a_missing_gradient_as_zero() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    got = [cosine([a], [b]), cosine([a], [-3 * a]), cosine([a, None], [a, a]), cosine([a, None], [None, a])]
    assert [float(value) for value in got if value is not None] == pytest.approx([0.5**0.5, -1.0, 0.5**0.5, 0.0])
    assert cosine([None], [a]) is None
    assert math.isnan(cosine([a], [torch.zeros(2)]))  # type: ignore[arg-type]
    assert float(cosine([a.to_sparse()], [b]) or 0) == pytest.approx(0.5**0.5)


class FakeEvent:
    """A CUDA event on a device whose work of the n-th mark is done at n seconds."""

    recorded = 0
    done = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        FakeEvent.recorded += 1
        self.at = FakeEvent.recorded
        assert stream == "the stream of cuda:1"

    def elapsed_time(self, other: FakeEvent) -> float:
        assert max(self.at, other.at) <= FakeEvent.done, "an error on a device: the work is not done"
        return 1e3 * (other.at - self.at)

    def query(self) -> bool:
        return self.at <= FakeEvent.done

    def synchronize(self) -> None:
        FakeEvent.done = max(FakeEvent.done, self.at)


def test_on_a_device_readings_come_when_its_work_is_done_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(FakeEvent, "recorded", 0)
    monkeypatch.setattr(FakeEvent, "done", 0)
    observers = Observers()
    line = DelayLine([nn.Linear(1, 1), nn.Linear(1, 1)], observers=observers)
    gauge = Gauge(observers, line.stages, [], torch.device("cuda:1"), 2, False)
    readings = []
    for batch in range(5):
        gauge.begin(batch, True)
        line.backward(lambda: None)
        readings.append(gauge.end(step=10 * batch))
    assert readings == [[], [], [], [], []], "the device has not done anything yet"
    # Marks: 1 at the beginning, 2 and 3 at the end of batches, 4 at the end of the first reading.
    FakeEvent.done = 4
    gauge.begin(5, True)
    (first, last) = gauge.end(50)
    assert [(reading.stage, reading.batch, reading.step) for reading in (first, last)] == [(1, 1, 10), (2, 1, 10)]
    assert (first.tally.batches, first.tally.seconds, first.tally.due, last.tally.due) == (2, 2.0, 1, 2)
    assert [(reading.batch, reading.step) for reading in gauge.finish()] == [
        (3, 30), (3, 30), (5, 50), (5, 50), (5, None), (5, None),
    ]  # fmt: skip


def test_what_is_waited_for_is_counted_on_its_side(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    observers = Observers()
    gauge = Gauge(observers, [2], [], torch.device("cpu"), 1, False)
    for batch, counts in enumerate((False, True)):
        gauge.begin(batch, counts)
        for channel in (ACTIVATION, Channel("batch"), Channel("flag"), GRADIENT, OUTPUT):
            observers.before_take(0, channel)
            observers.after_take(0, channel)
        (reading,) = gauge.end(batch)
        assert (reading.tally.activations, reading.tally.gradients) == ((3.0, 1.0) if counts else (0.0, 0.0))
        assert reading.tally.batches == counts
    observers.before_drain()
    gauge.detach()
    observers.before_take(0, GRADIENT)
    observers.after_take(0, GRADIENT)
    assert gauge.finish()[0].tally.gradients == 0.0


def test_stashed_weights_and_copies_of_them_tell_the_same_staleness() -> None:
    readings = []
    for kind in (DelayLine, Staged):
        torch.manual_seed(0)
        segments, observers = [nn.Linear(3, 3).double() for _ in range(3)], Observers()
        line: Any = (
            Staged(segments, PAPER, False, observers) if kind is Staged else DelayLine(segments, [], PAPER, observers)
        )
        optimizer = torch.optim.SGD(nn.ModuleList(segments).parameters(), lr=0.1)
        gauge = Gauge(observers, line.stages, [optimizer], torch.device("cpu"), 1, kind is DelayLine)
        for batch in range(6):
            gauge.begin(batch, True)
            output = line.train(Batch(batch), (torch.full((1, 3), 1.0 + batch).double(),), {})
            line.backward(output.square().sum().backward)
            line.before_step()
            optimizer.step()
            line.after_step()
            optimizer.zero_grad()
            for reading in gauge.end(batch):
                figures = reading.tally.figures(waits=False)
                # In one stage the cosine is 1, and as far as there is one, it is there as often as the staleness.
                assert ("cosine" in figures) == ("staleness" in figures and kind is DelayLine)
                figures.pop("cosine", None)
                readings.append((reading.stage, batch, figures))
    lines, stages = readings[:18], readings[18:]
    assert [row[:2] for row in lines] == [row[:2] for row in stages]
    for one, other in zip(lines, stages, strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-12)
    assert [figures.get("staleness", None) is None for _, _, figures in lines[:6]] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert lines[-3][2]["staleness"] > 0.0
    assert lines[-3][2]["delay"] == 2


# ---- real fits


class ListLogger(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "list"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


class History(Callback):
    """Reckons the figures by itself: from weights kept of every batch, and gradients of a copy of the module."""

    def __init__(self) -> None:
        self.weights: dict[int, list[list[Tensor]]] = {}
        self.grads: dict[int, list[list[Tensor]]] = {}
        self.left: set[str] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        strategy = trainer.strategy
        named = dict(pl_module.named_parameters())
        own = range(1, strategy.num_stages + 1) if strategy.stage is None else [strategy.stage]
        if strategy.stage is None:
            twin = seeded_network("mlp")
            twin.load_state_dict({name.removeprefix("net."): value for name, value in pl_module.state_dict().items()})
            cross_entropy(twin(batch[0]), batch[1]).backward()
            fresh = {f"net.{name}": parameter.grad for name, parameter in twin.named_parameters()}
        for stage in own:
            names = strategy.stage_parameter_names[stage - 1]
            self.weights.setdefault(stage, []).append([named[name].detach().clone() for name in names])
            if strategy.stage is None:
                self.grads.setdefault(stage, []).append([fresh[name] for name in names])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        strategy = trainer.strategy
        self.left = {type(observer).__name__ for observer in strategy.run.observers._all} & {"Gauge", "Recorder"}


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def fit(
    folder: str | None, devices: int, stages: int, make: str = "Classifier", every: int = 4, cosine: bool = False,
    samples: int = 45, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Trains 3 epochs, of 9 batches each unless told otherwise, and says what was logged and what was reckoned."""
    drain = kwargs.pop("drain", "epoch")
    model = {"Classifier": Classifier, "ManualClassifier": ManualClassifier}[make]("mlp", "nesterov")
    monitor, history, kept = DDGMonitor(timeline=False, every_n_steps=every, cosine=cosine), History(), ListLogger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(
            devices=devices, strategy=DDGStrategy(num_stages=stages, balance="parameters", drain=drain),
            logger=[kept, *([CSVLogger(folder, "csv", "")] if folder else [])], callbacks=[monitor, history], **kwargs,
        )  # fmt: skip
        trainer.fit(model, loader("mlp", samples))
    return {
        "rows": [(step, metrics) for step, metrics in kept.rows if any(name.startswith("ddg/") for name in metrics)],
        "steps": [step for step, metrics in kept.rows if "train_loss_step" in metrics],
        "figures": monitor.figures,
        "weights": history.weights,
        "grads": history.grads,
        "left": history.left,
        "warnings": [str(warning.message) for warning in caught if "DDGMonitor" in str(warning.message)],
    }


def reckoned(weights: dict[int, list[list[Tensor]]], stages: int, read: int, drain: str) -> dict[str, float]:
    """The staleness of each stage at a batch, from the weights of all batches; none where no gradient was due."""
    expected = {}
    for stage in range(1, stages + 1):
        delay = stages - stage
        if (read % 9 if drain == "epoch" else read) >= delay:
            now, then = (flat(weights[stage][batch]) for batch in (read, read - delay))
            expected[f"ddg/stage_{stage}/staleness"] = float((now - then).norm() / now.norm())
    return expected


def check_rows(rows: list[Any], weights: dict[int, list[list[Tensor]]], stages: int, drain: str) -> None:
    assert sorted(step for step, _ in rows) == [3, 7, 11, 15, 19, 23], "once each, with the step it belongs to"
    for step, metrics in rows:
        got = {name: value for name, value in metrics.items() if name.endswith("/staleness")}
        assert got == pytest.approx(reckoned(weights, stages, step, drain), rel=1e-9)
        for stage in range(1, stages + 1):
            assert metrics[f"ddg/stage_{stage}/delay"] == stages - stage


@pytest.mark.parametrize("make", ["Classifier", "ManualClassifier"])
@pytest.mark.parametrize("drain", ["epoch", "fit", "never"])
def test_one_process_logs_what_is_reckoned_from_the_weights(
    make: str, drain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got = fit(None, 1, 3, make, cosine=True, drain=drain)
    check_rows(got["rows"], got["weights"], 3, drain)
    # Batch 19 is the second of an epoch: drained, the first stage has no gradient to apply there.
    assert ("ddg/stage_1/staleness" in dict(got["rows"])[19]) == (drain != "epoch")
    for step, metrics in got["rows"]:
        for stage in (1, 2, 3):
            name = f"ddg/stage_{stage}/cosine"
            assert (name in metrics) == (f"ddg/stage_{stage}/staleness" in metrics)
            if name in metrics:
                one, other = (flat(got["grads"][stage][at]) for at in (step, step - 3 + stage))
                expected = float(torch.cosine_similarity(one, other, dim=0))
                assert metrics[name] == pytest.approx(expected, rel=1e-9)
        assert not any("waits" in name for name in metrics), "nobody waits in one process"
    assert got["figures"][1].keys() == AGES | {"cosine"}
    assert got["left"] == set()
    assert got["warnings"] == []
    printed = capsys.readouterr().out
    assert "DDGMonitor: 3 stages" in printed
    assert "waits for" not in printed
    assert "cosine of applied" in printed


def test_the_first_updates_of_a_stage_are_not_late() -> None:
    """Stage 1 of 3 makes no update at batches 0 and 1; at batches 2 to 4 it has made 0, 1 and 2 since the forward."""
    rows = dict(fit(None, 1, 3, every=1)["rows"])
    assert [rows[step].get("ddg/stage_1/delay_updates") for step in range(12)] == [
        None, None, 0, 1, 2, 2, 2, 2, 2, None, None, 0,
    ]  # fmt: skip
    assert rows[2]["ddg/stage_1/staleness"] == 0.0
    assert rows[3]["ddg/stage_1/staleness"] > 0.0
    assert [rows[step]["ddg/stage_3/delay"] for step in range(12)] == [0] * 12


@pytest.mark.parametrize("devices", [1, 2])
def test_accumulation_makes_delays_shorter_in_updates(devices: int) -> None:
    train = partial(fit, None, devices, 2, accumulate_grad_batches=2, samples=90, max_epochs=1)
    ranks = [train()] if devices == 1 else run_ranks(train, devices)
    weights = {stage: kept for rank in ranks for stage, kept in rank["weights"].items()}
    rows = dict(ranks[0]["rows"])
    assert set(rows) == {1, 3, 5, 7}, "the loggers' steps are the optimizer's"
    for step in (3, 5, 7):
        assert rows[step]["ddg/stage_1/delay"] == 1
        assert rows[step]["ddg/stage_1/delay_updates"] == 0.5
        now, then = (flat(weights[1][batch]) for batch in (2 * step + 1, 2 * step))
        assert rows[step]["ddg/stage_1/staleness"] == pytest.approx(float((now - then).norm() / now.norm()), abs=1e-15)


@pytest.mark.parametrize("stages", [2, 4])
def test_several_processes_log_what_is_reckoned_from_the_weights(stages: int, tmp_path: Path) -> None:
    drain = "epoch" if stages == 4 else "never"
    ranks = run_ranks(partial(fit, str(tmp_path), stages, stages, drain=drain), stages)
    weights = {stage: kept for rank in ranks for stage, kept in rank["weights"].items()}
    check_rows(ranks[0]["rows"], weights, stages, drain)
    for _, metrics in ranks[0]["rows"]:
        waits = {name: value for name, value in metrics.items() if "waits" in name}
        assert all(0.0 <= value <= 1.0 for value in waits.values())
        for name in waits:
            assert name.split("/")[-1] in WAITS
    # Its batches are counted from the fifth of each epoch on, and the first window ends with the fourth.
    assert [any("waits" in name for name in metrics) for step, metrics in sorted(ranks[0]["rows"])][:2] == [False, True]
    figures = ranks[0]["figures"]
    assert list(figures) == list(range(1, stages + 1))
    assert all(row.keys() == AGES | WAITS for row in figures.values())
    assert figures[1]["waits_activations"] == figures[stages]["waits_gradients"] == 0.0
    for rank in ranks[1:]:
        assert (rank["rows"], rank["figures"], rank["warnings"]) == ([], {}, [])
    assert all(rank["left"] == set() for rank in ranks)
    with (tmp_path / "csv" / "metrics.csv").open(newline="") as file:
        written = {
            int(row["step"]): float(row["ddg/stage_2/delay"])
            for row in csv.DictReader(file)
            if row["ddg/stage_2/delay"]
        }
    assert written == dict.fromkeys((3, 7, 11, 15, 19, 23), stages - 2)


def test_the_cosine_in_several_processes_is_refused_with_a_remedy() -> None:
    for result in run_ranks_raw(partial(fit, None, 2, 2, cosine=True), 2):
        assert result.error is not None
        assert "DDGMonitor(cosine=True) compares the gradient" in result.error
        assert "Trainer(devices=1, strategy=DDGStrategy(num_stages=2))" in result.error


@pytest.mark.parametrize("steps", [0, -1, True, 2.5, "50"])
def test_a_number_of_steps_that_is_none_is_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"every_n_steps=.*: give a number of batches, 1 or more"):
        DDGMonitor(timeline=False, every_n_steps=steps)


class Slow(nn.Linear):
    """A layer that takes 10 ms forward, whatever else the machine does."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().forward(x)


class SlowLayers(DDGMixin, Classifier):
    """Four layers of the same cost, and nothing else that takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Slow(6, 6) for _ in range(4))).double()

    def configure_stages(self) -> list[nn.Module]:
        return list(self.net)


def fit_unbalanced() -> tuple[list[str], dict[int, dict[str, float]], list[int]]:
    monitor, kept = DDGMonitor(timeline=False, every_n_steps=10), ListLogger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(
            devices=2, strategy=DDGStrategy(split_points=["net.3"]), logger=kept, callbacks=[monitor], max_epochs=2,
        )  # fmt: skip
        trainer.fit(SlowLayers(), loader("mlp", 150))
    return (
        [str(warning.message) for warning in caught if "DDGMonitor" in str(warning.message)],
        monitor.figures,
        [step for step, metrics in kept.rows if step is not None and "ddg/stage_1/delay" in metrics],
    )


def test_an_unbalanced_cut_is_named_with_a_better_one() -> None:
    (warned, figures, steps), (silent, none, _) = run_ranks(fit_unbalanced, 2)
    assert sorted(steps) == [9, 19, 29, 39, 49, 59]
    # The second stage sleeps for 10 ms of each 30.
    assert figures[2]["waits_activations"] > 0.2
    (message,) = warned
    assert "DDGMonitor: Stage 2 waits " in message
    assert "stage 1 is busy for " in message
    assert 'split_points: ["net.2"] (a stage\'s time shared out among its layers by their parameters' in message
    assert (silent, none) == ([], {})
