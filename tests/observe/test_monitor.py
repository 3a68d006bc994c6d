"""Tests of ``monitor.py``: what is recorded of real fits, and what is made of it.

How long anything takes is nowhere asserted: only what came before what, which holds on any machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_ddg import DDGMonitor, DDGStrategy, Staleness
from lightning_ddg.observe.monitor import Measured, aligned, summarize
from lightning_ddg.planning.simulate import Event, Work, simulate, steady_state
from lightning_ddg.planning.units import show_ms
from tests.harness import run_ranks
from tests.networks import Classifier, ManualClassifier, loader, quiet_trainer, state_of

WORK = Work([0.010, 0.012, 0.008], [0.020, 0.021, 0.019], [0.001, 0.002], [0.001, 0.003])


def rows_of(work: Work, batches: int, shifts: Sequence[float] = (0.0, 0.0, 0.0)) -> list[list[Event]]:
    """The simulation's steady part, stage by stage, each stage on a clock of its own."""
    events = [event for event in simulate(work, batches) if 6 <= event.batch < batches - 3]
    return [
        [e._replace(start=e.start + shift, end=e.end + shift) for e in events if e.stage == stage]
        for stage, shift in enumerate(shifts, start=1)
    ]


def test_clocks_that_contradict_no_message_are_left_alone() -> None:
    rows = rows_of(WORK, 20)
    assert aligned(rows) == rows


def room(above: list[Event], below: list[Event]) -> float:
    """How far the clocks of two stages can be moved against each other before a message arrives too early."""
    at = {(event.kind, event.batch): event for event in below}
    pairs = [(event, at[event.kind, event.batch]) for event in above if (event.kind, event.batch) in at]
    return min(b.start - a.end for a, b in pairs if a.kind == "F") + min(
        a.start - b.end for a, b in pairs if a.kind == "B"
    )


@pytest.mark.parametrize("shifts", [(0.0, 5.0, -7.0), (0.0, -0.5, 0.5)])
def test_clocks_are_aligned_as_well_as_the_messages_tell(shifts: tuple[float, ...]) -> None:
    wanted, got = rows_of(WORK, 20), aligned(rows_of(WORK, 20, shifts))
    error = 0.0
    for above, below in ((0, 1), (1, 2)):
        error += room(wanted[above], wanted[below]) / 2
        assert error < 0.02
        assert abs(got[below][0].start - wanted[below][0].start) <= error + 1e-9
        assert room(got[above], got[below]) == pytest.approx(room(wanted[above], wanted[below]))


def test_clocks_without_a_gradient_between_them_are_aligned_by_activations() -> None:
    rows = [[Event(1, "F", 0, 10.0, 11.0)], [Event(2, "F", 0, 3.0, 4.0)]]
    assert aligned(rows)[1] == [Event(2, "F", 0, 11.0, 12.0)]
    rows = [[Event(1, "B", 0, 10.0, 11.0)], [Event(2, "B", 0, 13.0, 14.0)]]
    assert aligned(rows)[1] == [Event(2, "B", 0, 9.0, 10.0)]


def test_what_the_events_say() -> None:
    # Binary fractions, so that nothing is rounded.
    exact = Work([0.25, 0.125, 0.25], [0.5, 0.75, 0.5], [0.0, 0.0], [0.0, 0.0])
    measured = summarize(rows_of(exact, 30), planned=exact._replace(backward=[0.5, 0.625, 0.5]))
    assert measured is not None
    assert measured.period == 0.875
    assert measured.work == exact
    assert str(measured) == (
        "DDGMonitor: measured 875.00 ms per batch;"
        " simulated 750.00 ms (-14.3%) from the layers, measured before the fit, limited by stage 1;"
        " simulated 875.00 ms (+0.0%) from this fit's forwards and backwards, limited by stage 2"
    )


@pytest.mark.parametrize("batches", [0, 1])
def test_too_few_events_say_nothing(batches: int) -> None:
    row = [Event(1, kind, batch, 0.0, 1.0) for batch in range(batches) for kind in ("F", "B")]
    assert summarize([row]) is None
    assert summarize([[Event(1, "F", batch, 0.0, 1.0) for batch in range(4)]]) is None


@pytest.mark.parametrize("planned", [None, WORK])
def test_both_timelines_begin_with_the_same_batch(planned: Work | None, tmp_path: Path) -> None:
    measured = summarize(rows_of(WORK, 30), planned)
    assert measured is not None
    measured.draw(tmp_path / "timeline.svg")
    text = (tmp_path / "timeline.svg").read_text()
    assert "measured (blank: the optimizer" in text
    source = "this fit's forwards and backwards" if planned is None else "the layers, measured before the fit"
    assert f"simulated from {source}".replace("'", "&#x27;") in text or f"simulated from {source}" in text
    assert text.count(f"period {show_ms(steady_state(WORK).period)}") >= (2 if planned else 1)


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


@pytest.mark.parametrize("rule", [Staleness(), Staleness(stash=False)], ids=["no effect", "features replay"])
def test_one_process_is_expected_to_do_forwards_again_where_it_does(rule: Staleness) -> None:
    strategy = DDGStrategy(num_stages=3, recompute=True, staleness=rule)
    _, monitor = fit(Classifier(), False, strategy=strategy, max_epochs=1)
    assert monitor is not None
    assert monitor.measured is not None
    planned, cut = monitor.measured.planned, strategy._cut
    assert planned is not None
    assert cut is not None
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
        parts = [strategy._execution, getattr(strategy._execution, "stage", None)]
        if any({"train", "forward"} & set(vars(part)) for part in parts if part is not None):
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
