"""The timeline of a fit: what a rank notes of some batches, and what the notes of all ranks say together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf, isfinite
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from lightning_ddg.core.execution import ACTIVATION, GRADIENT, Channel, InFlight, Observer
from lightning_ddg.core.schedule import delay
from lightning_ddg.planning.simulate import Event, Work, simulate, steady_state
from lightning_ddg.planning.timeline import Panel, draw_timeline

_SHOWN = 4  # periods in the picture


class Recorder(Observer):
    """Notes when the forwards, the backwards and the waits of one rank begin and end.

    Attributes:
        stage: The rank's stage; 1 if it has all of them.
        batch: Number of the current batch in its epoch, or of the micro-batch, counted from the first that is noted.
        events: What has been noted.
    """

    def __init__(self, stage: int, delay: int, device: torch.device) -> None:
        self.stage = stage
        self.batch = 0
        self.events: list[Event] = []
        self._delay = delay
        self._device = device
        # Of what goes on now: a message may be waited for within a forward.
        self._starts: list[float] = []
        # Backwards since the last forward.
        self._over = 0

    def in_flight(self, stage: int, batches: InFlight) -> None:
        self._over += stage == self.stage

    def before_forward(self, stage: int) -> None:
        self._go_on()
        self._starts.append(self._now())

    def after_forward(self, stage: int) -> None:
        self._note(stage, "F", self.batch)

    def before_backward(self, stage: int) -> None:
        self._starts.append(self._now())

    def after_backward(self, stage: int) -> None:
        self._note(stage, "B", self.batch - self._delay)

    def before_take(self, source: int, channel: Channel) -> None:
        if channel == ACTIVATION:
            self._go_on()
        self._starts.append(self._now())

    def after_take(self, source: int, channel: Channel) -> None:
        self._note(self.stage, "idle", self.batch - self._delay * (channel == GRADIENT))

    def _go_on(self) -> None:
        self.batch, self._over = self.batch + self._over, 0

    def _note(self, stage: int, kind: Literal["F", "B", "idle"], batch: int) -> None:
        self.events.append(Event(stage, kind, batch, self._starts.pop(), self._now()))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        # Unlike `time.time`, one clock for all processes of a machine that nobody sets.
        return time.perf_counter()


@dataclass(frozen=True)
class Measured:
    """Some steady batches of a fit.

    Attributes:
        rows: The events of each stage, on one clock; one row for all stages where one process trains them.
        period: Seconds from one batch to the next, the median.
        work: The median seconds of each row's forward and backward; messages take none.
        planned: What was measured, layer by layer, when the network was cut; ``None`` if it was not.
        unit: What all of that is of: a batch, or a micro-batch.
    """

    rows: list[list[Event]]
    period: float
    work: Work
    planned: Work | None
    unit: str = "batch"

    def __str__(self) -> str:
        lines = [f"DDGMonitor: measured {self.period * 1e3:.2f} ms per {self.unit}"]
        sources = {"the layers, measured before the fit": self.planned, "this fit's forwards and backwards": self.work}
        for source, work in sources.items():
            if work is not None:
                got = steady_state(work)
                lines.append(
                    f"simulated {got.period * 1e3:.2f} ms ({got.period / self.period - 1:+.1%}) from {source}, limited"
                    f" by {got.reason}"
                )
        return "; ".join(lines)

    def draw(self, path: str | Path) -> None:
        """Draw some typical batches of the measured timeline above the simulated one, from the same batch on.

        Raises:
            ValueError: ``path`` ends neither in ``.png`` nor in ``.svg``.
            ImportError: matplotlib is not installed.
        """
        num_rows = len(self.rows)
        work, source = self.work, "this fit's forwards and backwards"
        if self.planned is not None:
            work, source = self.planned, "the layers, measured before the fit"
        settled = steady_state(work)
        measured = [event for row in self.rows for event in row]
        first = self._typical_batch()
        shown = _SHOWN * max(self.period, settled.period)
        # The first stage is ahead of the last.
        ahead = delay(1, num_rows, work.slack) + num_rows
        on_paper = simulate(work, first + ahead + ceil(shown / settled.period) + 1)
        title = "measured (blank: the optimizer, Lightning's loop, the data)"
        panels = [
            Panel(title, _from(measured, first), num_rows, self.period),
            Panel(f"simulated from {source}", _from(on_paper, first), num_rows, settled.period),
        ]
        draw_timeline(panels, path, span=(0.0, shown))

    def _typical_batch(self) -> int:
        """Return the first of those batches, as many as are shown, whose mean period is nearest to the median."""
        begins = {event.batch: event.start for event in self.rows[-1] if event.kind == "F"}
        recorded = [event.batch for event in self.rows[0] if event.kind == "F"]
        whole = [batch for batch in recorded if batch in begins and batch + _SHOWN in begins]
        if not whole:
            return recorded[0]
        return min(whole, key=lambda at: abs(begins[at + _SHOWN] - begins[at] - _SHOWN * self.period))


def summarize(
    rows: Sequence[Sequence[Event]], planned: Work | None = None, unit: str = "batch", slack: int = 0
) -> Measured | None:
    """Return what the events of each stage, on its own rank's clock, say; ``None`` if they are too few."""
    forward, backward = ([_durations(row, kind) for row in rows] for kind in ("F", "B"))
    begins = [event.start for event in rows[-1] if event.kind == "F"]
    if len(begins) < 2 or not all(forward) or not all(backward):
        return None
    period = median(after - before for before, after in pairwise(begins))
    links = [0.0] * (len(rows) - 1)
    work = Work([median(row) for row in forward], [median(row) for row in backward], links, links, slack=slack)
    return Measured(aligned(rows), period, work, planned, unit)


def aligned(rows: Sequence[Sequence[Event]]) -> list[list[Event]]:
    """Move each stage's events in time, so that no message arrives before it was sent; where none does, not at all.

    Between neighbours, activations bound the difference of the clocks on one side and gradients on the other. A clock
    outside the bounds is put in their middle, as in the Network Time Protocol (RFC 5905, section 8).
    """
    result = [list(rows[0])]
    for row in rows[1:]:
        above = {(event.kind, event.batch): event for event in result[-1]}
        here = {(event.kind, event.batch): event for event in row}
        both = above.keys() & here.keys()
        earliest = max((above[at].end - here[at].start for at in both if at[0] == "F"), default=-inf)
        latest = min((above[at].start - here[at].end for at in both if at[0] == "B"), default=inf)
        shift = 0.0 if earliest <= 0.0 <= latest else (earliest + latest) / 2
        if not isfinite(shift):
            shift = earliest if isfinite(earliest) else latest
        result.append([event._replace(start=event.start + shift, end=event.end + shift) for event in row])
    return result


def _durations(row: Sequence[Event], kind: str) -> list[float]:
    return [event.end - event.start for event in row if event.kind == kind]


def _from(events: Sequence[Event], batch: int) -> list[Event]:
    """Return the events, in time counted from the beginning of a batch's forward on the first stage."""
    begin = next(event.start for event in events if event[:3] == (1, "F", batch))
    return [event._replace(start=event.start - begin, end=event.end - begin) for event in events]
