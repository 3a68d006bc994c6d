"""The speed of the schedule, measured on emulated devices; change here what is compared, how it is timed and reported.

    python -m recipes.benchmarks.schedule --json schedule.json

Each stage is a layer that sleeps in its forward and in its backward, so K stages on K processes behave like K equal
devices even on two cores, and what is left is what the schedule makes them wait. `README.md` beside this file says how
to read the result.

Per K one set of K worker processes is started; they run every contender in every round, so that a disturbance of the
machine falls on all contenders alike and the slow imports are paid once, before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddg import DDGStrategy

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 8  # features of every layer: next to nothing to compute or to send, so that only the schedule is timed
COLUMNS = ("K", "schedule", "theory", "measured", "min-max", "over F+B", "speed / backprop", "speed / ddg")
LABELS = {
    "ideal": "ideal: F+B",
    "backprop": "backprop: (F+B)K",
    "paper": "paper: FK+B",
    "ddg": "ddg",
    "gpipe": "torch GPipe",
    "1f1b": "torch 1F1B",
}


# What is compared


@dataclass(frozen=True)
class Settings:
    """One launch: K stages, and how long every contender runs on them.

    Args:
        stages: K, at least 2, one process each.
        batches: batches per contender and round; must leave at least two ends of batches to time.
        rounds: how often every contender is measured, in turn.
        forward_ms: milliseconds that the forward of a whole batch takes on one stage (F).
        backward_ms: milliseconds that its backward takes (B).
        microbatches: the micro-batch counts to try in torch's schedules, each at least 1.

    Raises:
        ValueError: if a value cannot be measured; names it and the remedy.
    """

    stages: int
    batches: int
    rounds: int
    forward_ms: float
    backward_ms: float
    microbatches: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(f"--stages {self.stages}: there is no schedule on one stage; give 2 or more.")
        if self.rounds < 1:
            raise ValueError(f"--rounds {self.rounds}: nothing would be measured; give 1 or more.")
        if self.forward_ms <= 0 or self.backward_ms <= 0:
            raise ValueError(
                f"--forward-ms {self.forward_ms:g} --backward-ms {self.backward_ms:g}: both must be above 0."
            )
        if min(self.microbatches) < 1:
            raise ValueError(f"--microbatches {min(self.microbatches)}: a batch has 1 micro-batch or more.")
        if max(self.microbatches) < self.stages:
            raise ValueError(
                f"--microbatches {max(self.microbatches)}: torch's Schedule1F1B needs at least as many micro-batches "
                f"as stages; add {self.stages}, or leave out --stages {self.stages}."
            )
        if self.batches < 2 * self.stages + 3:
            raise ValueError(
                f"--batches {self.batches}: the first 2K = {2 * self.stages} and the last are not timed, and a period "
                f"takes two of the others; give {2 * self.stages + 3} or more."
            )

    @property
    def batch_size(self) -> int:
        """Samples per batch: the fewest that every count of micro-batches divides."""
        return math.lcm(*self.microbatches)


@dataclass(frozen=True)
class Contender:
    """One schedule: "ddg" (one micro-batch: the whole batch), "gpipe" or "1f1b"."""

    schedule: str
    microbatches: int = 1

    def expected_ms(self, settings: Settings) -> float:
        """Its period per batch in milliseconds if nothing but the stages' sleeping took time."""
        both = settings.forward_ms + settings.backward_ms
        if self.schedule == "ddg":
            return both
        # Both flush after every batch: K - 1 micro-batches' worth of filling and emptying comes on top of m.
        return both * (self.microbatches + settings.stages - 1) / self.microbatches


def contenders(settings: Settings) -> list[Contender]:
    """Lists what is measured, in the order of a round; torch's 1F1B refuses fewer micro-batches than stages."""
    counts = settings.microbatches
    return [
        Contender("ddg"),
        *(Contender("gpipe", m) for m in counts),
        *(Contender("1f1b", m) for m in counts if m >= settings.stages),
    ]


def references_ms(settings: Settings) -> dict[str, float]:
    """Gives the periods per batch in milliseconds that need no measurement.

    Returns:
        "ideal": no stage ever waits; "backprop": one stage works at a time; "paper": every forward waits for the one
        before it, the backwards run side by side.
    """
    forward, backward, stages = settings.forward_ms, settings.backward_ms, settings.stages
    return {
        "ideal": forward + backward,
        "backprop": (forward + backward) * stages,
        "paper": forward * stages + backward,
    }


# The emulated device


class _Sleep(torch.autograd.Function):
    """The identity, which takes `forward_s` seconds forward and `backward_s` backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return gradient, None, None


class SleepingLayer(nn.Module):
    """A layer on an emulated device, whose time is proportional to the samples it is given.

    Args:
        settings: the sleeping of a whole batch; a micro-batch of 1/m of its samples sleeps 1/m of it.

    Shape: (samples, WIDTH) to (samples, WIDTH).
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.forward_s = settings.forward_ms / 1000 / settings.batch_size
        self.backward_s = settings.backward_ms / 1000 / settings.batch_size

    def forward(self, x: Tensor) -> Tensor:
        slept: Tensor = _Sleep.apply(self.linear(x), len(x) * self.forward_s, len(x) * self.backward_s)
        return slept


# The contenders, in a worker process


class SleepingModule(LightningModule):
    """An ordinary LightningModule over K sleeping layers."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.net = nn.Sequential(*(SleepingLayer(settings) for _ in range(settings.stages)))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return mse_loss(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class BatchEnds(Callback):
    """Notes the time at which each training batch ends, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
        self.times.append(time.perf_counter())


def run_ddg(settings: Settings) -> list[float]:
    """Trains by DDG through the Trainer, one layer a stage.

    Returns:
        The time at which each batch ended on this rank, in seconds.
    """
    samples = torch.randn(settings.batches * settings.batch_size, WIDTH)
    ends = BatchEnds()
    trainer = Trainer(
        accelerator="cpu",
        devices=settings.stages,
        strategy=DDGStrategy(
            num_stages=settings.stages, split_points=[f"net.{layer}" for layer in range(1, settings.stages)]
        ),
        max_epochs=1,
        callbacks=[ends],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SleepingModule(settings), DataLoader(TensorDataset(samples, samples), settings.batch_size))
    return ends.times


def run_flushing(contender: Contender, settings: Settings) -> list[float]:
    """Trains by one of torch's pipeline schedules, one layer a rank.

    Returns:
        The time at which each batch ended on this rank, in seconds.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank()
    layer = SleepingLayer(settings)
    stage = PipelineStage(layer, rank, settings.stages, torch.device("cpu"))
    schedule_class = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[contender.schedule]
    schedule = schedule_class(stage, contender.microbatches, loss_fn=mse_loss)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    samples = torch.randn(settings.batch_size, WIDTH)
    inputs = (samples,) if rank == 0 else ()
    targets = samples if rank == settings.stages - 1 else None
    times = []
    for _ in range(settings.batches):
        optimizer.zero_grad()
        schedule.step(*inputs, target=targets, return_outputs=False)
        optimizer.step()
        times.append(time.perf_counter())
    return times


def work(settings: Settings, result: Path) -> None:
    """Runs every contender in every round as one worker; rank 0 writes the ends of its batches to `result`.

    Rank 0 owns DDG's last stage, where the loss is, and torch's first one, which is the last to finish a batch.
    """
    torch.manual_seed(0)
    rounds = []
    for _ in range(settings.rounds):
        rounds.append(
            [
                run_ddg(settings) if contender.schedule == "ddg" else run_flushing(contender, settings)
                for contender in contenders(settings)
            ]
        )
    if int(os.environ["RANK"]) == 0:
        result.write_text(json.dumps(rounds))
    if dist.is_initialized():
        dist.destroy_process_group()


# Starting the workers


def free_port() -> int:
    """Finds a port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def worker_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Gives the environment of one worker: the ranks as torchrun would name them, and one thread per process."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "NODE_RANK": "0",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _await_end(process: subprocess.Popen[bytes], name: str, log: Path, limit_s: float) -> None:
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        problem = f"did not end within {limit_s:.0f} s (a hang, or a machine too busy to measure on)"
    else:
        if code == 0:
            return
        problem = f"ended with exit code {code}"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"{name} {problem}; all workers were stopped. Set right what its last lines say:\n{tail}")


def run_workers(command: Sequence[str], world_size: int, limit_s: float) -> None:
    """Runs `command` as ranks 0 to `world_size` - 1 and waits for all of them; leaves none behind.

    Args:
        command: program and arguments, the same for each rank.
        world_size: how many processes.
        limit_s: seconds after which they are stopped.

    Raises:
        RuntimeError: as soon as one worker fails, or at the limit; with the end of that worker's output.
    """
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(world_size) as waiters:
        logs = [Path(folder, f"rank-{rank}.log") for rank in range(world_size)]
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as output:
                    processes.append(
                        subprocess.Popen(
                            command,
                            cwd=ROOT,
                            env=worker_environment(rank, world_size, port),
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                        )
                    )
            ends = [
                waiters.submit(_await_end, process, f"Worker {rank} of {world_size}", log, limit_s)
                for rank, (process, log) in enumerate(zip(processes, logs, strict=True))
            ]
            for end in as_completed(ends):
                end.result()
        finally:
            for process in processes:
                process.kill()


def measure(settings: Settings) -> list[list[list[float]]]:
    """Runs one set of K workers.

    Returns:
        Per round, per contender: the times at which the batches ended, in seconds.

    Raises:
        RuntimeError: if a worker fails or hangs.
    """
    sleeping_s = settings.rounds * settings.batches * sum(c.expected_ms(settings) for c in contenders(settings)) / 1000
    limit_s = 120 + 30 * settings.stages + 5 * sleeping_s
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "times.json")
        module = "recipes.benchmarks.schedule"
        arguments = ["--worker", json.dumps(asdict(settings)), str(result)]
        run_workers([sys.executable, "-m", module, *arguments], settings.stages, limit_s)
        rounds: list[list[list[float]]] = json.loads(result.read_text())
    return rounds


# Figures and tables


def steady_state_ms(times: Sequence[float], stages: int) -> tuple[float, float]:
    """Finds the period per batch in steady state: after the first 2K batches and before the last one.

    Args:
        times: when each batch ended, in seconds.
        stages: K.

    Returns:
        The mean and the median time between two ends of batches, in milliseconds.
    """
    timed = times[2 * stages : -1]
    differences = [1000 * (later - earlier) for earlier, later in pairwise(timed)]
    return 1000 * (timed[-1] - timed[0]) / len(differences), statistics.median(differences)


def summarize(settings: Settings, rounds: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Turns the times of one launch into what the JSON file says about this K; all times in milliseconds."""
    measured = []
    for position, contender in enumerate(contenders(settings)):
        periods, medians = zip(*(steady_state_ms(times[position], settings.stages) for times in rounds), strict=True)
        measured.append(
            {
                **asdict(contender),
                "expected_ms": contender.expected_ms(settings),
                "period_ms": {"median": statistics.median(periods), "min": min(periods), "max": max(periods)},
                "rounds": {"period_ms": list(periods), "median_difference_ms": list(medians)},
            }
        )
    return {"settings": asdict(settings), "references_ms": references_ms(settings), "contenders": measured}


def machine() -> dict[str, Any]:
    """Describes where and with what the figures were taken; `load` tells whether the machine was quiet at the start."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.processor(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "lightning")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def table_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lists one K's table, with each schedule's best count of micro-batches, m; the cells are those of COLUMNS."""
    stages = str(result["settings"]["stages"])
    references: dict[str, float] = result["references_ms"]
    best: dict[str, Any] = {}
    for contender in sorted(result["contenders"], key=lambda contender: contender["period_ms"]["median"]):
        best.setdefault(contender["schedule"], contender)

    def ratios(period: float) -> tuple[str, str, str]:
        return (
            f"{period / references['ideal'] - 1:+.1%}",
            f"{references['backprop'] / period:.2f}",
            f"{best['ddg']['period_ms']['median'] / period:.2f}",
        )

    rows: list[tuple[str, ...]] = []
    for name, predicted in references.items():
        rows.append((stages, LABELS[name], f"{predicted:.1f}", "", "", *ratios(predicted)))
    for schedule in sorted(best, key=list(LABELS).index):
        period = best[schedule]["period_ms"]
        label = LABELS[schedule] if schedule == "ddg" else f"{LABELS[schedule]}, m = {best[schedule]['microbatches']}"
        expected, measured = f"{best[schedule]['expected_ms']:.1f}", f"{period['median']:.1f}"
        spread = f"{period['min']:.1f}-{period['max']:.1f}"
        rows.append((stages, label, expected, measured, spread, *ratios(period["median"])))
    return rows


def rich_table(rows: Sequence[Sequence[str]]) -> Table:
    """Draws the rows for a terminal."""
    table = Table(title="Period per batch in ms, steady state", box=SIMPLE, collapse_padding=True, pad_edge=False)
    for position, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if position == 1 else "right", no_wrap=position == 1, overflow="fold")
    for position, row in enumerate(rows):
        table.add_row(*row, end_section=position + 1 == len(rows) or rows[position + 1][0] != row[0])
    return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Draws the rows for a README."""
    rule = ["---" if position == 1 else "---:" for position in range(len(COLUMNS))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, rule, *rows))


# The command


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Settings]]:
    """Reads the command line; exits with argparse's message if a value cannot be measured.

    Returns:
        The options, and the settings of each K.
    """
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.schedule", description="Times DDG's schedule.")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8], help="the values of K")
    parser.add_argument("--batches", type=int, default=60, help="per contender and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forward-ms", type=float, default=20.0, help="F, of a whole batch on one stage")
    parser.add_argument("--backward-ms", type=float, default=40.0, help="B, likewise")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 2, 4, 8], help="for torch's schedules")
    parser.add_argument("--quick", action="store_true", help="one round of the fewest batches: a trial, not a figure")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    settings = []
    try:
        for stages in options.stages:
            batches, rounds = (2 * stages + 6, 1) if options.quick else (options.batches, options.rounds)
            counts = tuple(options.microbatches)
            settings.append(Settings(stages, batches, rounds, options.forward_ms, options.backward_ms, counts))
    except ValueError as error:
        parser.error(str(error))
    return options, settings


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark, or one of its workers."""
    if arguments[:1] == ["--worker"]:
        values = json.loads(arguments[1])
        work(Settings(**{**values, "microbatches": tuple(values["microbatches"])}), Path(arguments[2]))
        return
    options, settings = parse(arguments)
    report: dict[str, Any] = {"machine": machine(), "results": []}
    progress = Console(stderr=True)
    for one in settings:
        progress.print(f"K = {one.stages}: {len(contenders(one))} contenders, {one.rounds} round(s)")
        try:
            report["results"].append(summarize(one, measure(one)))
        except RuntimeError as error:
            sys.exit(str(error))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    rows = [row for result in report["results"] for row in table_rows(result)]
    where = "CPU {cpu}, {cores} cores, load {load:.1f}; Python {python}, torch {torch}, lightning {lightning}; {date}"
    if options.markdown:
        print(markdown_table(rows), end="\n\n")
    else:
        Console(width=None if sys.stdout.isatty() else 100).print(rich_table(rows))
    print(where.format(**report["machine"]))


if __name__ == "__main__":
    main(sys.argv[1:])
