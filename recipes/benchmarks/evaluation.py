"""The speed of `trainer.validate` in K processes, with whole batches and in micro-batches, beside one process.

    python -m recipes.benchmarks.evaluation --stages 2 4 8

On emulated devices, each with a stage of ``--forward-ms``, and for works of ``works.py`` in ``--processes``. All take
turns in each round, so that ratios are taken within one. Timed are all batches but the first, also those that go both
ways, in micro-batches and as a whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from lightning_ddg import DDGStrategy
from recipes.benchmarks import machine
from recipes.benchmarks.contenders import Again, Laps, Outcome
from recipes.benchmarks.devices import Times, emulated
from recipes.benchmarks.rounds import LIMIT_S
from recipes.benchmarks.workers import Crew
from recipes.benchmarks.works import WORKS, Batch, Training, Work, measure_cuts

#: Of a batch on an emulated device: how many a stage may take, as many as there are samples.
FORWARD_MS = 20.0


class Validated(Training):
    """An ordinary LightningModule that evaluates a work's network."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val_loss", self.work_loss(self.network(inputs), targets))


@dataclass(frozen=True)
class Task:
    """What is evaluated, by whom.

    Attributes:
        work: The network and its batch.
        points: Where it is cut.
        parts: ``eval_micro_batches``; 0 for one process without stages.
        batches: That are timed, after the first.
    """

    work: Work
    points: Sequence[str]
    parts: int
    batches: int


class _Note(Callback):
    def __init__(self, laps: Laps) -> None:
        self.laps = laps

    def on_validation_batch_end(self, *args: object, **kwargs: object) -> None:
        self.laps.note()


def validate(task: Task) -> Outcome | None:
    """Validate in this process; all of the crew call it at the same time."""
    dist.barrier()
    size = dist.get_world_size() if task.parts else 1
    if dist.get_rank() >= size:
        return None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, batch = Validated(task.work), task.work.batch()
    laps = Laps(1, task.batches, 0, torch.device("cpu"))
    strategy: Any = DDGStrategy(size, list(task.points), eval_micro_batches=task.parts) if task.parts else "auto"
    trainer = Trainer(
        accelerator="cpu",
        devices=size,
        strategy=strategy,
        callbacks=[_Note(laps)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(module, DataLoader(Again(batch, laps.total), batch_size=None), verbose=False)
    return laps.outcome({})


def compared(crew: Crew, tasks: Sequence[Task], rounds: int) -> Iterator[tuple[float, float, float]]:
    """Let tasks take turns, the first the one that others are compared with.

    Yields:
        For each task the median of its seconds a batch, of how many times as fast as the first it is, and of the
        processor seconds of all processes a batch.
    """
    found: list[list[tuple[float, float]]] = [[] for _ in tasks]
    for _ in range(rounds):
        for task, figures in zip(tasks, found, strict=True):
            took_part = [outcome for outcome in crew.ask(LIMIT_S, validate, task) if outcome is not None]
            figures.append((took_part[0].period_s, sum(outcome.cpu_s for outcome in took_part)))
    for figures in found:
        ratios = [alone / period for (alone, _), (period, _) in zip(found[0], figures, strict=True)]
        yield median(period for period, _ in figures), median(ratios), median(cpu for _, cpu in figures)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run the rounds, print the table."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.evaluation", description=__doc__)
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 4, 8], help="numbers of emulated devices")
    parser.add_argument("--works", nargs="*", choices=list(WORKS), default=["resnet56"])
    parser.add_argument("--processes", type=int, default=2, help="that evaluate a work")
    parser.add_argument("--parts", type=int, nargs="+", help="micro-batches of a batch; K, 2 K and 4 K if left out")
    parser.add_argument("--forward-ms", type=float, default=FORWARD_MS, help="of a whole batch on an emulated device")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=40, help="timed in each round")
    options = parser.parse_args(arguments)
    table = Table(box=SIMPLE, title="trainer.validate", title_justify="left")
    for column in ("what", "processes", "micro-batches", "ms a batch", "x one process", "CPU ms"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def add(name: str, crew: Crew, work: Work, points: Sequence[str], batches: int) -> None:
        counts = options.parts or [crew.size, 2 * crew.size, 4 * crew.size]
        tasks = [Task(work, points, parts, batches) for parts in (0, 1, *counts)]
        rows = compared(crew, tasks, options.rounds)
        for task, (period, ratio, cpu) in zip(tasks, rows, strict=True):
            parts = {0: "", 1: "whole"}.get(task.parts, str(task.parts))
            size = str(crew.size if task.parts else 1)
            table.add_row(name, size, parts, f"{1000 * period:.1f}", f"{ratio:.2f}", f"{1000 * cpu:.1f}")

    for stages in options.stages:
        with Crew(stages) as crew:
            points = [f"network.{layer}" for layer in range(1, stages)]
            work = emulated(stages, Times(options.forward_ms, 0.0, 0.0), 1)
            add(work.name, crew, work, points, options.batches)
    for name in options.works:
        with Crew(options.processes) as crew:
            cuts = crew.ask(LIMIT_S, measure_cuts, WORKS[name], [crew.size], 3)[0]["cuts"]
            add(WORKS[name].name, crew, WORKS[name], cuts[crew.size], max(1, options.batches // 4))
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    where = "CPU {cpu}, {cores} cores, load {load:.1f}; Python {python}, torch {torch}, lightning {lightning}; {date}"
    console.print(where.format(**machine.describe("cpu")), highlight=False)


if __name__ == "__main__":
    main()
