"""The learning curves of a run are drawn here when its fit ends; what is drawn may be changed here."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure

Points = list[tuple[int, float]]  # steps of the optimizer done, and value

PANELS = {"loss": "loss", "acc": "accuracy", "perplexity": "perplexity"}  # the end of a metric's name, and its axis


class LearningCurves(Callback):
    """Draws ``curves.png`` beside the log of each CSVLogger: metrics that have a panel, against the optimizer's steps.

    Where nothing was logged to a file, as in a ``fast_dev_run``, nothing is drawn.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was logged."""
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, CSVLogger):
                logger.save()  # the last rows may not be in the file yet
                log = Path(logger.log_dir) / "metrics.csv"
                if log.exists():
                    draw(read_curves(log)).savefig(log.with_name("curves.png"), dpi=150)


def read_curves(log: Path) -> dict[str, Points]:
    """Read the metrics that have a panel from a CSV log.

    Where a metric was logged both at steps and at the end of epochs, its values at the end of epochs are taken.

    Args:
        log: What a CSVLogger wrote.

    Returns:
        The points of each metric, by its name without ``_epoch``.
    """
    curves: dict[str, Points] = {}
    with log.open(newline="") as file:
        for row in csv.DictReader(file):
            for column, value in row.items():
                name = column.removesuffix("_epoch")
                if value and name.endswith(tuple(PANELS)):
                    curves.setdefault(name, []).append((int(row["step"]) + 1, float(value)))
    return curves


def draw(curves: dict[str, Points]) -> Figure:
    """Draw a panel for each kind of metric that there is, and in it a line for each metric of that kind."""
    kinds = [kind for kind in PANELS if any(name.endswith(kind) for name in curves)]
    figure = Figure(figsize=(5 * max(1, len(kinds)), 3.5), layout="constrained")
    for index, kind in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), index + 1)
        for name, points in sorted(curves.items()):
            if name.endswith(kind):
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, marker="." if len(points) < 20 else None, label=name)
        axes.set(xlabel="step", ylabel=PANELS[kind])
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
