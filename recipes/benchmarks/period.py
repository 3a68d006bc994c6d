"""How far the simulated time per batch is from the measured one: the networks, the rounds and the table are here.

Run ``python -m recipes.benchmarks.period`` on a machine with nothing else to do. Each round trains each network for 40
batches in two processes, on random data, with the automatic cut. Simulated is what the cut was decided by: the layers,
measured one by one before the fit; the measured period is :class:`~lightning_ddg.DDGMonitor`'s. The rounds are
interleaved and the median of the ratios counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_ddg import DDGMonitor
from lightning_ddg.planning.simulate import steady_state
from recipes.gpt import GPT
from recipes.resnet_cifar import CifarResNet

BATCHES = 40


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Random images of CIFAR's shape, 128 to a batch."""

    batch_size = 128

    def __len__(self) -> int:
        return BATCHES * self.batch_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.rand(3, 32, 32), torch.tensor(index % 10)


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """Random text, 8 pieces of 128 bytes to a batch."""

    batch_size = 8

    def __len__(self) -> int:
        return BATCHES * self.batch_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.randint(0, 256, (128,)), torch.randint(0, 256, (128,))


WORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "ResNet-56": (lambda: CifarResNet(depth=56), Images),
    "ResNet-110": (lambda: CifarResNet(depth=110), Images),
    "GPT, 12 layers": (lambda: GPT(n_layers=12, width=256, heads=4, context=128), Tokens),
}


class Work(pl.LightningModule):
    """Trains a network by cross-entropy.

    Args:
        network: Returns logits, classes last.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.network(inputs).flatten(0, -2), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def run(name: str, path: Path) -> None:
    """Train one network once, and write what was simulated and measured."""
    pl.seed_everything(1)
    make, data = WORKS[name]
    samples = data()
    monitor = DDGMonitor(timeline=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddg",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor],
    )
    trainer.fit(Work(make()), DataLoader(samples, batch_size=samples.batch_size))
    if trainer.is_global_zero:
        measured = monitor.measured
        assert measured is not None
        assert measured.planned is not None
        figures = {"simulated": steady_state(measured.planned).period, "measured": measured.period}
        path.write_text(json.dumps(figures))


def main() -> None:
    """Parse the command line, run the rounds, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one", type=Path, help="train the first of --works once and write its figures there")
    arguments = parser.parse_args()
    if arguments.one is not None:
        run(arguments.works[0], arguments.one)
        return
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.works}
    with TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        for number in range(arguments.rounds):
            for name in arguments.works:
                command = [sys.executable, "-W", "ignore", "-m", "recipes.benchmarks.period"]
                ended = subprocess.run(
                    [*command, "--works", name, "--one", str(result)],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if ended.returncode:
                    raise SystemExit(f"{name} failed in round {number + 1}:\n{ended.stderr}")
                figures[name].append(json.loads(result.read_text()))
    print(f"{'2 stages':16s} {'simulated':>12s} {'measured':>12s} {'simulated / measured':>34s}")
    for name, rounds in figures.items():
        ratios = sorted(figure["simulated"] / figure["measured"] for figure in rounds)
        simulated, measured = (median(figure[key] for figure in rounds) for key in ("simulated", "measured"))
        spread = f"{median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{name:16s} {simulated * 1e3:9.1f} ms {measured * 1e3:9.1f} ms {spread:>34s}")
    machine = {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
