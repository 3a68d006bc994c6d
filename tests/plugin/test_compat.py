"""Tests of ``compat.py``: each private name of Lightning it touches is still there and does what it is taken for.

A failure here means that Lightning has changed: mend the one function, and its docstring.
"""

from __future__ import annotations

import csv
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Accuracy, MetricCollection

from lightning_ddg import DDGStrategy
from lightning_ddg.comm.ranks import LocalRanks
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.compat_data import bypass_before_batch_transfer
from lightning_ddg.plugin.local_metrics import keep_metrics_local
from tests.networks import SAFELY, Classifier, dataset, loader, quiet_trainer


def fitted(module: pl.LightningModule, data: Any = None, **flags: Any) -> pl.Trainer:
    trainer = quiet_trainer(devices=1, **{"max_epochs": 1, **flags})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader("mlp") if data is None else data)
    return trainer


def test_the_sigterm_broadcast_is_silenced_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", lambda self: called.append("broadcast"))
    trainer = quiet_trainer(devices=1)
    undo = compat.silence_sigterm_broadcast(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert called == []
    undo()
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert called == ["broadcast"]


def test_the_sigterm_broadcast_is_called_where_it_is_silenced() -> None:
    """It is called through the loop, so that an attribute of the loop hides it."""
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)


def test_a_lightning_without_the_sigterm_broadcast_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
    trainer = quiet_trainer(devices=1)
    compat.silence_sigterm_broadcast(trainer)()
    assert not hasattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor")


class Hooked(Classifier):
    """Notes the hooks of a batch's transfer."""

    def __init__(self) -> None:
        super().__init__("mlp")
        self.called: list[str] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.called.append("before")
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.called.append("transfer")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.called.append("after")
        return batch


def test_transferring_a_batch_runs_the_three_hooks() -> None:
    module = Hooked()
    batch = torch.ones(2)
    assert torch.equal(compat.transfer_batch(module, batch, torch.device("cpu")), batch)
    assert module.called == ["before", "transfer", "after"]


def test_only_the_hook_before_the_transfer_is_bypassed() -> None:
    module = Hooked()
    undo = bypass_before_batch_transfer(module)
    fitted(module, DataLoader(dataset("mlp"), 22))
    assert module.called == ["transfer", "after"]
    undo()
    fitted(module, DataLoader(dataset("mlp"), 22))
    assert module.called == ["transfer", "after", "before", "transfer", "after"]
    assert "_on_before_batch_transfer" not in vars(module)


def test_logging_is_muted() -> None:
    class Logs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log_dict({"in_a_dict": loss})
            return loss

    module = Logs()
    undo = compat.mute_logging(module)
    assert fitted(module).callback_metrics == {}
    undo()
    assert {"train_loss", "in_a_dict"} <= fitted(module).callback_metrics.keys()


def test_undoing_gives_an_attribute_of_the_instance_back() -> None:
    module = Classifier()
    own = lambda *args, **kwargs: None  # noqa: E731 - an attribute, not a function of the test
    object.__setattr__(module, "log", own)
    compat.mute_logging(module)()
    assert vars(module)["log"] is own


def test_an_example_input_is_hidden_with_a_warning() -> None:
    module = pl.LightningModule()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.hide_example_input(module)()
    module.example_input_array = torch.ones(2)
    with pytest.warns(UserWarning, match="`example_input_array` is not used in this fit.*Leave the attribute out"):
        undo = compat.hide_example_input(module)
    assert module.example_input_array is None
    undo()
    assert torch.equal(module.example_input_array, torch.ones(2))


def test_metrics_do_not_sync_wherever_they_are() -> None:
    asked: list[bool] = []

    def distributed() -> bool:
        asked.append(True)
        return False

    def accuracy(**kwargs: Any) -> Accuracy:
        return Accuracy("multiclass", num_classes=3, distributed_available_fn=distributed, **kwargs)

    module = Classifier()
    module.metric, module.plain_list, module.collection = accuracy(), [accuracy()], MetricCollection({"a": accuracy()})
    undo = keep_metrics_local(DDGStrategy, LocalRanks(2).replicas)
    made_later = accuracy(dist_sync_on_step=True)
    metrics = [module.metric, module.plain_list[0], module.collection["a"], made_later]
    for metric in metrics:
        assert metric(torch.tensor([1]), torch.tensor([1])) == 1.0
        assert metric.compute() == 1.0
        metric.sync(distributed_available=distributed)
    assert asked == []
    undo()
    for metric in metrics:
        metric.reset()
        metric.update(torch.tensor([1]), torch.tensor([1]))
        metric.compute()
    assert len(asked) == len(metrics), "torchmetrics decides by this function whether to sync"


def test_the_advice_to_sync_is_silenced_alone() -> None:
    advice = (
        "It is recommended to use `self.log('x', ..., sync_dist=True)` when logging on epoch level in distributed"
        " setting to accumulate the metric across devices."
    )

    def warned() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn(advice, stacklevel=1)
            warnings.warn("another", stacklevel=1)
        return [str(warning.message) for warning in caught]

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = list(warnings.filters)
        undo = compat.silence_sync_dist_advice()
        assert warned() == ["another"]
        undo()
        assert warned() == [advice, "another"]
        assert list(warnings.filters) == before


def test_the_advice_is_still_worded_so() -> None:
    from lightning.pytorch.trainer.connectors.logger_connector import result

    text = " ".join(inspect.getsource(result).split()).replace('" f"', "").replace('" "', "")
    assert "sync_dist=True)` when logging on epoch level" in text


def test_a_callback_is_put_before_all_others() -> None:
    first, mine = pl.Callback(), pl.Callback()
    trainer = quiet_trainer(devices=1, callbacks=[first])
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    before = list(callbacks)
    undo = compat.insert_callback(trainer, mine)
    assert callbacks == [mine, *before]
    undo()
    assert callbacks == before


def test_both_rank_zero_decorators_are_told_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.setattr(fabric_rank_zero_only, "rank", 0)
    compat.set_rank_zero_only(3)
    assert rank_zero_only(lambda: "ran")() is None
    assert fabric_rank_zero_only(lambda: "ran")() is None
    compat.set_rank_zero_only(0)
    assert rank_zero_only(lambda: "ran")() == "ran"
    assert fabric_rank_zero_only(lambda: "ran")() == "ran"


def test_a_module_stays_where_it_is_when_its_parent_moves() -> None:
    free, kept = nn.Linear(1, 1), nn.Linear(1, 1)
    inside = nn.Sequential(kept)
    parent = nn.ModuleList([free, inside])
    undo = compat.keep_in_place(inside)
    parent.to("meta")
    assert free.weight.device.type == "meta"
    assert kept.weight.device.type == "cpu"
    undo()
    parent.to("meta")
    assert kept.weight.device.type == "meta"


def test_arguments_of_a_step() -> None:
    def with_index(batch: Any, batch_idx: int) -> None: ...
    def without_index(batch: Any) -> None: ...
    def anything(*args: Any) -> None: ...

    assert compat.step_arguments(with_index, "batch") == ["batch", 0]
    assert compat.step_arguments(without_index, "batch") == ["batch"]
    assert compat.step_arguments(anything, "batch") == ["batch", 0]


def test_what_a_strategy_and_a_module_have_of_their_own() -> None:
    module = Classifier()
    assert compat.trainer_of(module) is compat.trainer_of(nn.Module()) is None
    trainer = fitted(module)
    assert compat.trainer_of(module) is trainer
    assert trainer.optimizers
    compat.reset_optimizers(trainer.strategy)
    assert trainer.optimizers == trainer.strategy.lr_scheduler_configs == []


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset("mlp", 12))


class Numbers(pl.Callback):
    """Notes what the package asks about every batch."""

    def __init__(self) -> None:
        self.last: list[bool] = []
        self.number: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.last.append(compat.is_last_batch(trainer))

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.number.append(compat.batch_number(trainer))


@pytest.mark.parametrize(
    ("data", "flags", "last"),
    [
        (loader("mlp", 12), {}, [False, False, True] * 2),
        (DataLoader(Stream(), 5), {}, [False, False, True] * 2),
        (loader("mlp", 12), {"limit_train_batches": 2}, [False, True] * 2),
        (loader("mlp", 12), {"max_epochs": None, "max_steps": 4}, [False, False, True, True]),
        (loader("mlp", 12), {"max_epochs": None, "max_steps": 2, "accumulate_grad_batches": 2}, [False, False, True]),
    ],
    ids=["epoch", "no length", "limit", "max_steps", "accumulated"],
)
def test_last_batches_and_their_numbers(data: Any, flags: dict[str, Any], last: list[bool]) -> None:
    notes = Numbers()
    fitted(Classifier(step_lr=False), data, **{"max_epochs": 2, "callbacks": [notes], **flags})
    assert notes.last == last
    assert notes.number == list(range(len(last)))


class Steps(pl.Callback):
    """Notes the loggers' step of each batch."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append(compat.logger_step(trainer))


@pytest.mark.parametrize("every", [1, 2])
def test_the_step_is_that_with_which_lightning_logs(every: int, tmp_path: Any) -> None:
    logger, steps = CSVLogger(tmp_path), Steps()
    trainer = quiet_trainer(
        logger=logger, callbacks=[steps], max_epochs=2, log_every_n_steps=1, accumulate_grad_batches=every
    )
    trainer.fit(Classifier(), loader("mlp"))
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss_step"]]
    assert sorted(set(steps.steps)) == sorted(set(logged))
    # 5 batches an epoch; the last one of them always steps.
    assert steps.steps == (list(range(10)) if every == 1 else [0, 0, 1, 1, 2, 3, 3, 4, 4, 5])


def test_a_resumed_fit_goes_on_counting(tmp_path: Any) -> None:
    module = Classifier(step_lr=False)
    trainer = fitted(module, loader("mlp", 12))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    notes = Numbers()
    again = quiet_trainer(devices=1, max_epochs=2, callbacks=[notes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.fit(module, loader("mlp", 12), ckpt_path=tmp_path / "one.ckpt", **SAFELY)
    assert notes.number == [3, 4, 5]


def test_names_used_as_they_are() -> None:
    assert compat.default_process_group_backend(torch.device("cpu")) == "gloo"
    assert compat.default_process_group_backend(torch.device("cuda", 0)) == "nccl"
    assert {"timeout", "device_id"} & inspect.signature(compat.init_dist_connection).parameters.keys() or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in inspect.signature(compat.init_dist_connection).parameters.values()
    )
    assert "start_method" in inspect.signature(compat.MultiProcessingLauncher).parameters
    assert list(inspect.signature(compat.SubprocessScriptLauncher).parameters)[:3] == [
        "cluster_environment", "num_processes", "num_nodes"
    ]  # fmt: skip


def test_optimizer_states_move_to_a_device() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.state[parameter]["momentum_buffer"] = torch.ones(1)
    compat.optimizers_to_device([optimizer], torch.device("meta"))
    assert optimizer.state[parameter]["momentum_buffer"].device.type == "meta"
    optimizer.state[parameter]["momentum_buffer"] = torch.ones(1)
    compat.optimizer_to_device(optimizer, torch.device("meta"))
    assert optimizer.state[parameter]["momentum_buffer"].device.type == "meta"


def test_the_seed_is_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        compat.reset_seed()
        assert torch.initial_seed() == 17


def test_logging_is_muted_while_training_alone() -> None:
    class LogsEverywhere(Classifier):
        def on_train_epoch_end(self) -> None:
            self.log("at_epoch_end", 1.0)

    module = LogsEverywhere()
    trainer = quiet_trainer(devices=1, max_epochs=1)
    undo = compat.mute_training_logs(trainer, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader("mlp"), loader("mlp"))
    assert trainer.callback_metrics.keys() == {"val_loss"}
    undo()
    assert "log" not in vars(module)
    assert {"train_loss", "at_epoch_end"} <= fitted(module).callback_metrics.keys()


@pytest.mark.parametrize("overridden", [True, False])
def test_a_function_runs_after_the_hooks_of_callbacks_and_module(overridden: bool) -> None:
    calls: list[str] = []

    class Own(Classifier):
        def on_train_epoch_end(self) -> None:
            calls.append("module")

    class Theirs(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            calls.append("callback")

    module = (Own if overridden else Classifier)()
    undo = compat.after_hook(module, "on_train_epoch_end", lambda: calls.append("after"))
    fitted(module, callbacks=[Theirs()])
    assert calls == ["callback", "module", "after"][:: 1 if overridden else 2]
    undo()
    assert "on_train_epoch_end" not in vars(module)


@pytest.mark.parametrize("name", ["on_fit_start", "on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end"])
def test_hooks_are_looked_up_on_the_module_itself(name: str) -> None:
    called: list[str] = []
    module = Classifier()
    compat.after_hook(module, name, lambda: called.append(name))
    fitted(module, DataLoader(dataset("mlp"), 22))
    assert called == [name]


def test_whether_a_batch_has_a_backward() -> None:
    class Notes(pl.Callback):
        def __init__(self) -> None:
            self.skipped: list[bool] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.skipped.append(compat.skips_backward(trainer))

    notes = Notes()
    averaging = StochasticWeightAveraging(0.1, swa_epoch_start=1)
    fitted(Classifier("convnet", step_lr=False), loader("convnet", 5), callbacks=[averaging, notes], max_epochs=3)
    assert notes.skipped == [False, False, False, True]


class Asks(pl.Callback):
    """Notes after which batches metrics are needed."""

    def __init__(self) -> None:
        self.monitors: list[bool] = []
        self.plateaus: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.monitors.append(compat.monitors_after_batch(trainer))
        self.plateaus.append(compat.plateaus_after_batch(trainer))


@pytest.mark.parametrize(
    ("monitor", "expected"), [("train_loss_step", [False, True] * 2 + [False]), (None, [False] * 5)]
)
def test_when_a_checkpoint_monitors_after_a_batch(tmp_path: Any, monitor: Any, expected: list[bool]) -> None:
    asks = Asks()
    checkpoint = ModelCheckpoint(tmp_path, monitor=monitor, every_n_train_steps=2)
    fitted(Classifier(), callbacks=[asks, checkpoint], enable_checkpointing=True)
    assert asks.monitors == expected
    assert asks.plateaus == [False] * 5


@pytest.mark.parametrize(("interval", "expected"), [("step", [False, True] * 2 + [False]), ("epoch", [False] * 5)])
def test_when_a_plateau_is_looked_for_after_a_batch(interval: str, expected: list[bool]) -> None:
    class Plateau(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            config = {"scheduler": scheduler, "interval": interval, "frequency": 2, "monitor": "train_loss"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    asks = Asks()
    fitted(Plateau(), callbacks=[asks])
    assert asks.plateaus == expected


def test_parameters_are_recognised_by_identity() -> None:
    """Lightning compares values; two zero biases are not the same parameter."""
    mine, twin, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([mine], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert BaseFinetuning.filter_on_optimizer(optimizer, [mine, twin, other]) == [other]
    undo = compat.filter_on_optimizer_by_identity()
    try:
        with pytest.warns(UserWarning, match="1 parameters to unfreeze are in the optimizer already"):
            new = BaseFinetuning.filter_on_optimizer(optimizer, [mine, twin, other])
        assert [id(parameter) for parameter in new] == [id(twin), id(other)]
        assert "BaseFinetuning.filter_on_optimizer(" in inspect.getsource(BaseFinetuning.unfreeze_and_add_param_group)
    finally:
        undo()
    assert isinstance(BaseFinetuning.__dict__["filter_on_optimizer"], staticmethod)
    assert "torch.equal" in inspect.getsource(BaseFinetuning.filter_on_optimizer)


def test_a_callback_is_kept_while_a_learning_rate_is_sought(tmp_path: Any) -> None:
    class Present(pl.Callback):
        batches = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.batches += 1

    class Keeps(Classifier):
        def on_train_start(self) -> None:
            compat.keep_callback(self.trainer, present)

    present = Present()
    module = Keeps("mlp", step_lr=False)
    module.lr = 0.1
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    fitted(module, callbacks=[finder, present], default_root_dir=tmp_path)
    assert present.batches == 5 + 5
    assert finder.optimal_lr is not None
    assert len(finder.optimal_lr.results["loss"]) == 5


@pytest.mark.filterwarnings("ignore")
def test_an_exception_in_the_loop_is_told_where_it_happens() -> None:
    class Breaks(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            raise OSError("the disk is full")

    told: list[BaseException] = []
    trainer = quiet_trainer(devices=1)
    undo = compat.on_exception_in_fit(trainer, told.append)
    with pytest.raises(OSError, match="the disk is full") as caught:
        trainer.fit(Breaks(), loader("mlp"))
    assert told == [caught.value]
    undo()
    assert "run" not in vars(trainer.fit_loop)


class OwnBatchEnd(Classifier):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...


class OwnEpochEnd(Classifier):
    def on_train_epoch_end(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "callbacks", "expected"),
    [
        (Classifier, [Timer(), pl.callbacks.LearningRateMonitor(), pl.callbacks.RichProgressBar()], False),
        (Classifier, [Asks()], True),
        (OwnBatchEnd, [], True),
        (OwnEpochEnd, [], True),
    ],
)
def test_whether_hooks_may_use_what_steps_return(make: Any, callbacks: list[pl.Callback], expected: bool) -> None:
    module = make()
    module.trainer = quiet_trainer(devices=1, callbacks=callbacks, logger=CSVLogger("unused"), enable_progress_bar=True)
    assert compat.uses_step_outputs(module) == expected


def test_a_metric_whose_log_is_muted_is_reset() -> None:
    module = Classifier()
    metric = Accuracy("multiclass", num_classes=3)
    trainer = quiet_trainer(devices=1)
    module.trainer = trainer
    trainer.training = True
    compat.mute_training_logs(trainer, module)
    metric.update(torch.tensor([1]), torch.tensor([1]))
    module.log("accuracy", metric)
    assert metric.update_count == 0


def test_the_loss_of_a_step_and_what_else_it_returns() -> None:
    loss = torch.tensor(6.0)
    assert compat.loss_and_extra(loss, 2) == (torch.tensor(3.0), {})
    assert compat.loss_and_extra({"loss": loss, "more": 1}, 1) == (loss, {"more": 1})
    with pytest.raises(Exception, match="the 'loss' key needs to be present"):
        compat.loss_and_extra({"more": 1}, 1)


def test_the_value_of_a_metric_that_is_logged_for_a_step() -> None:
    metric = Accuracy("multiclass", num_classes=2)
    assert compat.last_value(metric) is None
    metric(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert compat.last_value(metric) == 0.5
    compat.set_last_value(metric, torch.tensor(0.25))
    assert compat.last_value(metric) == 0.25
    assert metric.compute() == 0.5


class ZeroesItself(Classifier):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None: ...


class LooksBefore(pl.Callback):
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None: ...


@pytest.mark.parametrize(
    ("make", "callbacks", "expected"),
    [(Classifier, [], False), (ZeroesItself, [], True), (Classifier, [LooksBefore()], True)],
)
def test_whether_hooks_may_look_at_old_gradients(
    make: type[Classifier], callbacks: list[pl.Callback], expected: bool
) -> None:
    module = make()
    module.trainer = quiet_trainer(devices=1, callbacks=callbacks)
    assert compat.looks_before_zeroing(module) == expected


class Accumulates(Classifier):
    """Notes, in each backward, whether a step follows."""

    def __init__(self) -> None:
        super().__init__("mlp")
        self.seen: list[bool] = []

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.seen.append(compat.accumulates(self.trainer))
        super().backward(loss, *args, **kwargs)


def test_batches_that_no_step_follows() -> None:
    module = Accumulates()
    fitted(module, accumulate_grad_batches=2)
    assert module.seen == [True, False, True, False, False], "one follows the last batch of an epoch"


class Counted(dict[str, Any]):
    """Lets nothing in."""

    def update(self, *args: Any, **kwargs: Any) -> None: ...


class Held(Classifier):
    def on_fit_start(self) -> None:
        compat.hold_metrics(self.trainer, Counted)

    def on_train_epoch_end(self) -> None:
        dict.update(self.trainer.callback_metrics, {"given": torch.ones(())})
        self.held = dict(self.trainer.callback_metrics)


def test_metrics_are_held_until_the_next_run() -> None:
    module = Held("mlp")
    trainer = fitted(module)
    assert module.held.keys() == {"given"}
    trainer.validate(module, loader("mlp"), verbose=False)
    assert trainer.callback_metrics.keys() == {"val_loss"}
