"""Tests of ``monitor.py``: what is recorded of real fits, and shown.

How long anything takes is nowhere asserted: only what came before what, which holds on any machine.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_ddg import DDGMonitor, DDGStrategy, Staleness
from lightning_ddg.observe.recording import Measured, Recorder
from lightning_ddg.planning.simulate import Event
from tests.harness import run_ranks
from tests.networks import Classifier, ManualClassifier, loader, quiet_trainer, state_of

# ---- real fits


def check_order(rows: list[list[Event]], first: int) -> None:
    """Every stage follows its program, and no message arrives before it was sent."""
    num_rows = len(rows)
    at = {(event.stage, event.kind, event.batch): event for row in rows for event in row if event.kind != "idle"}
    for stage, row in enumerate(rows, start=1):
        work = [event for event in row if event.kind != "idle"]
        lag = num_rows - stage
        batches = len(work) // 2
        program = [(kind, first + t - lag * (kind == "B")) for t in range(batches) for kind in "FB"]
        assert [(event.kind, event.batch) for event in work] == program
        assert all(event.stage == stage and event.start < event.end for event in work)
        assert all(before.end <= after.start for before, after in zip(work, work[1:], strict=False))
        for event in work:
            sender = at.get((stage - 1 if event.kind == "F" else stage + 1, event.kind, event.batch))
            assert sender is None or sender.end <= event.start


def fit(model: Classifier, monitor: bool | str | Path | None, **kwargs: Any) -> tuple[Any, DDGMonitor | None]:
    watching = None if monitor is None else DDGMonitor(monitor)
    trainer = quiet_trainer(callbacks=[] if watching is None else [watching], **kwargs)
    trainer.fit(model, loader("mlp", 200))
    return trainer, watching


@pytest.mark.parametrize("make", [Classifier, ManualClassifier])
def test_one_process(make: type[Classifier], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "timeline.svg"
    watched, plain = make(), make()
    _, monitor = fit(watched, path, strategy=DDGStrategy(num_stages=3, balance="parameters"), max_epochs=2)
    assert monitor is not None
    assert monitor.measured is not None
    (row,) = monitor.measured.rows
    assert {event.kind for event in row} == {"F", "B"}
    check_order([row], first=8)
    assert len(row) == 2 * 21
    printed = capsys.readouterr().out
    assert f"{monitor.measured}\nDDGMonitor: timeline drawn in {path}\n" in printed
    assert "period" in path.read_text()
    fit(plain, None, strategy=DDGStrategy(num_stages=3, balance="parameters"), max_epochs=2)
    before, after = state_of(plain), state_of(watched)
    assert all(torch.equal(before[name], after[name]) for name in before), "looking on changes nothing"


class KeepsCut(Classifier):
    def on_train_end(self) -> None:
        self.cut = self.trainer.strategy.run.cut


@pytest.mark.parametrize("rule", [Staleness(), Staleness(stash=False)], ids=["no effect", "features replay"])
def test_one_process_is_expected_to_do_forwards_again_where_it_does(rule: Staleness) -> None:
    strategy = DDGStrategy(num_stages=3, recompute=True, staleness=rule)
    model = KeepsCut()
    _, monitor = fit(model, False, strategy=strategy, max_epochs=1)
    assert monitor is not None
    assert monitor.measured is not None
    planned, cut = monitor.measured.planned, model.cut
    assert planned is not None
    assert cut.costs.model is not None
    profile = cut.costs.model.profile
    again = 0.0 if rule.stash else sum(profile.forward[: cut.starts[-1]])
    assert planned.forward == pytest.approx([sum(profile.forward)])
    assert planned.backward == pytest.approx([sum(profile.backward) + again])


class Attached(Callback):
    """Notes in which batches the forwards are being recorded."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        strategy = trainer.strategy
        if any(isinstance(observer, Recorder) for observer in strategy.run.observers._all):
            self.batches.append(batch_idx)


def train_in_ranks(folder: str) -> tuple[Any, dict[str, Tensor], list[int], str | None]:
    attached = Attached()
    monitor = DDGMonitor(timeline=True)
    model = Classifier("mlp")
    trainer = quiet_trainer(
        devices=2, strategy=DDGStrategy(balance="parameters"), logger=CSVLogger(folder), callbacks=[attached, monitor],
        max_epochs=2,
    )  # fmt: skip
    trainer.fit(model, loader("mlp", 200))
    measured = None if monitor.measured is None else [[tuple(e) for e in row] for row in monitor.measured.rows]
    return measured, state_of(model), attached.batches, trainer.log_dir


def test_two_processes(tmp_path: Path) -> None:
    (rows, state, attached, log_dir), other = run_ranks(train_in_ranks, 2, str(tmp_path))
    assert other[0] is None, "rank 0 alone knows"
    # Before the hook of this callback, which comes first, the monitor has begun; after it, it has stopped.
    assert attached == other[2] == list(range(6, 6 + 21))
    measured = [[Event(*event) for event in row] for row in rows]
    check_order(measured, first=6)
    assert [len([event for event in row if event.kind == "F"]) for row in measured] == [21, 21]
    assert any(event.kind == "idle" for event in measured[1])
    assert log_dir is not None
    assert (Path(log_dir) / "ddg_timeline.png").read_bytes().startswith(b"\x89PNG")
    plain = Classifier("mlp")
    fit(plain, None, strategy=DDGStrategy(num_stages=2, balance="parameters"), max_epochs=2)
    assert all(torch.allclose(tensor, state[name], rtol=0, atol=1e-12) for name, tensor in state_of(plain).items())


def test_a_short_fit_is_measured_in_its_second_half(capsys: pytest.CaptureFixture[str]) -> None:
    strategy = DDGStrategy(num_stages=2, balance="parameters")
    _, monitor = fit(Classifier(), False, strategy=strategy, max_epochs=1, limit_train_batches=6)
    assert monitor is not None
    assert monitor.measured is not None
    check_order(monitor.measured.rows, first=3)
    assert len(monitor.measured.rows[0]) == 6
    assert "timeline drawn" not in capsys.readouterr().out


def test_a_fit_too_short_to_have_a_period_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    strategy = DDGStrategy(num_stages=2, balance="parameters")
    _, monitor = fit(Classifier(), tmp_path / "a.png", strategy=strategy, max_epochs=1, limit_train_batches=1)
    assert monitor is not None
    assert monitor.measured is None
    assert "DDGMonitor: fewer than 2 batches were recorded" in capsys.readouterr().out
    assert not (tmp_path / "a.png").exists()


class Fails(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 9:
            raise ArithmeticError("bang")
        return super().training_step(batch, batch_idx)


def test_a_fit_that_fails_is_let_go_and_the_next_one_is_measured() -> None:
    monitor = DDGMonitor(timeline=False)
    for model in (Fails(), Classifier()):
        trainer = quiet_trainer(
            callbacks=[monitor], strategy=DDGStrategy(num_stages=2, balance="parameters"), max_epochs=1
        )
        if isinstance(model, Fails):
            with pytest.raises(ArithmeticError, match="bang"):
                trainer.fit(model, loader("mlp", 200))
            assert monitor._undo is None
            assert monitor.measured is None
        else:
            trainer.fit(model, loader("mlp", 200))
    assert isinstance(monitor.measured, Measured)


@pytest.mark.parametrize("strategy", ["auto", DDGStrategy(num_stages=1)], ids=["auto", "one stage"])
def test_where_there_are_no_stages_it_says_so_and_stays_out_of_the_way(strategy: Any) -> None:
    with pytest.warns(UserWarning, match=r"DDGMonitor measures nothing here.*Use strategy='ddg' and 2 stages or more"):
        _, monitor = fit(Classifier(), False, strategy=strategy, max_epochs=1, limit_train_batches=2)
    assert monitor is not None
    assert monitor.measured is None


def test_a_picture_of_an_unknown_kind_is_refused_before_the_fit() -> None:
    with pytest.raises(ValueError, match=r"'timeline.jpg' is of no known kind"):
        DDGMonitor("timeline.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDGMonitor(Path("timeline.svg"))
