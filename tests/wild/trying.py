"""Published packages under this strategy: what is tried, and what is compared.

A case trains a small model of a package through that package's own interface. The Trainer's arguments come from here,
and only the strategy differs: plain Lightning, two stages in one process, two processes. With one batch an epoch no
gradient is stale, so that all of them must end with the same weights and the same metrics.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.networks import largest_difference, quiet_trainer, state_of

WAYS = ("one process", "two processes")
ROUNDING = {"64-true": 1e-9, "32-true": 1e-4}


@dataclass(frozen=True)
class Case:
    """What is trained, and what comes of it.

    Attributes:
        train: Trains by the package's own interface, with these arguments of a Trainer.
        refused: For each way that is refused, words of the refusal.
        draws: The step draws random numbers, which the stages draw otherwise than plain Lightning: the two ways are
            compared with each other, and with plain backpropagation by the proof of the first batch.
        unproved: Words of the warning that the first batch could not be compared, where that is so.
    """

    train: Callable[[dict[str, Any]], None]
    refused: dict[str, str] | None = None
    draws: bool = False
    precision: str = "64-true"
    unproved: str | None = None


@dataclass
class Outcome:
    state: dict[str, Tensor]
    start: dict[str, Tensor]
    metrics: dict[str, float]
    cut: list[int]
    warned: list[str]
    error: str | None


class Seen(pl.Callback):
    """Remembers the Trainer that a package makes, and the weights before."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer
        self.start = state_of(pl_module)


def attempt(where: str, name: str, way: str, folder: str) -> Outcome:
    """Run in a process of its own, or in each of two; what the package writes goes to ``folder``."""
    case: Case = import_module(where).CASES[name]
    seen = Seen()
    strategy: Any = "auto"
    if way != "plain":
        # What a stage draws follows from where it begins; measured times may cut elsewhere in another run.
        balance = "parameters" if case.draws else "time"
        strategy = DDGStrategy(num_stages=2, balance=balance, timeout=timedelta(seconds=60))
    arguments = {
        "accelerator": "cpu",
        "devices": 2 if way == "two processes" else 1,
        "strategy": strategy,
        "max_epochs": 3,
        "precision": case.precision,
        "callbacks": [seen],
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.seed_everything(1, verbose=False)
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            case.train(arguments)
        except Exception as raised:  # the error is what is compared
            error = "".join(traceback.format_exception(raised))
    warned = [str(warning.message) for warning in caught]
    if not hasattr(seen, "trainer"):
        return Outcome({}, {}, {}, [], warned, error)
    metrics = {key: float(value) for key, value in seen.trainer.callback_metrics.items()}
    cut = [len(names) for names in strategy.stage_parameter_names] if way != "plain" and error is None else []
    # `state_dict()` of another stage's layers is refused where a fit has failed.
    state = state_of(seen.trainer.lightning_module) if error is None else {}
    return Outcome(state, seen.start, metrics, cut, warned, error)


def attempt_all(where: str, names: list[str], way: str, folder: str) -> list[Outcome]:
    """Try one after the other; a failure may leave two processes out of step, and is the last that they try."""
    found = []
    for name in names:
        found.append(attempt(where, name, way, folder))
        if found[-1].error is not None and way == "two processes":
            break
    return found


@cache
def outcomes(where: str, names: tuple[str, ...], way: str) -> dict[str, list[Outcome]]:
    """Of each case, what each rank has."""
    found: dict[str, list[Outcome]] = {}
    while left := [name for name in names if name not in found]:
        with TemporaryDirectory() as folder:
            processes = 2 if way == "two processes" else 1
            ranks = run_ranks(attempt_all, processes, where, left, way, folder, timeout=120 + 60 * len(left))
        found |= dict(zip(left, map(list, zip(*ranks, strict=False)), strict=False))
    return found


def check(request: pytest.FixtureRequest, name: str, way: str) -> None:
    """What is promised: the same weights and metrics as without the strategy, or an error that says why not.

    All cases of a file that were asked for are tried together, so that its package is imported once.
    """
    where = request.module.__name__
    asked = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    names = tuple(dict.fromkeys(item.callspec.params["name"] for item in asked))  # type: ignore[attr-defined]
    case: Case = request.module.CASES[name]
    plain = outcomes(where, names, "plain")[name][0]
    assert plain.error is None, plain.error
    found = outcomes(where, names, way)[name]
    words = (case.refused or {}).get(way)
    for rank, outcome in enumerate(found):
        if words is not None:
            assert outcome.error is not None, f"rank {rank} trains; expected was: {words}"
            assert words in outcome.error
            continue
        assert outcome.error is None, f"rank {rank}: {outcome.error}"
        expected = outcomes(where, names, "one process")[name][0] if case.draws else plain
        limit = ROUNDING[case.precision]
        difference = largest_difference(outcome.state, expected.state)
        assert difference <= limit, f"rank {rank}: other weights, by {difference:.2g}"
        assert outcome.metrics == pytest.approx(expected.metrics, rel=limit, abs=limit, nan_ok=True)
        assert all(outcome.cut), f"a stage without parameters: {outcome.cut}"
        assert any(_moved(value, expected.start[key], limit) for key, value in expected.state.items()), (
            "nothing was trained"
        )
    if words is None:
        # Rank 0 compares.
        unproved = [warning for warning in found[0].warned if "gradients are not compared" in warning]
        if case.unproved is None:
            assert not unproved, unproved
        else:
            assert case.unproved in "".join(unproved)


def _moved(now: Tensor, before: Tensor, limit: float) -> bool:
    # A bank of features is empty at first.
    return now.shape != before.shape or bool(((now.double() - before.double()).abs() > limit).any())


def needs(*packages: str) -> list[pytest.MarkDecorator]:
    """The marks of a test file: ``wild``, and skipped where a package is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    reason = f"the extra `wild` brings {', '.join(missing)}"
    return [pytest.mark.wild, pytest.mark.timeout(1800), pytest.mark.skipif(bool(missing), reason=reason)]


# ---- for packages that bring networks only


class Supervised(pl.LightningModule):
    """A network whose output and batch go to a loss."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([weight for weight in self.parameters() if weight.requires_grad], lr=0.01)


class Rows(Dataset[Any]):
    """Tensors of equal length, as tuples, or as dictionaries."""

    def __init__(self, *columns: Tensor, **named: Tensor) -> None:
        self.columns, self.named = columns, named

    def __len__(self) -> int:
        return len([*self.columns, *self.named.values()][0])

    def __getitem__(self, index: int) -> Any:
        if self.named:
            return {name: column[index] for name, column in self.named.items()}
        return tuple(column[index] for column in self.columns)


def one_batch(
    *columns: Tensor, collate: Callable[[list[Any]], Any] = default_collate, **named: Tensor
) -> DataLoader[Any]:
    """A loader of a single batch."""
    rows = Rows(*columns, **named)
    return DataLoader(rows, batch_size=len(rows), collate_fn=collate)


def draw_images(count: int = 4, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(5))


def draw_classes(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(6))


def fit(arguments: dict[str, Any], module: pl.LightningModule, loader: Any) -> None:
    quiet_trainer(**arguments).fit(module, loader, loader)


def classify_images(arguments: dict[str, Any], net: nn.Module, size: int = 32) -> None:
    module = Supervised(net, nn.functional.cross_entropy)
    fit(arguments, module, one_batch(draw_images(size=size), draw_classes(4)))
