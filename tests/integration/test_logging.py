"""Logging from every place and in every form: ranks have the same metrics, loggers what one process gives them."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchmetrics import Accuracy, CatMetric, MeanMetric, MetricCollection

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks, run_ranks_raw
from tests.networks import Classifier, largest_difference, loader, quiet_trainer, state_of


class LogsEverything(Classifier):
    """Every form of logging, and outputs of training steps collected for the end of the epoch."""

    def __init__(self) -> None:
        super().__init__("mlp", "adam")
        self.accuracy = Accuracy("multiclass", num_classes=3)
        self.several = MetricCollection({"mean": MeanMetric(), "all": CatMetric()})
        self.by_hand = Accuracy("multiclass", num_classes=3)
        self.collected: list[Tensor] = []
        self.ends: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log("largest", loss, reduce_fx="max", on_step=False, on_epoch=True, batch_size=len(x))
        self.log_dict({"a": loss * 2, "b": torch.tensor(float(batch_idx))}, on_epoch=True)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.several["mean"].update(loss)
        self.several["all"].update(loss.detach())
        self.log("mean", self.several["mean"], on_step=False, on_epoch=True)
        self.by_hand.update(logits, y)
        self.collected.append(logits.detach())
        return {"loss": loss, "largest logit": logits.detach().max()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("largest_logit", outputs["largest logit"])

    def on_train_epoch_end(self) -> None:
        together = torch.cat(self.collected)
        assert together.shape == (22, 3)
        self.log("spread", together.std())
        self.log("by_hand", self.by_hand.compute(), sync_dist=True)
        self.by_hand.reset()
        self.log("cat", self.several["all"].compute().mean())
        self.several["all"].reset()
        self.collected.clear()
        self.ends.append(float(self.trainer.callback_metrics["loss_epoch"]))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log_dict({"val_loss": loss, "val_twice": 2 * loss}, sync_dist=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val_end", torch.tensor(float(self.current_epoch)))

    def on_train_start(self) -> None:
        self.log("at_start", 3.0)


class Logs(Callback):
    """Logs from a callback, and notes what every rank reads after each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log("from_callback", outputs["loss"] + outputs["largest logit"], on_step=True, on_epoch=True)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer)

    def note(self, trainer: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(strategy: str, devices: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    module, logs = LogsEverything(), Logs()
    loggers: list[Any] = [CSVLogger(folder, "csv", ""), TensorBoardLogger(folder, "board", "")]
    if strategy == "ddg" and devices > 1:
        loggers.append(WandbLogger("run", folder, offline=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ddg = DDGStrategy(num_stages=3, split_points=["net.2", "net.5"])
        trainer = quiet_trainer(
            devices=devices, strategy=ddg if strategy == "ddg" else "auto", max_epochs=3,
            logger=loggers, log_every_n_steps=2, callbacks=[logs], val_check_interval=3,
        )  # fmt: skip
        data = loader("mlp")
        trainer.fit(module, data, data)
        wandb.finish()
    return {
        "final": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "seen": logs.seen,
        "ends": module.ends,
        "kept": [len(module.several["all"].value), float(module.accuracy.tp.sum())],
        "warnings": sorted({str(warning.message).splitlines()[0] for warning in caught}),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(fit, 3, "ddg", 3, str(folder / "ranks"), timeout=200)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return run_ranks(fit, 1, "ddg", 1, str(folder / "alone"))[0]


def test_metrics_are_the_same_on_all_ranks_after_each_epoch(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    names = {"loss_epoch", "loss_step", "largest", "a_epoch", "b_step", "accuracy_epoch", "mean", "largest_logit"}
    names |= {"spread", "by_hand", "cat", "val_loss", "val_twice", "val_end", "at_start", "from_callback_epoch"}
    assert names <= alone["final"].keys()
    for rank in ranks:
        assert rank["final"] == ranks[0]["final"]
        # Before the first epoch has ended, rank 0 alone has what is logged while training.
        assert rank["seen"][1:] == ranks[0]["seen"][1:]
        assert rank["final"] == pytest.approx(alone["final"], abs=1e-6)
        assert len(rank["seen"]) == len(alone["seen"]) == 4
        for mine, theirs in zip(rank["seen"][1:], alone["seen"][1:], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-6)
        assert rank["ends"] == pytest.approx(alone["ends"], abs=1e-6), "a hook reads this epoch's metrics on every rank"
        assert rank["kept"] == alone["kept"] == [0, 0.0], "metrics are reset on every rank"


def test_nothing_warns_that_does_not_warn_without_the_strategy(
    ranks: list[dict[str, Any]], alone: dict[str, Any], folder: Path
) -> None:
    plain = set(run_ranks(fit, 1, "auto", 1, str(folder / "plain"))[0]["warnings"])
    for result in (*ranks, alone):
        assert set(result["warnings"]) <= plain


def rows(path: Path) -> list[dict[str, float]]:
    with open(path) as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_loggers_get_what_one_process_logs(ranks: list[dict[str, Any]], alone: dict[str, Any], folder: Path) -> None:
    del ranks, alone
    got, expected = (rows(folder / name / "csv" / "metrics.csv") for name in ("ranks", "alone"))
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    steps = [row["step"] for row in got if "loss_step" in row]
    assert steps == [1, 3, 5, 7, 9, 11, 13]

    boards = []
    for name in ("ranks", "alone"):
        (file,) = (folder / name / "board").glob("events*")
        board = EventAccumulator(str(file)).Reload()
        boards.append({tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]})
    assert boards[0].keys() == boards[1].keys() >= {"loss_epoch", "spread", "val_loss", "from_callback_step"}
    for tag, values in boards[1].items():
        assert [step for step, _ in boards[0][tag]] == [step for step, _ in values], tag
        assert [value for _, value in boards[0][tag]] == pytest.approx([value for _, value in values], abs=1e-5), tag

    runs = list((folder / "ranks" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1, "one run, of rank 0"
    assert runs[0].stat().st_size > 1000
    assert [file.name for file in (folder / "ranks" / "csv").iterdir()] == ["metrics.csv"], "written once"


class RoundTrip(nn.Module):
    """Cannot run without values, so that no placeholder of the network's output can be made."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.0 * float(x.detach().sum())


class NeedsRealOutputs(Classifier):
    """A step that does not bear zeros in the place of the network's output, and a hook that wants what it returns."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__("mlp", "sgd")
        self.net.append(last)
        self.outputs = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        assert float(logits.detach().abs().sum()) > 0, "zeros"
        return nn.functional.cross_entropy(logits, batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs += outputs["loss"].numel()


def fit_with_steps_that_need_real_outputs(devices: int) -> list[Any]:
    warnings.simplefilter("ignore")
    results = []
    for last in (nn.Identity(), RoundTrip()):
        module = NeedsRealOutputs(last)
        strategy = DDGStrategy(num_stages=3, split_points=["net.2", "net.5"])
        quiet_trainer(devices=devices, strategy=strategy).fit(module, loader("mlp"))
        results.append((state_of(module), module.outputs))
    return results


def test_steps_that_bear_no_placeholder_end_at_the_network_where_the_loss_is_not() -> None:
    alone = fit_with_steps_that_need_real_outputs(1)
    for results in run_ranks(fit_with_steps_that_need_real_outputs, 3, 3):
        for (state, outputs), (expected, count) in zip(results, alone, strict=True):
            assert largest_difference(state, expected) <= 1e-12
            assert outputs == count == 15


class FailsBeforeTheNetwork(NeedsRealOutputs):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 2 and batch_idx == 2:
            raise OSError("the disk is full")
        return super().training_step(batch, batch_idx)


def fit_and_fail() -> None:
    warnings.simplefilter("ignore")
    strategy = DDGStrategy(num_stages=3, split_points=["net.2", "net.5"])
    quiet_trainer(devices=3, strategy=strategy).fit(FailsBeforeTheNetwork(nn.Identity()), loader("mlp"))


def test_what_fails_before_the_network_fails() -> None:
    for result in run_ranks_raw(fit_and_fail, 3, timeout=60):
        assert "the disk is full" in str(result.error)
