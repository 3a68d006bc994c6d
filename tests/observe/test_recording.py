"""Tests of ``recording.py``: what is noted while stages are trained, and what is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_ddg.core.delay_line import DelayLine
from lightning_ddg.core.execution import ACTIVATION, GRADIENT, Observers
from lightning_ddg.core.rng import Batch
from lightning_ddg.observe.recording import Recorder, aligned, summarize
from lightning_ddg.planning.simulate import Event, Work, simulate, steady_state
from lightning_ddg.planning.units import show_ms

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


def test_with_slack_the_simulation_has_it_too() -> None:
    measured = summarize(rows_of(WORK, 30), slack=2)
    assert measured is not None
    assert measured.work.slack == 2


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


# ---- recording


def test_forwards_and_backwards_of_one_process_are_noted_until_nobody_looks_on() -> None:
    observers, recorder = Observers(), Recorder(1, 0, torch.device("cpu"))
    line = DelayLine([nn.Linear(1, 1), nn.Linear(1, 1)], observers=observers)
    end = observers.subscribe(recorder)
    for batch in range(3):
        output = line.train(Batch(batch), (torch.ones(1, 1),), {})
        line.backward(output.sum().backward)
        if batch == 1:
            end()
    assert [event[:3] for event in recorder.events] == [(1, "F", 0), (1, "B", 0), (1, "F", 1), (1, "B", 1)]
    assert all(event.start <= event.end for event in recorder.events)


def test_a_wait_within_a_forward_is_noted_and_a_backward_belongs_to_the_batch_that_is_due() -> None:
    observers, recorder = Observers(), Recorder(2, 1, torch.device("cpu"))
    observers.subscribe(recorder)
    recorder.batch = 5
    observers.before_forward(2)
    observers.before_take(3, ACTIVATION)
    observers.after_take(3, ACTIVATION)
    observers.after_forward(2)
    observers.before_take(1, GRADIENT)
    observers.after_take(1, GRADIENT)
    observers.before_backward(2)
    observers.after_backward(2)
    idle, forward, late, backward = recorder.events
    assert [event[:3] for event in (idle, forward, late, backward)] == [
        (2, "idle", 5), (2, "F", 5), (2, "idle", 4), (2, "B", 4),
    ]  # fmt: skip
    assert forward.start <= idle.start <= idle.end <= forward.end
