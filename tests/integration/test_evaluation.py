"""Evaluation, prediction, metrics and the callbacks that monitor them, on every rank of real processes."""

from __future__ import annotations

import csv
import logging
import warnings
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero
from torch import Tensor, nn
from torchmetrics import Accuracy, MetricCollection, SumMetric

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.networks import SAFELY, Classifier, dataset, largest_difference, loader, quiet_trainer, state_of


class Measured(Classifier):
    """torchmetrics in all steps, a head outside the network, and outputs collected for the end of the epoch."""

    def __init__(self) -> None:
        super().__init__("convnet", "nesterov")
        self.head = nn.Linear(3, 3).double()
        self.train_acc = Accuracy("multiclass", num_classes=3)
        self.val_metrics = MetricCollection({"val_acc": Accuracy("multiclass", num_classes=3)})
        self.test_acc = Accuracy("multiclass", num_classes=3)
        self.outputs: list[Tensor] = []
        self.concatenated: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.head(self(x))
        self.train_acc(logits, y)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("train_loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.head(self(x))
        self.val_metrics(logits, y)
        self.log_dict(self.val_metrics)
        self.log("val_loss", nn.functional.cross_entropy(logits, y), sync_dist=True)
        self.outputs.append(logits)

    def on_validation_epoch_end(self) -> None:
        self.concatenated.append(torch.cat(self.outputs))
        self.outputs.clear()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.test_acc(self.head(self(x)), y)
        self.log("test_acc", self.test_acc)


def everything(folder: str, devices: int) -> dict[str, Any]:
    warnings.simplefilter("error", category=UserWarning)
    for message in (
        ".*num_workers.*",
        ".*Checkpoint directory.*",
        ".*deprecated.*",
        ".*lr_scheduler.step.*",
        ".*exists.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    torch.manual_seed(0)
    module = Measured()
    best = ModelCheckpoint(folder, "best", monitor="val_loss", save_last=True)
    stop = EarlyStopping("val_acc", mode="max", patience=2)
    stop_on_training = EarlyStopping("train_acc", mode="max", patience=50)
    strategy = DDGStrategy(num_stages=3, split_points=["net.3", "net.7"])
    trainer = quiet_trainer(
        devices=devices, strategy=strategy, max_epochs=6, logger=CSVLogger(folder, "logs", ""), log_every_n_steps=1,
        callbacks=[best, stop, stop_on_training, LearningRateMonitor("step")], enable_checkpointing=True,
    )  # fmt: skip
    data = loader("convnet")
    trainer.fit(module, data, data)
    result = {
        "fit": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "best": Path(best.best_model_path).name,
        "score": float(best.best_model_score),
        "concatenated": [tensor.tolist() for tensor in module.concatenated],
        "metrics_restored": module.test_acc.distributed_available_fn is not None
        and module.test_acc.distributed_available_fn.__name__ != "_never_distributed",
    }
    result["validate"] = trainer.validate(module, data, verbose=False)
    result["test"] = trainer.test(module, data, ckpt_path="best", verbose=False, **SAFELY)
    result["predict"] = [batch.tolist() for batch in trainer.predict(module, data) or []]
    with torch.no_grad():
        module.eval()
        module.cpu()
        result["own_predict"] = [module(x).argmax(dim=1).tolist() for x, _ in data]
    return result


def test_metrics_monitors_and_predictions_agree_on_all_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(everything, 3, str(tmp_path / "ranks"), 3)
    alone = run_ranks(everything, 1, str(tmp_path / "alone"), 1)[0]
    for rank in ranks:
        assert rank["fit"].keys() >= {"train_loss", "train_loss_epoch", "train_acc", "val_loss", "val_acc"}
        assert rank["fit"] == ranks[0]["fit"]
        assert rank["steps"] == ranks[0]["steps"] == alone["steps"]
        assert rank["epochs"] == alone["epochs"]
        assert rank["best"] == "best.ckpt"
        assert rank["predict"] == rank["own_predict"] == alone["predict"]
        assert len(rank["predict"]) == 5
        assert sum(map(len, rank["predict"])) == len(dataset("convnet"))
        assert rank["test"] == ranks[0]["test"]
        assert rank["validate"] == ranks[0]["validate"]
        assert rank["concatenated"] == ranks[0]["concatenated"]
        assert rank["metrics_restored"]
    for name, value in alone["fit"].items():
        assert abs(ranks[0]["fit"][name] - value) < 1e-6, name
    assert abs(ranks[0]["test"][0]["test_acc"] - alone["test"][0]["test_acc"]) < 1e-6
    assert abs(ranks[0]["score"] - alone["score"]) < 1e-6

    with open(tmp_path / "ranks" / "logs" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"train_loss_step", "train_acc", "val_loss", "val_acc", "lr-SGD"} <= rows[0].keys()
    losses = [row["train_loss_step"] for row in rows if row["train_loss_step"]]
    assert len(losses) == ranks[0]["steps"]


def validate_twice_an_epoch() -> Any:
    warnings.simplefilter("ignore")
    module = Classifier("mlp", "adam")
    stop = EarlyStopping("val_loss", patience=1, min_delta=10.0)
    trainer = quiet_trainer(devices=2, strategy="ddg", val_check_interval=0.4, callbacks=[stop], max_epochs=9)
    trainer.fit(module, loader("mlp"), [loader("mlp", 7)])
    return trainer.global_step, stop.stopped_epoch, float(trainer.callback_metrics["val_loss"])


def test_validation_inside_an_epoch() -> None:
    first, second = run_ranks(validate_twice_an_epoch, 2)
    assert first == second
    assert first[0] < 45


def evaluate_without_fit() -> Any:
    warnings.simplefilter("ignore")
    module = Classifier("mlp")
    trainer = quiet_trainer(devices=2, strategy="ddg")
    (result,) = trainer.test(module, loader("mlp"), verbose=False)
    x, y = dataset("mlp").tensors
    expected = nn.functional.cross_entropy(module.net(x), y)
    return result["test_loss"], float(expected), trainer.strategy.stage_parameter_names


def test_evaluation_without_a_fit() -> None:
    for got, expected, names in run_ranks(evaluate_without_fit, 2):
        assert abs(got - expected) < 1e-12
        assert len(names) == 2


class NotesTheCut(pl.Callback):
    """Notes by what the network was cut, and where, while there is a run."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[str]]] = []

    def note(self, trainer: pl.Trainer) -> None:
        run = trainer.strategy.run  # type: ignore[attr-defined]
        self.seen.append((run.cut.costs.unit, run.cut.split_points))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note(trainer)


def test_a_fit_after_an_evaluation_measures_its_cut() -> None:
    cuts = NotesTheCut()
    trainer = quiet_trainer(strategy=DDGStrategy(), devices=1, max_epochs=1, callbacks=[cuts])
    module = Classifier("mlp")
    trainer.validate(module, loader("mlp"), verbose=False)
    trainer.fit(module, loader("mlp"))
    trainer.validate(module, loader("mlp"), verbose=False)
    evaluated, fitted, again = cuts.seen
    assert evaluated[0] == "parameters"
    assert fitted[0] == "measured time"
    assert again[1] == fitted[1], "a cut that was trained with is used again"


class MonteCarlo(Classifier):
    """Leaves dropout on and calls the network several times, as Monte Carlo dropout does."""

    def __init__(self) -> None:
        super().__init__("mlp")
        self.net.insert(2, nn.Dropout(0.5))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net.train()
        return torch.stack([self.net(batch[0]) for _ in range(4)])


def predict_twice(devices: int) -> list[Tensor]:
    warnings.simplefilter("ignore")
    pl.seed_everything(3)
    trainer = quiet_trainer(devices=devices, strategy=DDGStrategy(num_stages=2, split_points=["net.3"]))
    data = loader("mlp", 8, 4)
    return [torch.cat(trainer.predict(MonteCarlo(), data), 1) for _ in range(2)]  # type: ignore[arg-type]


def test_every_call_in_an_evaluation_draws_anew_and_alike_in_all_executions() -> None:
    first, second = predict_twice(1)
    draws = [*first, *second]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    for rank in run_ranks(predict_twice, 2, 2):
        torch.testing.assert_close(rank, [first, second], rtol=0, atol=1e-12)


def fit_then_anything(devices: int) -> Any:
    """One script, one module: every command of a Trainer, then one without the strategy, then with it again."""
    warnings.simplefilter("ignore")
    module, data = Classifier("convnet", "nesterov"), loader("convnet")

    def trainer(strategy: Any, number: int) -> pl.Trainer:
        return quiet_trainer(max_epochs=2, strategy=strategy, devices=number)

    first = trainer(DDGStrategy(2, ["net.4"]), devices)
    first.fit(module, data, data)
    trained = state_of(module)
    found: list[Any] = [first.validate(module, data, verbose=False), first.test(module, data, verbose=False)]
    found.append(torch.cat(first.predict(module, data)))  # type: ignore[arg-type]
    kept = state_of(module)
    second = trainer("auto", 1)
    second.fit(module, data, data)
    alone = state_of(module)
    found.append(second.test(module, data, verbose=False))
    third = trainer(DDGStrategy(2, ["net.4"]), devices)
    third.fit(module, data, data)
    return trained, kept, alone, state_of(module), found


def test_a_fit_then_anything() -> None:
    (expected,) = run_ranks(fit_then_anything, 1, 1)
    *states, found = expected
    assert largest_difference(states[0], states[1]) == 0.0, "evaluation changes no weights"
    assert min(largest_difference(a, b) for a, b in pairwise(states[1:])) > 1e-3, "each fit changes them"
    for result in run_ranks(fit_then_anything, 2, 2):
        for ours, theirs in zip(result[:-1], states, strict=True):
            assert largest_difference(ours, theirs) <= 1e-12
        for ours, theirs in zip(result[-1], found, strict=True):
            if isinstance(ours, torch.Tensor):
                assert torch.equal(ours, theirs)
            else:
                assert ours[0] == pytest.approx(theirs[0], rel=1e-9)


class Counts(Classifier):
    """Metrics of all kinds, whose values user code asks for after the run."""

    def __init__(self) -> None:
        super().__init__("mlp")
        self.seen, self.listed = SumMetric(), [SumMetric()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.listed[0].update(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen.update(len(batch[0]))


def metrics_after(devices: int) -> list[float]:
    warnings.simplefilter("ignore")
    module, found = Counts(), []
    trainer = quiet_trainer(devices=devices, strategy=DDGStrategy(2, ["net.3"]), max_epochs=1)
    trainer.fit(module, loader("mlp"))
    # One rank alone may ask.
    found.append(float(module.listed[0].compute()) if trainer.is_global_zero else -1.0)
    trainer.validate(module, loader("mlp"), verbose=False)
    found.append(float(module.seen.compute()))
    later = SumMetric()
    later.update(1.0)
    found.append(float(later.compute()))
    if devices == 2:
        # Where the data is spread over the processes, the same module counts all of it.
        module.seen.reset()
        quiet_trainer(devices=2, strategy=DDPStrategy()).validate(module, loader("mlp"), verbose=False)
        found.append(float(module.seen.compute()))
    return found


def test_metrics_after_a_run_are_each_ranks_own_until_data_is_spread() -> None:
    (alone,) = run_ranks(metrics_after, 1, 1)
    assert alone[1:] == [22.0, 1.0]
    last, first = run_ranks(metrics_after, 2, 2)
    assert last == pytest.approx([*alone, 22.0], rel=1e-6), "of which each process of DDP has seen 11"
    assert first == [-1.0, *last[1:]]


class Bare(pl.LightningModule):
    """No parameters at all."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("value", self.value(batch[0]) + torch.rand(()) * 0)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.value(batch[0])

    def value(self, x: Tensor) -> Tensor:
        return x.mean()


class WithoutWeights(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Tanh(), nn.ReLU())

    def value(self, x: Tensor) -> Tensor:
        return self.net(x).mean()  # type: ignore[no-any-return]


class Forward(WithoutWeights):
    def forward(self, x: Tensor) -> Tensor:
        return super().value(x)

    def value(self, x: Tensor) -> Tensor:
        return self(x)  # type: ignore[no-any-return]


class Buffers(WithoutWeights):
    def __init__(self) -> None:
        super().__init__()
        # Without a seed, each process makes its own.
        self.net = nn.Sequential(nn.BatchNorm1d(6, affine=False).double())


class ByHand(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


BARE = (Bare, WithoutWeights, Forward, Buffers, ByHand)


def evaluated(devices: int, strategy: str) -> list[Any]:
    found: list[Any] = []
    for number, kind in enumerate(BARE):
        points = ["net.1"] if number % 2 else None
        given = DDGStrategy(2, points) if strategy == "ddg" else "auto"
        trainer = quiet_trainer(devices=devices, strategy=given)
        module = kind()
        found += trainer.validate(module, loader("mlp"), verbose=False)
        found += trainer.test(module, loader("mlp"), verbose=False)
        found.append([float(value) for value in trainer.predict(module, loader("mlp"))])  # type: ignore[arg-type]
    return found


def test_what_has_no_parameters_is_evaluated_as_by_plain_lightning() -> None:
    plain = evaluated(1, "auto")
    assert evaluated(1, "ddg") == plain
    assert run_ranks(evaluated, 2, 2, "ddg") == [plain, plain]


def test_what_has_no_parameters_is_not_trained() -> None:
    class Fits(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    with pytest.raises((TypeError, ValueError), match="there is nothing to cut"):
        quiet_trainer(devices=1, strategy=DDGStrategy(2)).fit(Fits(), loader("mlp"))


# Not an attribute of the network, which would then have kept something of the batch.
SIZES: SimpleQueue[int] = SimpleQueue()


class Sized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            SIZES.put(len(x))
        return x


class Mixed(nn.Module):
    """What a sample gives goes by the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Evaluated(pl.LightningModule):
    def __init__(self, mixes: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 3)]
        self.net = nn.Sequential(*layers, *([Mixed()] if mixes else []), Sized()).double()
        self.seen = SumMetric()
        self.sizes: list[int] = []

    def step(self, batch: Any) -> Tensor:
        logits = self.net(batch[0])
        self.sizes.append(len(logits))
        return nn.functional.cross_entropy(logits, batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen(len(batch[0]))
        self.log("seen", self.seen)
        self.log("val_loss", self.step(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.step(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits: Tensor = self.net(batch[0])
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def evaluate_in_parts(devices: int, mixes: bool, parts: Any) -> Any:
    warnings.simplefilter("ignore")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(rank_zero.__name__).addHandler(handler)
    data = loader("mlp", count=36, batch_size=12)
    strategy: Any = "auto"
    if devices > 1:
        strategy = DDGStrategy(split_points=["net.3", "net.5"][: devices - 1], eval_micro_batches=parts)
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=1, num_sanity_val_steps=0)
    module = Evaluated(mixes)
    found: list[Any] = [trainer.validate(module, data, verbose=False)]
    trainer.fit(module, data, data)
    found += [dict(trainer.callback_metrics), trainer.test(module, data, verbose=False)]
    found.append(trainer.predict(module, data))
    sizes = []
    while not SIZES.empty():
        sizes.append(SIZES.get())
    return found, sizes, module.sizes, [text for text in said if "whole" in text]


@pytest.mark.parametrize("mixes", [False, True])
def test_evaluation_in_micro_batches_gives_what_whole_batches_give(mixes: bool) -> None:
    whole = run_ranks(evaluate_in_parts, 2, 2, mixes, 1)
    parts = run_ranks(evaluate_in_parts, 2, 2, mixes, "auto")
    assert whole[1][1] == [], "the first stage does not run the last layers"
    for one, other in zip(whole, parts, strict=True):
        for first, second in zip(one[0], other[0], strict=True):
            torch.testing.assert_close(first, second, rtol=0.0, atol=1e-12)
        assert one[2] == other[2], "the step sees whole batches"
    evaluated = [12] * 12
    assert whole[0][1] == evaluated
    cut = [2, 2, 2, 2, 1, 1, 1, 1]
    if mixes:
        assert parts[0][1] == [12, *cut, 12, 12] * 4
        assert len(parts[0][3]) == 4
        assert "the output of a sample goes by the other samples of its batch" in parts[0][3][0]
    else:
        # Whole and in parts for the first and the second of a run.
        assert parts[0][1] == [12, *cut, 12, *cut, *cut] * 4
        assert parts[0][3] == []
