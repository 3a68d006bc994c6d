"""A long training in two processes: whether memory, threads and open files stay as many as they were."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddg import DDGStrategy

_VARIABLE = "DDG_SOAK"
_SAMPLES = 20
#: What may be added to the memory between the first and the last of the samples that count, in MB.
MOST = 4.0
_MB = 1 << 20


def sample() -> tuple[float, int, int]:
    """Resident memory in MB, threads and open files of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / _MB
    threads = len(list(Path("/proc/self/task").iterdir()))
    return memory, threads, len(list(Path("/proc/self/fd").iterdir()))


class Sampler(Callback):
    """Writes samples down, at equal distances."""

    def __init__(self, folder: Path, batches: int) -> None:
        self.folder, self.every = folder, max(1, batches // _SAMPLES)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.global_step
        if done and done % self.every == 0:
            with (self.folder / f"{trainer.global_rank}.csv").open("a") as file:
                csv.writer(file).writerow([done, *sample()])


class Module(LightningModule):
    """A small network; its steps take hardly longer than what is done around them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train() -> None:
    """What each of the two processes does."""
    told = json.loads(os.environ[_VARIABLE])
    torch.set_num_threads(1)
    # Of batches of two sizes, with an evaluation after each epoch: what is kept by shape or by epoch would grow.
    data = DataLoader(TensorDataset(torch.randn(4010, 32), torch.randn(4010, 1)), batch_size=16)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDGStrategy(split_points=["net.2"]),
        max_steps=told["batches"],
        callbacks=[Sampler(Path(told["folder"]), told["batches"])],
        limit_val_batches=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), data, data)


def soak(batches: int, console: Console) -> int:
    """Trains, prints what was sampled, and returns how many of the processes have grown."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, _VARIABLE: json.dumps({"batches": batches, "folder": folder})}
        subprocess.run([sys.executable, "-m", "recipes.faults.soak"], env=environment, check=True)
        ranks = [read(Path(folder) / f"{rank}.csv") for rank in range(2)]
    table = Table(title=f"{batches} batches in two processes")
    for column in ("rank", "batch", "resident memory, MB", "threads", "open files"):
        table.add_column(column, justify="right")
    grown = 0
    for rank, rows in enumerate(ranks):
        for batch, memory, threads, files in rows:
            table.add_row(str(rank), f"{batch:.0f}", f"{memory:.1f}", f"{threads:.0f}", f"{files:.0f}")
        table.add_section()
        grown += grows(rows)
    console.print(table)
    console.print("flat" if not grown else f"{grown} of 2 processes have grown")
    return grown


def read(path: Path) -> list[tuple[float, ...]]:
    """The samples of a process."""
    with path.open() as file:
        return [tuple(float(value) for value in row) for row in csv.reader(file)]


def grows(rows: list[tuple[float, ...]]) -> bool:
    """Whether a process has more of anything at its end than after a fifth of the batches, memory by ``MOST``."""
    settled, last = rows[len(rows) // 5], rows[-1]
    return last[1] > settled[1] + MOST or last[2] > settled[2] or last[3] > settled[3]


if __name__ == "__main__":
    train()
