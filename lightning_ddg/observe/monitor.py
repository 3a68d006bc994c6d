"""DDGMonitor: a callback that measures what a fit does, logs it, and sets it beside the simulation.

It subscribes to what the strategy's observers are told while a fit trains; before and after that nothing of it runs.
What is measured in every batch is in :mod:`~lightning_ddg.observe.metrics`, the timeline in
:mod:`~lightning_ddg.observe.recording`; when either begins and ends, and what is logged and shown, is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from typing_extensions import override

from lightning_ddg.observe.gathering import Gathering, Window
from lightning_ddg.observe.metrics import Gauge, Reading
from lightning_ddg.observe.recording import Measured, Recorder, summarize
from lightning_ddg.planning.rebalance import idle_warning
from lightning_ddg.planning.report import print_table, summary_table
from lightning_ddg.planning.simulate import Event, Work
from lightning_ddg.planning.stages import work_of
from lightning_ddg.planning.tally import Tally
from lightning_ddg.planning.timeline import check_picture
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import Callback, LightningModule, Trainer
from lightning_ddg.plugin.strategy import DDGStrategy
from lightning_ddg.plugin.warn import warn_on_rank_zero

if TYPE_CHECKING:
    from lightning_ddg.plugin.assembly import Run

_FILE = "ddg_timeline.png"
# Even, so that the median is right too where long and short periods alternate. As many must be measured before the
# monitor warns of idle stages.
_PERIODS = 20


class DDGMonitor(Callback):
    """Measures how long stages wait and how old their gradients are, and compares the timeline with the simulated one.

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
    epoch begin and end. When the fit ends, rank 0 gathers them, prints the measured and the simulated period, and draws
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
        self._gauge: Gauge | None = None
        self._gathering: Gathering | None = None
        self._recorder: Recorder | None = None
        self._undo: Callable[[], None] | None = None
        self._first = 0
        self._warned = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what several processes cannot tell, nor stages that are trained like them.

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

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the fit before; say so if there is nothing to measure."""
        self._forget()
        if not isinstance(trainer.strategy, DDGStrategy) or trainer.strategy.num_stages == 1:
            warn_on_rank_zero(
                f"DDGMonitor measures nothing here, as {type(trainer.strategy).__name__} does not train in stages. Use"
                " strategy='ddg' and 2 stages or more, or leave the monitor out."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look on."""
        strategy, run = trainer.strategy, _run_of(trainer)
        # One pipeline is like the other, and rank 0 shows the figures of its own.
        if run is None or run.ranks.replicas.number:
            return
        self._gathering = Gathering(run.ranks)
        stages, device = run.execution.stages, strategy.root_device
        self._gauge = Gauge(run.observers, stages, strategy.optimizers, device, self.every_n_steps, self.cosine)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to record, once the pipeline is full or half of a short epoch has gone by."""
        run = _run_of(trainer)
        if self._gauge is None or run is None:
            return
        first = int(min(2 * run.site.delay(1) + 4, trainer.num_training_batches // 2))
        # In the synchronous finish stages wait for each other by design.
        pipelined = not run.finish.begun
        if not pipelined:
            self._stop()
        if self._recorder is None and batch_idx >= first and pipelined:
            self._first = first
            stage = run.execution.stages[0]
            lag = 0 if run.ranks.size == 1 else run.site.delay(stage)
            self._recorder = Recorder(stage, lag, trainer.strategy.root_device)
            self._recorder.batch = batch_idx
            self._undo = run.observers.subscribe(self._recorder)
        self._gauge.begin(compat.batch_number(trainer), batch_idx >= first and pipelined)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send or log what has become known; stop recording when it is enough, or the epoch ends."""
        if self._gauge is None:
            return
        if batch_idx == self._first + _PERIODS or trainer.is_last_batch:
            self._stop()
        self._deliver(trainer, self._gauge.end(compat.logger_step(trainer)))

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: what the validation takes is no time of training."""
        if self._gauge is not None:
            self._gauge.pause()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock: what lies between epochs is no time of training."""
        if self._gauge is not None:
            self._gauge.pause()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop in a fit that failed."""
        self._stop()
        if self._gauge is not None:
            self._gauge.detach()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather, print and draw on rank 0; every rank takes part. After it the ranks are no longer connected."""
        self._stop()
        run = _run_of(trainer)
        if self._gauge is None or self._gathering is None or run is None:
            return
        folder = trainer.log_dir
        self._gauge.detach()
        self._deliver(trainer, self._gauge.finish())
        rows = {} if self._recorder is None else {self._recorder.stage: self._recorder.events}
        for other in run.ranks.gather(rows):
            rows |= {stage: [Event(*event) for event in events] for stage, events in other.items()}
        if not run.ranks.is_rank_zero:
            return
        # Before its rows, every rank has sent its last figures.
        self._deliver(trainer, [])
        waits, totals = run.ranks.size > 1, self._gathering.totals
        for window in self._gathering.rest():
            _log(trainer, window, waits)
        self._warn_of_idleness(run, totals)
        self.figures = {stage: totals[stage].figures(waits) for stage in sorted(totals)}
        console = Console(soft_wrap=True)
        if rows:
            print_table(summary_table(totals, waits))
            unit = "batch" if run.site.micro_batches == 1 else "micro-batch"
            self.measured = summarize([rows[stage] for stage in sorted(rows)], _planned(run), unit, run.options.slack)
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
        run = _run_of(trainer)
        if self._gathering is None or run is None:
            return
        for window in self._gathering.add(readings):
            _log(trainer, window, run.ranks.size > 1)
            self._warn_of_idleness(run, self._gathering.totals)

    def _warn_of_idleness(self, run: Run, totals: Mapping[int, Tally]) -> None:
        """Warn once, when enough batches have been measured on all stages."""
        tallies = [totals[stage] for stage in sorted(totals)]
        known = len(tallies) == run.ranks.num_stages and min(tally.batches for tally in tallies) >= _PERIODS
        if self._warned or not known or run.ranks.size == 1:
            return
        warning = idle_warning(run.cut, tallies, run.options.max_memory)
        if warning is not None:
            self._warned = True
            warn_on_rank_zero(f"DDGMonitor: {warning}")

    def _stop(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None


def _log(trainer: Trainer, window: Window, waits: bool) -> None:
    metrics = {
        f"ddg/stage_{stage}/{name}": value
        for stage, reading in sorted(window.items())
        for name, value in reading.tally.figures(waits).items()
    }
    step = next(iter(window.values())).step
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(metrics, step=step)


def _planned(run: Run) -> Work | None:
    """Return how long the work of each row takes by what was measured when the network was cut, if it was."""
    model, starts = run.cut.costs.model, run.cut.starts
    if model is None:
        return None
    if run.ranks.size > 1:
        return work_of(model, starts)
    # Where one process trains all stages, it does what it would do for a single one, unless it has to keep them apart.
    all_stages = work_of(model, [] if run.options.staleness.stash else starts)
    return Work([sum(all_stages.forward)], [sum(all_stages.backward)], [], [])


def _run_of(trainer: Trainer) -> Run | None:
    return trainer.strategy.run if isinstance(trainer.strategy, DDGStrategy) else None
