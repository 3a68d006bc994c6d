"""Whether stale gradients cost a language model its loss: optimizers and rules beside each one's own backpropagation.

python -m recipes.study.language --config recipes/study/language.yaml --path FILE --out runs/language

A character GPT is trained for equally many updates by every optimizer, rule and number of stages, all stages in one
process; seeds are paired: runs of one seed begin with the same weights and see the same text. Started again with the
same settings, it goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from lightning_ddg import DDGStrategy, Staleness
from recipes.gpt import GPT, LanguageModel
from recipes.study.equivalence import Pairs, compare
from recipes.study.processes import share_out
from recipes.study.results import differences, write, write_table
from recipes.text import TextData

#: What the strategy is given beside the number of stages; plain backpropagation has none.
RULES: dict[str, Mapping[str, Any] | None] = {
    "backprop": None,
    "plain": {},
    "extrapolated": {"staleness": Staleness(extrapolate=True)},
    "m2": {"micro_batches": 2},
    "m4": {"micro_batches": 4},
    "m12": {"micro_batches": 12},
    "m4, extrapolated": {"micro_batches": 4, "staleness": Staleness(extrapolate=True)},
    "m12, extrapolated": {"micro_batches": 12, "staleness": Staleness(extrapolate=True)},
    "finish 0.1": {"staleness": Staleness(finish=0.1)},
    "m4, extrapolated, finish 0.1": {
        "micro_batches": 4,
        "staleness": Staleness(extrapolate=True, finish=0.1),
    },
    "m12, extrapolated, finish 0.1": {
        "micro_batches": 12,
        "staleness": Staleness(extrapolate=True, finish=0.1),
    },
}

#: Of the sweep for the learning rate; no seed of a comparison.
SWEEP_SEED = 0

#: Points of a curve of the training loss.
POINTS = 30


@dataclass(frozen=True)
class Settings:
    """What all runs of a study share.

    Attributes:
        steps: Updates of a run.
        layers: Blocks of the GPT.
        width: Of the GPT.
        heads: Of a block.
        context: Characters of a text.
        batch_size: Texts of an update.
        warmup_steps: Over which the learning rate rises; then it falls along a cosine to a tenth.
        clip: The Trainer's ``gradient_clip_val``, of each stage's own norm.
        precision: The Trainer's.
        accelerator: The Trainer's.
    """

    steps: int
    layers: int
    width: int
    heads: int
    context: int
    batch_size: int
    warmup_steps: int
    clip: float
    precision: str
    accelerator: str


@dataclass(frozen=True)
class Run:
    """One fit.

    Attributes:
        optimizer: See ``recipes/optimizers.py``.
        rule: Of ``RULES``.
        stages: K; 1 is backpropagation.
        lr: The learning rate at its highest.
        seed: Of the first weights and the order of the texts.
    """

    optimizer: str
    rule: str
    stages: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Names the run, and its file."""
        rule = self.rule.replace(", ", "-").replace(" ", "")
        return f"{self.optimizer}_{rule}_K{self.stages}_lr{self.lr:g}_seed{self.seed}"


@dataclass(frozen=True)
class Job:
    """All that a process must know to do a run; ``path`` is the text."""

    run: Run
    settings: Settings
    path: str


class _Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def even_cut(layers: int, stages: int) -> list[str]:
    """Where stages 2..K begin: as many blocks in each as can be, and in every run the same."""
    return [f"network.blocks.{layers * stage // stages}" for stage in range(1, stages)]


def fit(job: Job) -> dict[str, Any]:
    """Does a run.

    Returns:
        ``val_loss``, in nats a character, of all of the last tenth of the text; ``curve``, the mean training loss of
        each of ``POINTS`` parts of the run; ``seconds`` that the training took.
    """
    run, settings = job.run, job.settings
    # Sums are rounded otherwise by another number of threads, and a run must not depend on how many run beside it.
    torch.set_num_threads(1)
    seed_everything(run.seed, verbose=False)
    network = GPT(256, settings.layers, settings.width, settings.heads, settings.context, dropout=0.0)
    module = LanguageModel(network, run.lr, warmup_steps=settings.warmup_steps, optimizer=run.optimizer)  # type: ignore[arg-type]
    data = TextData(job.path, context=settings.context, batch_size=settings.batch_size)
    rule = RULES[run.rule]
    options: dict[str, Any] = (
        {} if rule is None else {"strategy": DDGStrategy(run.stages, even_cut(settings.layers, run.stages), **rule)}
    )
    trainer = Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,  # type: ignore[arg-type]
        max_steps=settings.steps,
        gradient_clip_val=settings.clip,
        limit_val_batches=0,
        callbacks=[losses := _Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    # Not the strategy's own draws, whatever they are, but the seed decides which texts come first.
    torch.manual_seed(run.seed)
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    data.batch_size = 64
    trainer.limit_val_batches = 1.0
    (found,) = trainer.validate(module, data, verbose=False)
    parts = torch.tensor(losses.losses).tensor_split(min(POINTS, len(losses.losses)))
    return {"val_loss": found["val_loss"], "curve": [float(part.mean()) for part in parts], "seconds": seconds}


def read_rows(rows: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Reads rows such as ``"adamw: m12, extrapolated: 4 8"``: optimizer, rule and numbers of stages.

    Raises:
        ValueError: If a row is not of that form, or its rule is unknown.
    """
    for row in rows:
        parts = [part.strip() for part in row.split(":")]
        if len(parts) != 3 or parts[1] not in RULES or not all(number.isdigit() for number in parts[2].split()):
            raise ValueError(f"The row {row!r} is not `optimizer: rule: stages`, with a rule of: {'; '.join(RULES)}.")
        for number in parts[2].split():
            yield parts[0], parts[1], int(number)


class Folder:
    """What a study leaves on disk: a file for each finished run, and one table of all.

    Args:
        path: Made if it does not exist.
        settings: Of all runs in it.

    Raises:
        ValueError: If its runs were made with other settings.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        (path / "runs").mkdir(parents=True, exist_ok=True)
        kept = path / "settings.json"
        changed = differences(json.loads(kept.read_text()), asdict(settings)) if kept.exists() else []
        if changed:
            raise ValueError(f"The study in {path} has other settings: {'; '.join(changed)}. Give another --out.")
        write(kept, json.dumps(asdict(settings), indent=1))

    def finished(self, run: Run) -> bool:
        """Whether a run need not be done again."""
        return self._file(run).exists()

    def keep(self, run: Run, found: Mapping[str, Any]) -> None:
        """Writes a finished run down."""
        write(self._file(run), json.dumps({**asdict(run), **found}))

    def read(self) -> list[dict[str, Any]]:
        """Reads all finished runs, and writes the table of them."""
        rows = [json.loads(path.read_text()) for path in sorted(self.path.glob("runs/*.json"))]
        columns = [*(field.name for field in fields(Run)), "val_loss", "seconds"]
        write_table(self.path / "results.csv", columns, rows)
        return rows

    def _file(self, run: Run) -> Path:
        return self.path / "runs" / f"{run.name}.json"


def best_rates(rows: Sequence[Mapping[str, Any]], sweep: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The learning rate of each optimizer: the one with the smallest validation loss of backpropagation in the sweep.

    ``rows`` are finished runs; optimizers whose sweep is not done are left out.
    """
    found = {
        (row["optimizer"], row["lr"]): row["val_loss"]
        for row in rows
        if row["rule"] == "backprop" and row["seed"] == SWEEP_SEED
    }
    return {
        name: min(rates, key=lambda rate: found[name, rate])
        for name, rates in sweep.items()
        if all((name, rate) in found for rate in rates)
    }


def by_contender(
    rows: Sequence[Mapping[str, Any]], rates: Mapping[str, float]
) -> dict[tuple[str, str, int], dict[int, float]]:
    """Validation losses by optimizer, rule and stages, then by seed; the sweep's are left out."""
    found: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows:
        if row["seed"] != SWEEP_SEED and row["lr"] == rates.get(row["optimizer"]):
            key = row["optimizer"], row["rule"], row["stages"]
            found.setdefault(key, {})[row["seed"]] = row["val_loss"]
    order = list(RULES)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], order.index(item[0][1]), item[0][2])))


def tables(rows: Sequence[Mapping[str, Any]], sweep: Mapping[str, Sequence[float]], margin: float) -> list[Table]:
    """What has been found: the sweep, and every contender beside backpropagation."""
    rates = best_rates(rows, sweep)
    swept = Table(title="Backpropagation by learning rate: validation loss, nats")
    for name in ("optimizer", "learning rate", "validation loss", "chosen"):
        swept.add_column(name)
    for row in rows:
        if row["seed"] == SWEEP_SEED and row["rule"] == "backprop":
            chosen = "*" if rates.get(row["optimizer"]) == row["lr"] else ""
            swept.add_row(row["optimizer"], f"{row['lr']:g}", f"{row['val_loss']:.3f}", chosen)
    found = by_contender(rows, rates)
    own = {name: losses for (name, rule, _), losses in found.items() if rule == "backprop"}
    best = min(own, key=lambda name: fmean(own[name].values()), default=None)
    table = Table(title=f"Validation loss, nats; equal: the 90 % interval lies within {margin:g}")
    for name in ("optimizer", "rule", "K", "seeds", "loss", "minus its K = 1", "", f"minus {best}'s K = 1", ""):
        table.add_column(name)
    for (name, rule, stages), losses in found.items():
        cells = [name, rule, str(stages), str(len(losses)), f"{fmean(losses.values()):.3f}"]
        for other in (own.get(name), own.get(best) if best else None):
            pairs = None if other is None or other is losses else compare(losses, other)
            cells += _pairs(pairs, margin)
        table.add_row(*cells)
    return [swept, table]


def _pairs(pairs: Pairs | None, margin: float) -> list[str]:
    if pairs is None:
        return ["-", ""]
    half = "" if pairs.half is None else f" ± {pairs.half:.3f}"
    return [f"{pairs.mean:+.3f}{half}", pairs.verdict(margin)]


def main(arguments: Sequence[str]) -> None:
    """Does the runs that have not been done, then prints what all runs in the folder say."""
    parser = ArgumentParser(prog="python -m recipes.study.language", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_class_arguments(Settings, "settings")
    parser.add_argument("--path", default="runs/data/tinyshakespeare.txt", help="the text")
    parser.add_argument("--sweep", type=dict[str, list[float]], help="learning rates by optimizer, at K = 1")
    parser.add_argument("--rows", type=list[str], help="what is compared: `optimizer: rule: stages`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--margin", type=float, default=0.02, help="in nats: a smaller difference counts as none")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, with one thread each")
    parser.add_argument("--minutes", type=float, help="begin no run after so many; the next call goes on")
    parser.add_argument("--out", type=Path, default=Path("runs/language"), help="folder for everything written")
    asked = parser.parse_args(list(arguments))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    say, start = Console(stderr=True, soft_wrap=True), time.monotonic()
    settings = Settings(**asked.settings.as_dict())
    try:
        rows = list(read_rows(asked.rows))
        folder = Folder(asked.out, settings)
    except ValueError as error:
        raise SystemExit(f"python -m recipes.study.language: {error}") from error

    def do(runs: Sequence[Run]) -> None:
        left = [run for run in runs if not folder.finished(run)]
        jobs = [Job(run, settings, asked.path) for run in left]

        def in_time() -> Iterator[Job]:
            for job in jobs:
                if asked.minutes is None or time.monotonic() - start < 60 * asked.minutes:
                    yield job

        for number, (job, found) in enumerate(share_out(fit, in_time(), asked.jobs, folder.path / "log.txt"), 1):
            folder.keep(job.run, found)
            took = f"{time.monotonic() - start:6.0f} s  {number}/{len(jobs)}"
            say.print(f"{took}  {job.run.name}: {found['val_loss']:.4f} in {found['seconds']:.0f} s", highlight=False)

    names = {name for name, _, _ in rows}
    do(
        [
            Run(name, "backprop", 1, rate, SWEEP_SEED)
            for name in asked.sweep
            if name in names
            for rate in asked.sweep[name]
        ]
    )
    rates = best_rates(folder.read(), asked.sweep)
    do(
        [
            Run(name, rule, stages, rates[name], seed)
            for seed, (name, rule, stages) in product(asked.seeds, rows)
            if name in rates
        ]
    )
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables(folder.read(), asked.sweep, asked.margin):
        console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
