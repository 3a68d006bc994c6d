"""What a step gives back to the network's next call: trained alike in one process, refused in several."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.networks import Classifier, loader, quiet_trainer


class Remembers(Classifier):
    """Adds to each batch what the network has said of the one before."""

    said: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        output = self.net(x if self.said is None else x + self.said)
        self.said = output.detach().mean()
        return torch.nn.functional.cross_entropy(output, y)


class Counts(Classifier):
    """Adds what every process knows alike."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn((), dtype=x.dtype)
        return torch.nn.functional.cross_entropy(self.net(x + 0.01 * self.global_step + noise), y)


class Manual(Remembers):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()  # type: ignore[union-attr]


def fit(kind: type[Classifier], devices: int) -> str:
    warnings.simplefilter("ignore")
    trainer = quiet_trainer(devices=devices, strategy=DDGStrategy(2, ["net.3"]), max_epochs=1)
    try:
        trainer.fit(kind(), loader("mlp"))
    except RuntimeError as error:
        return str(error)
    return f"{trainer.global_step} steps"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Remembers, "passes on a value that the stage of 'net.0' does not have"),
        (Manual, "In batch 1 of this run, the first stage's process gives something else to the network (`self.net`)"),
    ],
)
def test_a_hidden_state_of_a_later_stage_is_refused_in_several_processes(kind: type[Classifier], words: str) -> None:
    assert fit(kind, 1) == "5 steps"
    errors = run_ranks(fit, 2, kind, 2)
    assert all(words in error for error in errors)
    assert all("`devices=1`" in error for error in errors)


def test_what_all_processes_know_alike_may_change() -> None:
    assert run_ranks(fit, 2, Counts, 2) == ["5 steps", "5 steps"]
