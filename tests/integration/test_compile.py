"""``compile``: compiled stages train the same weights, in one process and in several; add a network that might not."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, fx

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.networks import Classifier, largest_difference, loader, quiet_trainer, state_of

NETWORKS = ("mlp", "convnet", "unet", "gpt")
# Each compiled module in training and in evaluation, and again for batches of other sizes. Torch 2.6 breaks graphs
# where a segment looks up how it was called.
MOST_COMPILED = 8 if torch.__version__.startswith("2.6.") else 6
COMPILED: list[int] = []


def counting(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend that runs what it was given and keeps count."""
    COMPILED.append(len(graph.graph.nodes))
    return graph.forward


class Counts(pl.Callback):
    """How many modules this process has compiled: a stage, or those that its code calls."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        run = trainer.strategy.run  # type: ignore[attr-defined]
        stages = [run.ranks.stage] if run.ranks.stage else [1, 2]
        self.modules = sum(len(getattr(run.ownership.segments[stage - 1], "called", "1")) for stage in stages)


def train(network: str, devices: int, compile: Any) -> tuple[dict[str, Tensor], float, int, int]:
    """The weights, the loss of a validation, and how many graphs were compiled, of how many modules."""
    warnings.simplefilter("ignore")
    COMPILED.clear()
    strategy = DDGStrategy(2, balance="parameters", compile=compile)
    module = Classifier(network, "nesterov")
    counts = Counts()
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=2, callbacks=[counts])
    trainer.fit(module, loader(network), loader(network, 7, 5))
    return state_of(module), float(trainer.callback_metrics["val_loss"]), len(COMPILED), counts.modules


def train_all(devices: int) -> dict[str, Any]:
    return {
        network: (train(network, devices, False), train(network, devices, {"backend": counting}))
        for network in NETWORKS
    }


@pytest.mark.parametrize("devices", [1, 2])
def test_compiled_stages_train_the_same_weights(devices: int) -> None:
    for result in run_ranks(train_all, devices, devices):
        for network, (plain, compiled) in result.items():
            assert largest_difference(plain[0], compiled[0]) <= 1e-12, network
            assert compiled[1] == pytest.approx(plain[1], rel=1e-12), network
            assert plain[2] == 0
            assert 2 * compiled[3] <= compiled[2] <= MOST_COMPILED * compiled[3], network


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own backend needs a C++ compiler")
def test_torchs_own_backend() -> None:
    (plain, *_) = run_ranks(train, 2, "gpt", 2, False)
    for compiled in run_ranks(train, 2, "gpt", 2, True, timeout=280):
        assert largest_difference(plain[0], compiled[0]) <= 1e-9
