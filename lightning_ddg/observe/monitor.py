"""DDGMonitor: a callback that measures what a fit does, logs it, and sets it beside the prediction.

It looks on from outside: it stands between the strategy's execution and its callers while a fit trains, and before and
after that nothing of it runs. What is measured in every batch is in :mod:`~lightning_ddg.observe.metrics`; how it is
gathered,
logged and shown, and all that belongs to the timeline, is here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from math import ceil, inf, isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table

from lightning_ddg.core.execution import GRADIENT, Channel
from lightning_ddg.core.pipeline import Pipeline
from lightning_ddg.core.staged import Lockstep
from lightning_ddg.observe.metrics import FIGURES, Gauge, Reading, Tally, replaced
from lightning_ddg.planning.plan import work_of
from lightning_ddg.planning.rebalance import idle_warning
from lightning_ddg.planning.simulate import Event, Work, predict, simulate
from lightning_ddg.planning.timeline import Panel, check_picture, draw_timeline
from lightning_ddg.planning.units import show_ms
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.strategy import DDGStrategy

if TYPE_CHECKING:
    from lightning_ddg.comm.mailbox import GroupMailbox
    from lightning_ddg.core.delay_line import DelayLine

_FILE = "ddg_timeline.png"
# Even, so that the median is right too where long and short periods alternate. As many must be measured before the
# monitor warns of idle stages.
_PERIODS = 20
_SHOWN = 4  # periods in the picture


class DDGMonitor(Callback):
    """Measures how long stages wait and how old their gradients are, and compares the timeline with the prediction.

    Every ``every_n_steps`` batches all loggers get, of each stage k, as ``ddg/stage_k/...``:

    - ``waits_activations`` and ``waits_gradients``: the shares of the time that passed in waiting for the one and the
      other, in 0..1. The batches that fill the pipeline, the drain, validation, and what lies between epochs do not
      count. In one process nobody waits, and there are no such figures.
    - ``delay`` and ``delay_updates``: how old the applied gradients were, in batches and in updates of the stage's
      weights; the mean over the batches. With accumulation the latter is smaller.
    - ``staleness``: ``||w_t - w_{t-d}|| / ||w_t||``, how far the stage's trained weights have moved since the forward
      of the batch whose gradient is applied in the last of the batches.
    - ``cosine``, on request: between the gradient that the stage applies in the last of the batches and that batch's
      own, before any clipping. They are gradients of different batches, too: without any staleness it is not 1 either.

    A stage without a gradient to apply, while the pipeline fills, has no ``staleness`` and no ``cosine`` then. Figures
    of other processes come to rank 0 by themselves and nobody waits for them: a step's figures are logged when those of
    all stages have come, a few batches late perhaps, but with the step that they belong to. When the fit ends, rank 0
    prints the means of the whole fit. It warns, once, if a stage waits for more than a fifth of the time, and names a
    better cut.

    On every rank it also notes when the forwards, the backwards and the waits for messages of 21 batches of the first
    epoch begin and end. When the fit ends, rank 0 gathers them, prints the measured and the predicted period, and draws
    both timelines below each other, on one scale. What is blank in the measured one is neither a stage's forward or
    backward nor a wait: the optimizer, Lightning's loop, the data. The recording skips the batches that fill the
    pipeline, where the epoch is long enough.

    The timeline's times are those of the host's clock. On CUDA devices the host waits for the device before it looks at
    the clock, in the recorded batches alone; without that it would see launches instead of work. (The shares of waiting
    are measured by events on the device, for which the host need not wait.) Processes of one machine share the clock.
    Those of several do not: a rank's times are shifted only so far that no message arrives before it was sent, which
    leaves an error of up to the time a message takes.

    Args:
        timeline: Where to draw the timelines: a path that ends in ``.png`` or ``.svg``. ``True``:
            ``ddg_timeline.png`` in the trainer's ``log_dir``; ``False``: nowhere, only print the periods.
        every_n_steps: Batches between two figures.
        cosine: Whether to compare gradients; in one process only, where the batch's own gradient is known.

    Attributes:
        measured: On rank 0, when the fit has ended: the timeline that was measured. ``None`` elsewhere, and before.
        figures: On rank 0, when the fit has ended: the means of each stage over the whole fit, by the names above.

    Raises:
        ValueError: ``timeline`` is a path that ends otherwise, ``every_n_steps`` is no positive number, or a fit with
            ``cosine`` has several processes.
        ImportError: A timeline is wanted and matplotlib is not installed.
    """

    def __init__(self, timeline: bool | str | Path = True, every_n_steps: int = 50, cosine: bool = False) -> None:
        if timeline is not False:
            check_picture(_FILE if timeline is True else timeline)
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r}: give a number of batches, 1 or more.")
        self.timeline = timeline
        self.every_n_steps = every_n_steps
        self.cosine = cosine
        self._forget()

    def _forget(self) -> None:
        self.measured: Measured | None = None
        self.figures: dict[int, dict[str, float]] = {}
        self._recorder: _Recorder | None = None
        self._undo: Callable[[], None] | None = None
        self._gauge: Gauge | None = None
        self._first = 0
        self._windows: dict[int, dict[int, Reading]] = {}
        self._totals: dict[int, Tally] = {}
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what several processes cannot tell, nor stages that are trained like them.

        Raises:
            ValueError: ``cosine`` is wanted of a fit in several processes, or of today's weights in the backward.
        """
        strategy = trainer.strategy
        if stage != "fit" or not self.cosine or not isinstance(strategy, DDGStrategy):
            return
        if not strategy.staleness.stash:
            raise ValueError(
                "DDGMonitor(cosine=True) compares the gradient that a stage applies with the batch's own, of which"
                " there is none with Staleness(stash=False). Leave out one of the two."
            )
        if strategy.stage is not None:
            raise ValueError(
                f"DDGMonitor(cosine=True) compares the gradient that a stage applies with the batch's own, which"
                f" {strategy.num_stages} processes know only some batches later. Train in one process for it, with"
                f" Trainer(devices=1, strategy=DDGStrategy(num_stages={strategy.num_stages})), where the weights are"
                " the same, or leave `cosine` out."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the fit before; says so if there is nothing to measure."""
        self._forget()
        if not isinstance(trainer.strategy, DDGStrategy) or trainer.strategy.num_stages == 1:
            rank_zero_warn(
                f"DDGMonitor measures nothing here, as {type(trainer.strategy).__name__} does not train in stages. Use"
                " strategy='ddg' and 2 stages or more, or leave the monitor out."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to look on."""
        strategy = trainer.strategy
        if isinstance(strategy, DDGStrategy) and strategy._execution is not None:
            self._gauge = Gauge(
                strategy._execution,
                strategy._transport,
                strategy.optimizers,
                strategy.root_device,
                self.every_n_steps,
                self.cosine,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins to record, once the pipeline is full or half of a short epoch has gone by."""
        strategy = trainer.strategy
        if self._gauge is None or not isinstance(strategy, DDGStrategy) or strategy._execution is None:
            return
        first = int(min(2 * strategy.num_stages + 2, trainer.num_training_batches // 2))
        if self._recorder is None and batch_idx >= first:
            self._first = first
            self._recorder = _Recorder(strategy.stage or 1, strategy.delay or 0, strategy.root_device)
            self._undo = self._recorder.attach(strategy._execution, strategy._transport)
        if self._recorder is not None:
            self._recorder.batch = batch_idx
        self._gauge.begin(compat.batch_number(trainer), batch_idx >= first)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sends or logs what has become known; stops recording when it is enough, or the epoch ends."""
        if self._gauge is None:
            return
        if batch_idx == self._first + _PERIODS or trainer.is_last_batch:
            self._stop()
        self._deliver(trainer, self._gauge.end(compat.logger_step(trainer)))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the validation takes is no time of training."""
        if self._gauge is not None:
            self._gauge.pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What lies between epochs is no time of training."""
        if self._gauge is not None:
            self._gauge.pause()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stops in a fit that failed."""
        self._stop()
        if self._gauge is not None:
            self._gauge.detach()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers, prints and draws on rank 0; every rank takes part. After it the ranks are no longer connected."""
        self._stop()
        gauge, recorder, strategy = self._gauge, self._recorder, trainer.strategy
        if gauge is None or not isinstance(strategy, DDGStrategy):
            return
        folder = trainer.log_dir
        gauge.detach()
        self._deliver(trainer, gauge.finish())
        rows = {} if recorder is None else {recorder.stage: recorder.events}
        if strategy._ranks is not None:
            for other in strategy._ranks.gather(rows):
                rows |= {stage: [Event(*event) for event in events] for stage, events in other.items()}
        if not strategy.is_global_zero:
            return
        # Before its rows, every rank has sent its last figures.
        self._deliver(trainer, [])
        for batch in sorted(self._windows):
            self._log(trainer, self._windows.pop(batch))
        self._warn_of_idleness(strategy)
        waits = strategy._transport is not None
        self.figures = {stage: self._totals[stage].figures(waits) for stage in sorted(self._totals)}
        console = Console(soft_wrap=True)
        if rows:
            (console if console.is_terminal else Console(width=120)).print(summary_table(self._totals, waits))
            self.measured = summarize([rows[stage] for stage in sorted(rows)], _planned(strategy))
            self._show_timeline(console, Path(folder or trainer.default_root_dir))

    def _show_timeline(self, console: Console, folder: Path) -> None:
        if self.measured is None:
            console.print("DDGMonitor: fewer than 2 batches were recorded, so that there is no period to show.")
            return
        console.print(str(self.measured), markup=False, highlight=False)
        if self.timeline is not False:
            path = folder / _FILE if self.timeline is True else Path(self.timeline)
            self.measured.draw(path)
            console.print(f"DDGMonitor: timeline drawn in {path}", markup=False, highlight=False)

    def _deliver(self, trainer: Trainer, readings: list[Reading]) -> None:
        """Sends figures to rank 0; there, adds up its own and those that have come, and logs what is complete."""
        strategy = trainer.strategy
        assert isinstance(strategy, DDGStrategy)
        transport = strategy._transport
        if transport is not None and not strategy.is_global_zero:
            if readings:
                transport.send(0, FIGURES, [(*it[:3], *astuple(it.tally)) for it in readings])
            return
        for peer in () if transport is None else range(1, transport.size):
            while transport is not None and transport.has(peer, FIGURES):
                arrived = transport.take(peer, FIGURES)
                readings += [Reading(stage, batch, step, Tally(*sums)) for stage, batch, step, *sums in arrived]
        for reading in readings:
            self._totals[reading.stage] = self._totals.get(reading.stage, Tally()) + reading.tally
            if reading.step is None:
                continue
            window = self._windows.setdefault(reading.batch, {})
            window[reading.stage] = reading
            if len(window) == strategy.num_stages:
                self._log(trainer, self._windows.pop(reading.batch))
                self._warn_of_idleness(strategy)

    def _log(self, trainer: Trainer, window: Mapping[int, Reading]) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DDGStrategy)
        waits = strategy._transport is not None
        metrics = {
            f"ddg/stage_{stage}/{name}": value
            for stage, reading in sorted(window.items())
            for name, value in reading.tally.figures(waits).items()
        }
        step = next(iter(window.values())).step
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=step)

    def _warn_of_idleness(self, strategy: DDGStrategy) -> None:
        """Warns once, when enough batches have been measured on all stages."""
        tallies = [self._totals[stage] for stage in sorted(self._totals)]
        cut = strategy._cut
        known = len(tallies) == strategy.num_stages and min(tally.batches for tally in tallies) >= _PERIODS
        if self._warned or not known or cut is None or strategy._transport is None:
            return
        warning = idle_warning(cut, tallies, strategy._max_memory)
        if warning is not None:
            self._warned = True
            rank_zero_warn(f"DDGMonitor: {warning}")

    def _stop(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None


def summary_table(totals: Mapping[int, Tally], waits: bool) -> Table:
    """The means over a fit, a row for each stage.

    Args:
        totals: What was measured, by stage.
        waits: Whether the stages are in several processes.
    """
    timed = [tally for tally in totals.values() if tally.batches]
    period = f", {show_ms(max(tally.seconds / tally.batches for tally in timed))} per batch" if timed else ""
    table = Table(title=f"DDGMonitor: {len(totals)} stages{period}")
    table.add_column("stage", justify="right")
    columns = {
        "waits_activations": ("waits for\nactivations", "{:.1%}"),
        "waits_gradients": ("waits for\ngradients", "{:.1%}"),
        "delay": ("delay in\nbatches", "{:.3g}"),
        "delay_updates": ("delay in\nupdates", "{:.3g}"),
        "staleness": ("staleness\n‖w(t) − w(t−d)‖ / ‖w(t)‖", "{:.2g}"),
        "cosine": ("cosine of applied\nand own gradient", "{:.3f}"),
    }
    rows = {stage: tally.figures(waits) for stage, tally in sorted(totals.items())}
    shown = [name for name in columns if any(name in row for row in rows.values())]
    for name in shown:
        table.add_column(columns[name][0], justify="right", no_wrap=True)
    for stage, row in rows.items():
        table.add_row(str(stage), *(columns[name][1].format(row[name]) if name in row else "-" for name in shown))
    return table


@dataclass(frozen=True)
class Measured:
    """Some steady batches of a fit.

    Attributes:
        rows: The events of each stage, on one clock; one row for all stages where one process trains them.
        period: Seconds from one batch to the next, the median.
        work: The median seconds of each row's forward and backward; messages take none.
        planned: What was measured, layer by layer, when the network was cut; ``None`` if it was not.
    """

    rows: list[list[Event]]
    period: float
    work: Work
    planned: Work | None

    def __str__(self) -> str:
        lines = [f"DDGMonitor: measured {self.period * 1e3:.2f} ms per batch"]
        sources = {"the layers, measured before the fit": self.planned, "this fit's forwards and backwards": self.work}
        for source, work in sources.items():
            if work is not None:
                got = predict(*work)
                lines.append(
                    f"predicted {got.period * 1e3:.2f} ms ({got.period / self.period - 1:+.1%}) from {source}, limited"
                    f" by {got.reason}"
                )
        return "; ".join(lines)

    def draw(self, path: str | Path) -> None:
        """Draws some typical batches of the measured timeline above the predicted one, from the same batch on.

        Raises:
            ValueError: ``path`` ends neither in ``.png`` nor in ``.svg``.
            ImportError: matplotlib is not installed.
        """
        num_rows = len(self.rows)
        work, source = self.work, "this fit's forwards and backwards"
        if self.planned is not None:
            work, source = self.planned, "the layers, measured before the fit"
        prediction = predict(*work)
        measured = [event for row in self.rows for event in row]
        first = self._typical_batch()
        shown = _SHOWN * max(self.period, prediction.period)
        on_paper = simulate(*work, first + num_rows + ceil(shown / prediction.period) + 1)
        panels = [
            Panel(
                "measured (blank: the optimizer, Lightning's loop, the data)",
                _from(measured, first),
                num_rows,
                self.period,
            ),
            Panel(f"predicted from {source}", _from(on_paper, first), num_rows, prediction.period),
        ]
        draw_timeline(panels, path, span=(0.0, shown))

    def _typical_batch(self) -> int:
        """The batch that begins those, as many as the picture shows, whose mean period is nearest to the median."""
        begins = {event.batch: event.start for event in self.rows[-1] if event.kind == "F"}
        recorded = [event.batch for event in self.rows[0] if event.kind == "F"]
        whole = [batch for batch in recorded if batch in begins and batch + _SHOWN in begins]
        if not whole:
            return recorded[0]
        return min(whole, key=lambda at: abs(begins[at + _SHOWN] - begins[at] - _SHOWN * self.period))


def summarize(rows: Sequence[Sequence[Event]], planned: Work | None = None) -> Measured | None:
    """What the recorded events say, or ``None`` if they are too few to say anything.

    Args:
        rows: The events of each stage, each on its own rank's clock.
        planned: What was measured when the network was cut.
    """
    forward, backward = ([_durations(row, kind) for row in rows] for kind in ("F", "B"))
    begins = [event.start for event in rows[-1] if event.kind == "F"]
    if len(begins) < 2 or not all(forward) or not all(backward):
        return None
    period = median(after - before for before, after in pairwise(begins))
    links = [0.0] * (len(rows) - 1)
    work = Work([median(row) for row in forward], [median(row) for row in backward], links, links)
    return Measured(aligned(rows), period, work, planned)


def aligned(rows: Sequence[Sequence[Event]]) -> list[list[Event]]:
    """Moves each stage's events in time, so that no message arrives before it was sent; where none does, not at all.

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


def _planned(strategy: DDGStrategy) -> Work | None:
    """How long the work of each row takes by what was measured when the network was cut, if it was."""
    cut = strategy._cut
    if cut is None or cut.measured is None:
        return None
    if strategy.stage is not None:
        return work_of(cut.measured.profile, cut.starts, cut.measured.seconds_per_byte)
    # Where one process trains all stages, it does what it would do for a single one, unless it has to keep them apart.
    all_stages = work_of(cut.measured.profile, [] if strategy.staleness.stash else cut.starts)
    return Work([sum(all_stages.forward)], [sum(all_stages.backward)], [], [])


def _durations(row: Sequence[Event], kind: str) -> list[float]:
    return [event.end - event.start for event in row if event.kind == kind]


def _from(events: Sequence[Event], batch: int) -> list[Event]:
    """The events, in time counted from the beginning of a batch's forward on the first stage."""
    begin = next(event.start for event in events if event[:3] == (1, "F", batch))
    return [event._replace(start=event.start - begin, end=event.end - begin) for event in events]


class _Recorder:
    """Notes what one rank does.

    Args:
        stage: The rank's stage; 1 if it runs all stages.
        delay: Batches between a forward and its backward.
        device: Where the rank computes.
    """

    def __init__(self, stage: int, delay: int, device: torch.device) -> None:
        self.stage = stage
        self.batch = 0
        self.events: list[Event] = []
        self._delay = delay
        self._device = device

    def attach(self, execution: Pipeline | DelayLine | Lockstep, transport: GroupMailbox | None) -> Callable[[], None]:
        """Stands between an execution and its callers; returns the function that steps aside again."""
        run_backward = execution.backward

        def backward(run: Callable[[], object]) -> None:
            run_backward(self._timed(run, "B"))

        if isinstance(execution, Lockstep):
            backward = self._timed(run_backward, "B")
        undo = [replaced(execution, "backward", backward)]
        if isinstance(execution, Pipeline):
            stage = execution.stage
            undo.append(replaced(stage, "forward", self._timed(stage.forward, "F")))
            undo.append(replaced(stage, "backward", self._timed(stage.backward, "B")))
        else:
            undo.append(replaced(execution, "train", self._timed(execution.train, "F")))
        if transport is not None:
            undo.append(replaced(transport, "take", self._waiting(transport.take)))

        def detach() -> None:
            for function in reversed(undo):
                function()

        return detach

    def _timed(self, function: Callable[..., Any], kind: Literal["F", "B"]) -> Callable[..., Any]:
        lag = self._delay if kind == "B" else 0

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            value = function(*args, **kwargs)
            self.events.append(Event(self.stage, kind, self.batch - lag, start, self._now()))
            return value

        return timed

    def _waiting(self, take: Callable[[int, Channel], Any]) -> Callable[[int, Channel], Any]:
        def timed(peer: int, channel: Channel) -> Any:
            start = self._now()
            value = take(peer, channel)
            batch = self.batch - self._delay if channel is GRADIENT else self.batch
            self.events.append(Event(self.stage, "idle", batch, start, self._now()))
            return value

        return timed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        # Unlike `time.time`, one clock for all processes of a machine that nobody sets.
        return time.perf_counter()
