"""Of a batch in micro-batches Lightning and the user see one step: logs, hooks, counters, outputs, checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import Accuracy, MeanMetric

from lightning_ddg import DDGMonitor, DDGStrategy
from lightning_ddg.core.execution import InFlight, Observer
from tests import reference
from tests.harness import run_ranks, run_ranks_raw
from tests.integration.test_exact import STARTS
from tests.networks import (
    OPTIMIZERS,
    SAFELY,
    Classifier,
    ManualClassifier,
    dataset,
    largest_difference,
    loader,
    quiet_trainer,
    seeded_network,
    state_of,
)


def strategy(num_stages: int, micro: Any = 3, **options: Any) -> DDGStrategy:
    return DDGStrategy(num_stages, [f"net.{n}" for n in STARTS[num_stages]], micro_batches=micro, **options)


class Memory(Logger):
    """Keeps what is logged, by step."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))


class Logs(Classifier):
    """Logs in every form, without learning anything: so that each step can be compared with the whole batch's."""

    def __init__(self) -> None:
        super().__init__("mlp", "sgd", step_lr=False)
        self.accuracy = Accuracy("multiclass", num_classes=3)
        self.mean = MeanMetric()
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x)
        losses = nn.functional.cross_entropy(logits, y, reduction="none")
        self.log("loss", losses.mean(), on_step=True, on_epoch=True, prog_bar=True)
        self.log("named", losses.mean(), on_step=True, on_epoch=True, batch_size=len(x))
        self.log("sum", losses.sum(), reduce_fx="sum", on_step=True, on_epoch=True)
        self.log("largest", losses.max(), reduce_fx=torch.max, on_step=True, on_epoch=True)
        self.log_dict({"index": float(batch_idx), "count": batch_idx}, on_step=True)
        for part in (1.0, 3.0):
            self.log("twice", losses.mean() * part, on_epoch=True)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.mean.update(losses.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return {"loss": losses.mean(), "logits": logits, "parts": (losses.mean(), "same")}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((outputs["logits"].detach(), outputs["loss"], outputs["parts"], len(batch[0]), batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def logged(devices: int, micro: int) -> tuple[list[Any], list[Any], dict[str, float]]:
    warnings.simplefilter("ignore")
    module, memory = Logs(), Memory()
    chosen: Any = "auto" if micro == 0 else strategy(3, micro)
    trainer = quiet_trainer(devices=devices, strategy=chosen, logger=[memory], log_every_n_steps=1, max_epochs=2)
    trainer.fit(module, loader("mlp"))
    progress = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
    return memory.rows, module.seen if trainer.is_global_zero else [], progress


def check_logged(got: tuple[list[Any], list[Any], dict[str, float]], plain: Any) -> None:
    (rows, seen, progress), (plain_rows, plain_seen, plain_progress) = got, plain
    assert [(step, row.keys()) for step, row in rows] == [(step, row.keys()) for step, row in plain_rows]
    for (_, row), (_, wanted) in zip(rows, plain_rows, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)
    assert progress == pytest.approx(plain_progress, rel=1e-6)
    for (logits, loss, (part, same), size, index), wanted in zip(seen, plain_seen, strict=True):
        assert torch.allclose(logits, wanted[0])
        assert torch.allclose(loss, wanted[1])
        assert torch.allclose(part, wanted[2][0])
        assert (same, size, index) == ("same", *wanted[3:])


def test_logs_and_outputs_are_those_of_the_whole_batch() -> None:
    plain = logged(1, 0)
    assert len(plain[1]) == 10
    for micro in (2, 3):
        check_logged(logged(1, micro), plain)
    check_logged(run_ranks(logged, 3, 3, 3)[0], plain)


class Hooked(Classifier):
    """Notes the hooks of a batch, and the counters."""

    def __init__(self) -> None:
        super().__init__("mlp", "sgd")
        self.calls: list[str] = []

    def note(self, name: str) -> None:
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.calls.append(f"{name} {self.trainer.global_step} {lr:.4f}")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps = [*getattr(self, "steps", []), (batch_idx, len(batch[0]))]
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, *_: Any) -> None:
        self.note("start")

    def on_before_zero_grad(self, *_: Any) -> None:
        self.note("zero")

    def on_before_backward(self, *_: Any) -> None:
        self.note("before backward")

    def on_after_backward(self) -> None:
        self.note("after backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.note("step")

    def on_train_batch_end(self, *_: Any) -> None:
        self.note("end")


def hooks(devices: int, micro: int, accumulate: int = 1) -> tuple[list[str], list[Any], int]:
    warnings.simplefilter("ignore")
    module = Hooked()
    chosen: Any = "auto" if micro == 0 else strategy(2, micro, drain="never")
    trainer = quiet_trainer(devices=devices, strategy=chosen, accumulate_grad_batches=accumulate, max_epochs=2)
    trainer.fit(module, loader("mlp"))
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    return module.calls, module.steps if trainer.is_global_zero else [], trainer.global_step + batches


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_and_counters_are_those_of_one_step(accumulate: int) -> None:
    calls, _, counters = hooks(1, 0, accumulate)
    alone = hooks(1, 3, accumulate)
    others = run_ranks(hooks, 2, 2, 3, accumulate)
    for got in (alone, *others):
        assert got[0] == calls
        assert got[2] == counters
    # The proof's come first. Then the micro-batches of 5 samples, and at an epoch's end of 2.
    steps = alone[1][3:] if len(alone[1]) > 28 else alone[1]
    epoch = [(index, size) for index in range(4) for size in (2, 2, 1)] + [(4, 1), (4, 1)]
    assert steps == epoch * 2
    assert others[0][1] == alone[1]


# ---- steps that return None


class Skips(Classifier):
    """Has no loss where the first sample's first value is below a limit: of a micro-batch, or of all."""

    limit, by_zero, before = 0.0, False, False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        skips = bool(batch[0][0, 0] < self.limit)
        if skips and self.before:
            return None
        loss = super().training_step(batch, batch_idx)
        if skips:
            return loss * 0 if self.by_zero else None
        return loss


class SkipsByZero(Skips):
    by_zero = True


class SkipsBefore(Skips):
    before = True


class SkipsAll(Skips):
    """All but the batches that follow from their index."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in (1, 2) else Classifier.training_step(self, batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert not self.trainer.is_global_zero or ("loss" in outputs) == (batch_idx not in (1, 2))


def fit_skipping(devices: int, accumulate: int = 1) -> list[dict[str, Tensor]]:
    warnings.simplefilter("ignore")
    states = []
    for make in (SkipsByZero, Skips, SkipsBefore):
        module = make("mlp", "sgd")
        trainer = quiet_trainer(devices=devices, strategy=strategy(3), accumulate_grad_batches=accumulate, max_epochs=2)
        trainer.fit(module, loader("mlp"))
        states.append(state_of(module))
    return states


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_micro_batch_without_a_loss_adds_nothing(accumulate: int) -> None:
    zero, *others = fit_skipping(1, accumulate)
    assert largest_difference(zero, state_of(Classifier("mlp"))) > 1e-3
    for got in others:
        assert largest_difference(got, zero) <= 1e-12
    for states in run_ranks(fit_skipping, 3, 3, accumulate):
        assert all(largest_difference(got, zero) <= 1e-12 for got in states)


def fit_skipping_batches(devices: int) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    module = SkipsAll("mlp", "adam")
    quiet_trainer(devices=devices, strategy=strategy(3), max_epochs=2).fit(module, loader("mlp"))
    return state_of(module)


def test_a_batch_without_any_loss_is_skipped() -> None:
    net = seeded_network("mlp")
    assert isinstance(net, nn.Sequential)
    scheduler = lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.8)  # noqa: E731
    stages, batches = reference.flat_stages(net, STARTS[3]), [list(loader("mlp"))] * 2
    reference.train(net, stages, batches, OPTIMIZERS["adam"], scheduler, "epoch", {1, 2, 6, 7}, micro_batches=3)
    wanted = {f"net.{name}": tensor for name, tensor in state_of(net).items()}
    assert largest_difference(fit_skipping_batches(1), wanted) == 0.0
    for got in run_ranks(fit_skipping_batches, 3, 3):
        assert largest_difference(got, wanted) <= 1e-12


# ---- delays, checkpoints


class Ages(Observer):
    """How many steps lie between the forward of a micro-batch and the step that applies its gradient."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer, self.most = trainer, 0
        self.forwards: dict[int, list[int]] = {}

    def in_flight(self, stage: int, batches: InFlight) -> None:
        ages = self.forwards.setdefault(stage, [])
        ages.append(self.trainer.global_step)
        if len(batches) > batches.delay:
            self.most = max(self.most, self.trainer.global_step - ages[-1 - batches.delay])


class Aged(Classifier):
    def on_train_start(self) -> None:
        self.ages = Ages(self.trainer)
        self.trainer.strategy.run.observers.subscribe(self.ages)  # type: ignore[attr-defined]


def oldest(devices: int, num_stages: int, micro: Any) -> int:
    warnings.simplefilter("ignore")
    module = Aged("mlp")
    quiet_trainer(devices=devices, strategy=strategy(num_stages, micro), max_epochs=1).fit(module, loader("mlp", 60, 6))
    return module.ages.most


def oldest_of_all(num_stages: int) -> list[int]:
    return [oldest(num_stages, num_stages, micro) for micro in (1, 2, 3, 4, "auto")]


@pytest.mark.parametrize("num_stages", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_the_delay_in_updates_is_bounded(num_stages: int) -> None:
    wanted = [-(-(num_stages - 1) // micro) for micro in (1, 2, 3, 4)] + [1]
    assert [oldest(1, num_stages, micro) for micro in (1, 2, 3, 4, "auto")] == wanted
    ranks = run_ranks(oldest_of_all, num_stages, num_stages)
    assert [max(ages) for ages in zip(*ranks, strict=True)] == wanted


def resume(devices: int, folder: str, drain: str) -> list[dict[str, Tensor]]:
    warnings.simplefilter("ignore")
    states: list[dict[str, Tensor]] = []
    for first in (3, 1):
        pl.seed_everything(4)
        module = Classifier("dropout_mlp", "adam")
        trainer = quiet_trainer(devices=devices, strategy=strategy(3, "auto", drain=drain), max_epochs=first)
        trainer.fit(module, loader("dropout_mlp"))
        if first == 1:
            path = str(Path(folder) / "one.ckpt")
            trainer.save_checkpoint(path)
            module = Classifier("dropout_mlp", "adam")
            trainer = quiet_trainer(devices=devices, strategy=strategy(3, "auto", drain=drain), max_epochs=3)
            trainer.fit(module, loader("dropout_mlp"), ckpt_path=path, **SAFELY)
        states.append(state_of(module))
    return states


def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = resume(1, str(tmp_path), "epoch")
    assert largest_difference(whole, resumed) == 0.0
    for states in run_ranks(resume, 3, 3, str(tmp_path), "epoch"):
        assert largest_difference(states[0], states[1]) == 0.0
        assert largest_difference(states[0], whole) <= 1e-12


# ---- what is refused, and warned of


class WithNorms(Classifier):
    def __init__(self) -> None:
        super().__init__("convnet")


def caught_in(module: pl.LightningModule, points: list[str], micro: Any) -> list[str]:
    chosen = DDGStrategy(len(points) + 1, points, micro_batches=micro)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(devices=1, strategy=chosen, max_epochs=1, limit_train_batches=2).fit(module, loader("convnet"))
    return [str(one.message) for one in caught if "BatchNorm" in str(one.message)]


def test_batchnorm_is_warned_of_once_and_by_name() -> None:
    (message,) = caught_in(Classifier("convnet"), ["net.3", "net.8"], 2)
    assert "micro_batches=2: BatchNorm normalises each micro-batch by itself" in message
    assert "'net.1', 'net.4'" in message
    assert caught_in(Classifier("convnet"), ["net.3", "net.8"], 1) == []
    assert caught_in(Classifier("convnet"), ["net.3"], "auto") == [], "two stages need no micro-batches"


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many", None])
def test_a_number_of_micro_batches_is_positive(value: Any) -> None:
    with pytest.raises(ValueError, match="is not a number of micro-batches. Use a positive integer or 'auto'"):
        DDGStrategy(micro_batches=value)


def test_manual_optimization_is_refused() -> None:
    with pytest.raises(ValueError, match="ManualClassifier steps by itself .*Leave micro_batches out"):
        quiet_trainer(devices=1, strategy=strategy(3)).fit(ManualClassifier("mlp"), loader("mlp"))
    quiet_trainer(devices=1, strategy=strategy(2, "auto"), max_epochs=1).fit(ManualClassifier("mlp"), loader("mlp"))


class Fetches(Classifier):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


def test_a_step_that_fetches_its_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="`Fetches.training_step` fetches its own"):
        quiet_trainer(devices=1, strategy=strategy(3)).fit(Fetches("mlp"), loader("mlp"))


class Weighted(Classifier):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [*batch, torch.ones(3, dtype=torch.float64)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, weight = batch
        return nn.functional.cross_entropy(self(x), y, weight)


def fit_weighted(devices: int) -> None:
    quiet_trainer(devices=devices, strategy=strategy(2, 2), max_epochs=1).fit(Weighted("mlp"), loader("mlp"))


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    message = "batch[0] of shape (5, 6), has 5 samples, but the first dimension of batch[2] of shape (3,) is another"
    for devices in (1, 2):
        for result in run_ranks_raw(fit_weighted, devices, devices):
            assert result.error is not None
        assert message in "".join(result.error or "" for result in run_ranks_raw(fit_weighted, devices, devices))


class Counts(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "right": torch.tensor(3)}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...


def test_outputs_that_cannot_be_joined_are_refused_where_somebody_looks() -> None:
    with pytest.raises(ValueError, match=r"output\['right'\] \(tensors of torch.int64"):
        quiet_trainer(devices=1, strategy=strategy(3)).fit(Counts("mlp"), loader("mlp"))


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class Sharp(Classifier):
    def configure_optimizers(self) -> Any:
        return Twice(self.parameters(), lr=0.1)


def test_an_optimizer_that_runs_the_step_twice_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"Twice runs the training step a second time for the same batch \(number 0\)"
    ):
        quiet_trainer(devices=1, strategy=strategy(3)).fit(Sharp("mlp"), loader("mlp"))


class InPlace(Classifier):
    """Changes its batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


def fit_in_place(devices: int, micro: int) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    module = InPlace("mlp")
    quiet_trainer(devices=devices, strategy=strategy(3, micro), max_epochs=2).fit(module, DataLoader(copied(), 6))
    return state_of(module)


def copied() -> TensorDataset:
    return dataset("mlp", 12)


def test_a_step_may_change_its_micro_batch_in_place() -> None:
    alone = fit_in_place(1, 3)
    for got in run_ranks(fit_in_place, 3, 3, 3):
        assert largest_difference(got, alone) <= 1e-12


# ---- losses that are no mean over samples


class Sum(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * len(batch[0])


class NoisySum(Sum):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)


@pytest.mark.parametrize(
    ("make", "micro", "warned"), [(Sum, 3, True), (Sum, 1, False), (Classifier, 3, False), (NoisySum, 3, False)]
)
def test_a_loss_that_is_no_mean_is_warned_of(make: type[Classifier], micro: int, warned: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(devices=1, strategy=strategy(3, micro), max_epochs=1).fit(make("mlp"), loader("mlp"))
    found = [str(one.message) for one in caught if "mean of its micro-batches" in str(one.message)]
    assert len(found) == warned
    if warned:
        assert "micro_batches=3: the loss of the first batch is" in found[0]
        assert "Make it one (not a sum)" in found[0]


class Carries(Classifier):
    """A hidden state from one step for the next."""

    def __init__(self) -> None:
        super().__init__("mlp")
        self.before: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x) + (0 if self.before is None else self.before.mean())
        self.before = logits.detach()
        return nn.functional.cross_entropy(logits, y)


def test_a_state_that_is_carried_from_step_to_step_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batches=3 runs the training step several times a batch.*hidden state"):
        quiet_trainer(devices=1, strategy=strategy(3)).fit(Carries(), loader("mlp"))


# ---- what is measured and shown


def test_the_cut_is_measured_on_a_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []

    class Sized(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    warnings.simplefilter("ignore")
    measured = DDGStrategy(3, micro_batches=5)
    quiet_trainer(devices=1, strategy=measured, max_epochs=1).fit(Sized("mlp"), loader("mlp"))
    assert set(sizes) == {1, 5}, "the whole batch is seen for the comparison of losses only"
    assert sizes.count(5) == 1
    assert "micro-batch" in capsys.readouterr().out


def monitored(devices: int) -> tuple[dict[int, dict[str, float]], str]:
    warnings.simplefilter("ignore")
    monitor = DDGMonitor(timeline=False, every_n_steps=2)
    trainer = quiet_trainer(devices=devices, strategy=strategy(4, 3), callbacks=[monitor], max_epochs=1)
    trainer.fit(Classifier("mlp", "sgd", step_lr=False), loader("mlp", 120, 6))
    return monitor.figures, str(monitor.measured)


def test_the_monitor_counts_delays_in_updates(capsys: pytest.CaptureFixture[str]) -> None:
    figures, text = monitored(1)
    others, other_text = run_ranks(monitored, 4, 4)[0]
    # Of 20 batches, the first has no gradient for the first stage, and so no update; then three are one update late.
    assert figures[1]["delay_updates"] == pytest.approx(54 / 57)
    assert [figures[stage]["delay"] for stage in (1, 4)] == pytest.approx([1.0, 0.0])
    assert 0 < figures[3]["delay_updates"] < figures[2]["delay_updates"] < 1
    for stage, row in figures.items():
        for name in ("delay", "delay_updates", "staleness"):
            assert others[stage][name] == pytest.approx(row[name], rel=1e-9), (stage, name)
    assert "ms per micro-batch" in text
    assert "ms per micro-batch" in other_text


# ---- with what ends, or changes, a fit, and batches of all kinds


class Records(Dataset[dict[str, Any]]):
    """Samples with texts and numbers, as a loader collates them."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = dataset("mlp")[index]
        return {"x": x, "y": int(y), "name": f"sample {index}", "pair": (f"tag {index}", float(index))}


class OfRecords(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tags, numbers = batch["pair"]
        assert len(batch["name"]) == len(tags) == len(numbers) == len(batch["x"])
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class Stops(Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == 2


def fit_with(devices: int, kind: str) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    callbacks: dict[str, list[Callback]] = {
        "stop": [Stops()],
        "accumulation": [GradientAccumulationScheduler({0: 3, 1: 1})],
        "patience": [EarlyStopping("train_loss_epoch", patience=0, min_delta=10)],
    }
    module = OfRecords("mlp", "adam") if kind == "records" else Classifier("mlp", "adam")
    data: Any = DataLoader(Records(), 5) if kind == "records" else loader("mlp", 60)
    given: dict[str, Any] = {"min_epochs": 0, "min_steps": 1} if kind == "stop" else {}
    trainer = quiet_trainer(
        devices=devices, strategy=strategy(3), max_epochs=3, callbacks=callbacks.get(kind, []), **given
    )
    trainer.fit(module, data)
    return {**state_of(module), "steps": torch.tensor(float(trainer.global_step))}


KINDS = ["records", "stop", "accumulation", "patience"]


def fit_with_all(devices: int) -> list[dict[str, Tensor]]:
    return [fit_with(devices, kind) for kind in KINDS]


def test_both_executions_agree_with_callbacks_and_batches_of_records() -> None:
    alone = fit_with_all(1)
    # Asked for after the second batch, a stop takes effect K batches later.
    assert [int(state["steps"]) for state in alone] == [15, 5, 28, 24]
    for states in run_ranks(fit_with_all, 3, 3):
        for kind, got, wanted in zip(KINDS, states, alone, strict=True):
            assert largest_difference(got, wanted) <= 1e-12, kind
