"""Lightning's callbacks: each does in several processes what it does in one, or is refused with the remedy.

What a callback ends with is compared between the two executions. Many run in each process group: starting one is slow.
"""

from __future__ import annotations

import copy
import io
import os
import re
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch import callbacks as known
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BasePredictionWriter,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks, run_ranks_raw
from tests.networks import SAFELY, Classifier, largest_difference, loader, quiet_trainer, state_of


class Rated(Classifier):
    """With a learning rate to be found, and metrics from every place that may log."""

    def __init__(self, network: str = "mlp", lr: float = 0.1) -> None:
        super().__init__(network)
        self.lr = lr

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("from_batch_end", float(batch_idx) + outputs["loss"].detach())

    def on_train_epoch_end(self) -> None:
        self.log("from_epoch_end", self.trainer.callback_metrics["train_loss_epoch"] * 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class StopsInTheMiddle(Callback):
    """Rank 0 alone knows the loss, and asks for a stop in the middle of an epoch, or at its end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and trainer.global_step == self.step:
            assert float(outputs["loss"]) > 0
            trainer.should_stop = True


class StopsAfterValidation(Callback):
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and trainer.global_step >= 7:
            trainer.should_stop = True


class CountingTimer(Timer):
    """Its clock counts batches, but only on rank 0: other ranks' clocks are not to be asked."""

    batches = 0

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        self.batches += int(trainer.is_global_zero)
        super().on_train_batch_end(trainer, *args, **kwargs)

    def time_elapsed(self, *args: Any) -> float:
        return float(self.batches)


class Metrics(Callback):
    """What all ranks read at the end of an epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Average(Callback):
    """A hand-written average of the weights, made of a deep copy of the module."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.average = copy.deepcopy(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for mine, current in zip(self.average.parameters(), pl_module.parameters(), strict=True):
            mine.data.lerp_(current.data, 0.1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for mine, current in zip(self.average.parameters(), pl_module.parameters(), strict=True):
            current.data.copy_(mine.data)


class Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.net[0], pl_module.net[3]])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group([pl_module.net[0], pl_module.net[3]], optimizer)


class Trainable(Rated):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def summary_of(checkpoint: ModelCheckpoint) -> dict[str, Any]:
    """What a checkpoint callback ended with, and what it has written."""
    folder = Path(str(checkpoint.dirpath))
    # In torch 2.6 the state of SWALR holds one of its functions, by name; Lightning puts it in the file.
    scheduler = SWALR(torch.optim.SGD([nn.Parameter(torch.zeros(()))]), 0.1)
    extra = [getattr, SWALR] if "anneal_func" in scheduler.state_dict() else []
    with torch.serialization.safe_globals(extra):
        files = {file.name: torch.load(file, weights_only=True)["state_dict"] for file in sorted(folder.glob("*.ckpt"))}
    return {
        "best": Path(checkpoint.best_model_path).name,
        "last": Path(checkpoint.last_model_path).name,
        "score": None if checkpoint.best_model_score is None else float(checkpoint.best_model_score),
        "top": {Path(path).name: float(score) for path, score in checkpoint.best_k_models.items()},
        "files": files,
    }


Case = tuple[Callable[[], Classifier], dict[str, Any], Callable[[str], list[Callback]]]
CASES: dict[str, Case] = {
    "checkpoint on a training metric": (
        Rated,
        {},
        lambda folder: [
            ModelCheckpoint(folder, "{epoch}-{train_loss_epoch:.4f}", "train_loss_epoch", save_top_k=2, save_last=True)
        ],
    ),
    "checkpoint on what the end of an epoch logs": (
        Rated,
        {},
        lambda folder: [ModelCheckpoint(folder, "{epoch}-{from_epoch_end:.4f}", "from_epoch_end", mode="max")],
    ),
    "checkpoint every 2 steps on a training metric": (
        Rated,
        {},
        lambda folder: [
            ModelCheckpoint(folder, "{step}-{train_loss_step:.4f}", "train_loss_step", save_top_k=3,
                            every_n_train_steps=2)
        ],
    ),
    "checkpoint by the clock": (
        Rated,
        {},
        lambda folder: [
            ModelCheckpoint(folder, "{step}", save_top_k=-1, train_time_interval=timedelta(0), save_last="link")
        ],
    ),
    "checkpoint by the clock on a training metric": (
        Rated,
        {},
        lambda folder: [
            ModelCheckpoint(folder, "{step}-{train_loss_step:.4f}", "train_loss_step", save_top_k=2,
                            train_time_interval=timedelta(0))
        ],
    ),
    "checkpoint after validations in an epoch": (
        Rated,
        {"val_check_interval": 2},
        lambda folder: [ModelCheckpoint(folder, "{step}-{train_loss_step:.4f}", "train_loss_step", save_top_k=-1)],
    ),
    "early stopping on a training metric": (
        Rated,
        {"max_epochs": 20},
        lambda folder: [EarlyStopping("train_loss_epoch", patience=2, min_delta=0.05)],
    ),
    "early stopping on what the end of an epoch logs": (
        Rated,
        {"max_epochs": 20},
        lambda folder: [EarlyStopping("from_epoch_end", patience=2, min_delta=0.1)],
    ),
    "early stopping in an epoch": (
        Rated,
        {"max_epochs": 20, "val_check_interval": 2},
        lambda folder: [EarlyStopping("train_loss_step", patience=1, min_delta=0.3)],
    ),
    "stop in an epoch": (Rated, {}, lambda folder: [StopsInTheMiddle(6)]),
    "stop before the end of an epoch": (Rated, {}, lambda folder: [StopsInTheMiddle(9)]),
    "stop after enough epochs": (Rated, {"min_epochs": 3, "max_epochs": 9}, lambda folder: [StopsInTheMiddle(6)]),
    "stop after validation": (
        Rated, {"val_check_interval": 2, "max_epochs": 9}, lambda folder: [StopsAfterValidation()]
    ),
    "timer": (Rated, {"max_epochs": 9}, lambda folder: [CountingTimer(timedelta(seconds=6))]),
    "timer at the end of epochs": (
        Rated,
        {"max_epochs": 9},
        lambda folder: [CountingTimer(timedelta(seconds=8), interval="epoch")],
    ),
    "learning rate finder": (
        lambda: Rated(lr=0.01),
        {"max_epochs": 5},
        lambda folder: [LearningRateFinder(min_lr=1e-4, max_lr=10.0, num_training_steps=22)],
    ),
    "weights averaged at the end": (
        Rated,
        {"max_epochs": 5},
        lambda folder: [StochasticWeightAveraging(0.05, swa_epoch_start=2), ModelCheckpoint(folder, save_top_k=-1)],
    ),
    "weights averaged, with BatchNorm": (
        lambda: Rated("convnet"),
        {"max_epochs": 5},
        lambda folder: [StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=2)],
    ),
    "weights averaged, with BatchNorm, drained late": (
        lambda: Rated("convnet"),
        {"max_epochs": 5, "drain": "fit"},
        lambda folder: [StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=2)],
    ),
    "learning rate finder, never drained": (
        lambda: Rated(lr=0.01),
        {"max_epochs": 5, "drain": "never"},
        lambda folder: [LearningRateFinder(min_lr=1e-4, max_lr=10.0, num_training_steps=22)],
    ),
    "stop in an epoch, never drained": (
        Rated, {"drain": "never", "val_check_interval": 2}, lambda folder: [StopsInTheMiddle(6)]
    ),
    "moving average": (
        lambda: Rated("convnet"),
        {},
        lambda folder: [
            known.EMAWeightAveraging(decay=0.8), ModelCheckpoint(folder, save_top_k=-1),
            EarlyStopping("val_loss", patience=9),
        ],
    ),
    "moving average by hand": (Rated, {}, lambda folder: [Average()]),
    "fine-tuning": (Trainable, {}, lambda folder: [Thawing(), ModelCheckpoint(folder, save_top_k=-1)]),
}  # fmt: skip
# Not every Lightning that is supported has one; the case by hand is for all.
if not hasattr(known, "EMAWeightAveraging"):
    del CASES["moving average"]


def train(name: str, devices: int, folder: str, load: str | None = None) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    make, flags, callbacks = CASES[name]
    torch.manual_seed(1)
    module, metrics = make(), Metrics()
    home = f"{folder}/{list(CASES).index(name)}{'-again' if load else ''}"
    chosen, flags = callbacks(home), dict(flags)
    drain = flags.pop("drain", "epoch")
    trainer = quiet_trainer(
        devices=devices, strategy=DDGStrategy(num_stages=3, split_points=["net.2", "net.5"], drain=drain),
        default_root_dir=folder, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in chosen),
        callbacks=[*chosen, metrics], **flags,
    )  # fmt: skip
    data = loader("convnet" if isinstance(module.net[0], nn.Conv2d) else "mlp")
    trainer.fit(module, data, data, ckpt_path=load, **SAFELY)
    saved = [summary_of(callback) for callback in chosen if isinstance(callback, ModelCheckpoint)]
    return {
        "state": state_of(module),
        "steps": trainer.global_step,
        "batches": trainer.fit_loop.total_batch_idx,
        "epochs": trainer.current_epoch,
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "seen": metrics.seen,
        "lr": getattr(module, "lr", None),
        "groups": len(trainer.optimizers[0].param_groups),
        "saved": saved[0] if saved else None,
    }


def train_all(devices: int, folder: str) -> dict[str, Any]:
    return {name: train(name, devices, folder) for name in CASES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(train_all, 1, 1, str(tmp_path_factory.mktemp("alone")))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(train_all, 3, 3, str(folder), timeout=200)


@pytest.mark.parametrize("name", CASES)
def test_executions_agree(name: str, ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    expected = alone[name]
    assert all(torch.isfinite(value).all() for value in expected["state"].values())
    for rank in ranks:
        got = rank[name]
        for key in ("steps", "batches", "epochs", "groups"):
            assert got[key] == expected[key], key
        assert got["lr"] == pytest.approx(expected["lr"], rel=1e-9)
        assert got["metrics"] == pytest.approx(expected["metrics"], abs=1e-5)
        assert len(got["seen"]) == len(expected["seen"])
        for mine, theirs in zip(got["seen"], expected["seen"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        assert largest_difference(got["state"], expected["state"]) <= 1e-12
        if expected["saved"] is not None:
            saved, wanted = got["saved"], expected["saved"]
            assert (saved["best"], saved["last"], saved["top"].keys()) == (
                wanted["best"], wanted["last"], wanted["top"].keys())  # fmt: skip
            assert saved["score"] == pytest.approx(wanted["score"], abs=1e-5)
            assert saved["files"].keys() == wanted["files"].keys()
            for file, state in wanted["files"].items():
                assert largest_difference(saved["files"][file], state) <= 1e-12, file


def test_the_cases_do_what_they_are_named_for(alone: dict[str, Any]) -> None:
    batches = {name: result["batches"] + 1 for name, result in alone.items()}
    assert batches["stop in an epoch"] == 9, "three batches after it was asked for"
    assert batches["stop before the end of an epoch"] == 10, "at the end of the epoch, which comes first"
    assert batches["stop in an epoch, never drained"] == 7, "after the validation, which comes first"
    assert batches["stop after enough epochs"] == 15
    assert batches["stop after validation"] == 7
    assert batches["timer"] == 9
    assert batches["timer at the end of epochs"] == 10
    for name in ("early stopping on a training metric", "early stopping on what the end of an epoch logs"):
        assert 15 <= batches[name] < 100
    assert 0 < batches["early stopping in an epoch"] < 100
    assert alone["learning rate finder"]["lr"] != 0.01
    assert alone["fine-tuning"]["groups"] == 2
    files = {name: result["saved"]["files"] for name, result in alone.items() if result["saved"]}
    assert len(files["checkpoint on a training metric"]) == 3
    assert len(files["checkpoint every 2 steps on a training metric"]) == 3
    assert len(files["checkpoint after validations in an epoch"]) == 6
    assert {"step=4.ckpt", "step=7.ckpt", "step=10.ckpt", "last.ckpt"} <= files["checkpoint by the clock"].keys()
    assert len(files["checkpoint by the clock on a training metric"]) == 2
    if "moving average" not in alone:
        return
    averaged, last = alone["moving average"]["state"], alone["moving average"]["saved"]["files"]["epoch=2-step=15.ckpt"]
    assert largest_difference(averaged, last) == 0.0, "the checkpoint holds the average"


RESUMED = {
    "weights averaged at the end": "epoch=2-step=15.ckpt",
    "moving average": "epoch=1-step=10.ckpt",
    "fine-tuning": "epoch=1-step=10.ckpt",
}


def resume_all(devices: int, folder: str, source: str) -> dict[str, Any]:
    return {
        name: train(name, devices, folder, f"{source}/{list(CASES).index(name)}/{file}")
        for name, file in RESUMED.items()
        if name in CASES
    }


def test_callbacks_resume_with_what_all_stages_had(
    folder: Path, ranks: list[dict[str, Any]], alone: dict[str, Any], tmp_path: Path
) -> None:
    expected = run_ranks(resume_all, 1, 1, str(tmp_path / "one"), str(folder))[0]
    results = run_ranks(resume_all, 3, 3, str(tmp_path / "three"), str(folder), timeout=200)
    for name in expected:
        for result in results:
            assert result[name]["steps"] == expected[name]["steps"]
            assert result[name]["groups"] == expected[name]["groups"]
            assert largest_difference(result[name]["state"], expected[name]["state"]) <= 1e-12, name
    # The averages go on where they were, so that the resumed run ends as the whole one did.
    for name in expected.keys() - {"fine-tuning"}:
        assert largest_difference(expected[name]["state"], alone[name]["state"]) <= 1e-12, name
    assert expected["fine-tuning"]["groups"] == 2


class CallsTheModule(Callback):
    """Rank 0 runs the network outside a step, as callbacks do that plot or sample."""

    def __init__(self, hook: str) -> None:
        self.hook = hook
        self.outputs: list[Tensor] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        setattr(self, self.hook, self.call)

    def call(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            with torch.no_grad():
                self.outputs.append(pl_module(torch.ones(2, 6, dtype=torch.float64)))


def call_the_module(hook: str, devices: int) -> Any:
    warnings.simplefilter("ignore")
    module, caller = Classifier("mlp", "adam"), CallsTheModule(hook)
    trainer = quiet_trainer(devices=devices, strategy=DDGStrategy(num_stages=3), callbacks=[caller], max_epochs=1)
    trainer.fit(module, loader("mlp"), loader("mlp"))
    expected = module.net(torch.ones(2, 6, dtype=torch.float64)).detach()
    return caller.outputs, expected


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end"])
def test_the_network_outside_a_step_is_current_where_all_weights_are(hook: str) -> None:
    for outputs, expected in (call_the_module(hook, 1), run_ranks(call_the_module, 3, hook, 3)[0]):
        assert torch.equal(outputs[-1], expected)


def test_the_network_outside_a_step_is_an_error_elsewhere() -> None:
    results = run_ranks_raw(call_the_module, 3, "on_train_batch_end", 3)
    message = "current weights of stage 1 .Linear. live in another process until the fit ends. Call it in `valid"
    assert re.search(message, str(results[0].error)), results[0].error
    assert all(result.error is not None for result in results)


def test_the_network_is_current_before_the_first_step_and_after_the_last() -> None:
    for hook in ("on_train_start", "on_fit_end"):
        (outputs, expected), *_ = run_ranks(call_the_module, 3, hook, 3)
        assert len(outputs) == 1
        assert torch.equal(outputs[0], expected) == (hook == "on_fit_end")


class FailsOnOneRank(Rated):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and self.global_rank == 1:
            raise OSError("the disk is full")


def find_a_rate_and_fail(folder: str) -> None:
    warnings.simplefilter("ignore")
    finder = LearningRateFinder(num_training_steps=20)
    trainer = quiet_trainer(devices=2, strategy="ddg", callbacks=[finder], default_root_dir=folder)
    trainer.fit(FailsOnOneRank(), loader("mlp"))


def test_a_failure_while_a_learning_rate_is_sought_ends_all_ranks(tmp_path: Path) -> None:
    """The finder restores its checkpoint first, and waits for all ranks then."""
    for result in run_ranks_raw(find_a_rate_and_fail, 2, str(tmp_path), timeout=60):
        assert "the disk is full" in str(result.error)
    assert list(tmp_path.glob(".lr_find*")) == []


class Writer(BasePredictionWriter):
    """Notes which samples each batch is said to hold."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[Any] = []
        self.epochs: list[Any] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, *args: Any) -> None:
        self.batches.append((list(batch_indices), prediction.tolist()))

    def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epochs.append(batch_indices)


class Predicting(Classifier):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0]).argmax(dim=1)


def predict(devices: int) -> Any:
    warnings.simplefilter("error", category=UserWarning)
    for harmless in (".*num_workers.*", ".*deprecated.*", ".*srun.*"):
        warnings.filterwarnings("ignore", message=harmless)
    module, writer = Predicting("mlp"), Writer()
    trainer = quiet_trainer(devices=devices, strategy=DDGStrategy(num_stages=2), callbacks=[writer])
    trainer.predict(module, [loader("mlp"), loader("mlp", 8)], return_predictions=False)
    trainer.predict(module, loader("mlp", 3), return_predictions=False)
    return writer.batches, writer.epochs


def test_a_writer_of_predictions_is_told_the_samples_on_every_rank() -> None:
    alone = predict(1)
    batches, epochs = alone
    assert [indices for indices, _ in batches[:2]] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert epochs[0][1] == [[0, 1, 2, 3, 4], [5, 6, 7]]
    assert len(batches) == 5 + 2 + 1
    for got in run_ranks(predict, 2, 2):
        assert got == alone


def display(devices: int, folder: str) -> str:
    warnings.simplefilter("ignore")
    text = io.StringIO()
    bars: list[list[Callback]] = [
        [TQDMProgressBar(), ModelSummary(), DeviceStatsMonitor(), LearningRateMonitor(log_momentum=True)],
        [RichProgressBar(), RichModelSummary(max_depth=2)],
    ]
    with redirect_stdout(text):
        for number, callbacks in enumerate(bars):
            trainer = quiet_trainer(
                devices=devices, strategy=DDGStrategy(num_stages=2, split_points=["net.3"]), callbacks=callbacks,
                logger=CSVLogger(folder, f"logs{number}", ""), log_every_n_steps=1, max_epochs=2,
                enable_progress_bar=True, enable_model_summary=True,
            )  # fmt: skip
            trainer.fit(Rated(), loader("mlp"), loader("mlp"))
    return text.getvalue()


def test_displays_show_the_whole_network_on_rank_zero(tmp_path: Path) -> None:
    shown, other = run_ranks(display, 2, 2, str(tmp_path))
    alone = display(1, str(tmp_path / "alone"))
    for text in (shown, alone):
        assert text.count("Trainable params") == 1, "the rich summary"
        assert "net.6" in text
        assert "Epoch 1/1" in text
    assert "net.6" not in other
    assert "Epoch" not in other
    for folder in (tmp_path, tmp_path / "alone"):
        header = (folder / "logs0" / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"lr-SGD", "lr-SGD-momentum", "train_loss_step", "from_epoch_end", "val_loss"} <= set(header)
        assert any(name.startswith("DeviceStatsMonitor") for name in header)


REFUSED: dict[str, tuple[Callable[[], Callback], str]] = {
    "ModelPruning": (
        lambda: ModelPruning("l1_unstructured", amount=0.5),
        r"ModelPruning replaces parameters.*Prune after the fit, or train in one process \(devices=1\)",
    ),
}


def attempt(name: str) -> str:
    warnings.simplefilter("ignore")
    trainer = quiet_trainer(devices=2, strategy="ddg", callbacks=[REFUSED[name][0]()], enable_checkpointing=True)
    try:
        trainer.fit(Classifier(), loader("mlp"))
    except ValueError as error:
        return str(error)
    return "accepted"


def attempt_all(folder: str) -> dict[str, str]:
    os.chdir(folder)
    return {name: attempt(name) for name in REFUSED}


def test_what_one_rank_cannot_serve_is_refused(tmp_path: Path) -> None:
    for result in run_ranks(attempt_all, 2, str(tmp_path)):
        for name, (_, message) in REFUSED.items():
            assert re.search(message, result[name]), result[name]


class Breaks(Classifier):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise OSError("the disk is full")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [lambda: ModelCheckpoint(save_on_exception=True), lambda: OnExceptionCheckpoint(".")])
def test_one_process_saves_on_an_exception(
    make: Callable[[], Callback], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OnExceptionCheckpoint, "teardown", lambda *args, **kwargs: None)
    trainer = quiet_trainer(
        devices=1, strategy=DDGStrategy(2), callbacks=[make()], enable_checkpointing=True, default_root_dir=tmp_path
    )
    with pytest.raises(OSError, match="the disk is full"):
        trainer.fit(Breaks(), loader("mlp"))
    (file,) = tmp_path.rglob("*.ckpt")
    assert torch.load(file, weights_only=True)["global_step"] == 3


class FailsOnRankOne(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 4:
            raise OSError("the disk is full")


def fail_and_want_to_save(folder: str) -> tuple[str, list[str]]:
    """The error of a rank, and what it warns of."""
    os.chdir(folder)
    callbacks = [ModelCheckpoint(save_on_exception=True), OnExceptionCheckpoint("."), FailsOnRankOne()]
    trainer = quiet_trainer(devices=2, strategy="ddg", callbacks=callbacks, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(Classifier(), loader("mlp"))
        except (OSError, RuntimeError) as error:
            return str(error), [str(entry.message) for entry in caught]
    return "trained", []


def test_an_error_on_one_rank_is_not_followed_by_a_checkpoint_that_says_so(tmp_path: Path) -> None:
    results = run_ranks(fail_and_want_to_save, 2, str(tmp_path))
    for error, _ in results:
        assert "the disk is full" in error
    warned = results[0][1]
    assert any(re.search("No checkpoint is saved on PeerError.*every_n_train_steps", text) for text in warned), warned
    assert list(tmp_path.rglob("*.ckpt")) == []
