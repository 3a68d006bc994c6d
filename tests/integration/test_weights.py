"""Weights that user code reads during a fit are the current ones, in every process, or the reading is refused."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.networks import BEFORE_2_6, Classifier, largest_difference, loader, quiet_trainer, state_of

READ_IN = [
    "on_train_start", "on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end",
    "on_validation_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_end", "on_fit_end",
]  # fmt: skip


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


class Reads(pl.Callback):
    """Reads all weights wherever it may, in three ways."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Tensor]]] = []

    def read(self, hook: str, module: pl.LightningModule) -> None:
        state = state_of(module)
        buffer = io.BytesIO()
        torch.save(module.net, buffer)
        buffer.seek(0)
        saved = {f"net.{name}": value for name, value in torch.load(buffer, weights_only=False).state_dict().items()}
        for other in (saved, state_of(copy.deepcopy(module)), {**state, **values(module)}):
            assert all(torch.equal(other[name], value) for name, value in state.items()), hook
        self.seen.append((hook, state))

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        self.read("on_save_checkpoint", module)


for name in READ_IN:
    setattr(Reads, name, lambda self, trainer, module, name=name: self.read(name, module))


class ReadsItself(Classifier):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[str, dict[str, Tensor]]] = []

    def on_train_end(self) -> None:
        self.seen.append(("on_train_end", values(self)))

    def on_train_epoch_end(self) -> None:
        self.seen.append(("on_train_epoch_end", state_of(self.net)))

    def on_validation_epoch_end(self) -> None:
        self.seen.append(("on_validation_epoch_end", values(self.net)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["again"] = values(self)
        self.seen.append(("on_save_checkpoint", state_of(self)))

    def on_fit_end(self) -> None:
        self.seen.append(("on_fit_end", state_of(self)))


def average() -> list[pl.Callback]:
    return [StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)]


def fit(devices: int, path: str, case: str) -> list[tuple[str, dict[str, Tensor]]]:
    warnings.simplefilter("ignore")
    reads = Reads()
    module: Any = ReadsItself("convnet", "nesterov") if case == "module" else Classifier("convnet", "nesterov")
    callbacks: list[pl.Callback] = [] if case == "module" else [reads]
    if case == "swa":
        callbacks = [*average(), reads]
    if case == "ema":
        from lightning.pytorch.callbacks import EMAWeightAveraging

        callbacks = [EMAWeightAveraging(), reads]
    if case == "lambda":
        callbacks = [LambdaCallback(on_train_epoch_end=lambda t, m: reads.read("on_train_epoch_end", m))]
    saves = ModelCheckpoint(path, every_n_train_steps=2, save_top_k=-1, save_last=True)
    validated = {"limit_val_batches": 0} if case in ("lambda", "module") else {"val_check_interval": 3}
    trainer = quiet_trainer(
        devices=devices,
        strategy=DDGStrategy(3, ["net.3", "net.8"]),
        max_epochs=3,
        callbacks=[*callbacks, saves],
        enable_checkpointing=True,
        **validated,
    )
    trainer.fit(module, loader("convnet"), loader("convnet", 10))
    return module.seen if case == "module" else reads.seen  # type: ignore[no-any-return]


CASES = ["callback", "module", "swa", "lambda", *([] if BEFORE_2_6 else ["ema"])]


def fit_all(devices: int, path: str) -> list[Any]:
    return [fit(devices, f"{path}/{case}", case) for case in CASES]


def test_every_process_reads_the_weights_of_all_where_they_may_be_read(tmp_path: Path) -> None:
    alone = fit_all(1, str(tmp_path / "one"))
    assert {hook for hook, _ in alone[0]} == {*READ_IN, "on_save_checkpoint"}
    for rank, cases in enumerate(run_ranks(fit_all, 3, 3, str(tmp_path / "three"))):
        for case, got, wanted in zip(CASES, cases, alone, strict=True):
            assert [hook for hook, _ in got] == [hook for hook, _ in wanted], case
            for (hook, state), (_, expected) in zip(got, wanted, strict=True):
                # Buffers of batch norm are integers too.
                worst = max(float((state[key].double() - expected[key].double()).abs().max()) for key in expected)
                assert worst <= 1e-12, (rank, case, hook)
    for case in CASES:
        one = torch.load(tmp_path / "one" / case / "last.ckpt", weights_only=False)["state_dict"]
        three = torch.load(tmp_path / "three" / case / "last.ckpt", weights_only=False)["state_dict"]
        assert all(float((one[key].double() - three[key].double()).abs().max()) <= 1e-12 for key in one), case
    saved = torch.load(tmp_path / "three" / "module" / "last.ckpt", weights_only=False)
    assert all(torch.equal(saved["state_dict"][key], value) for key, value in saved["again"].items())


class ReadsTooEarly(pl.Callback):
    def __init__(self) -> None:
        self.said: list[str] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 2:
            return
        attempts: list[Any] = [
            module.state_dict, module.net.state_dict, module.net[0].state_dict, module.net[6].state_dict,
            lambda: copy.deepcopy(module), lambda: torch.save(module.net, io.BytesIO()),
            lambda: pickle.dumps(module.net),
        ]  # fmt: skip
        for attempt in attempts:
            try:
                attempt()
                self.said.append("read")
            except RuntimeError as error:
                self.said.append(str(error))


def fit_reading_too_early(devices: int) -> list[str]:
    warnings.simplefilter("ignore")
    reads = ReadsTooEarly()
    strategy = DDGStrategy(2, ["net.3"])
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=1, callbacks=[reads])
    trainer.fit(Classifier("mlp"), loader("mlp"))
    return reads.said


def test_weights_of_other_stages_are_refused_in_between() -> None:
    assert fit_reading_too_early(1) == ["read"] * 7
    for rank, said in enumerate(run_ranks(fit_reading_too_early, 2, 2)):
        # `net.0` belongs to stage 1, which rank 1 trains, and `net.6` to stage 2.
        own, other = (3, 2) if rank == 0 else (2, 3)
        assert said[own] == "read"
        foreign = (
            f"in `on_train_batch_end`, but the current weights of stage {rank + 1} (Linear) are in another process"
        )
        for index in (0, 1, other):
            assert said[index].startswith("`state_dict()` was called while training, " + foreign), said[index]
        for index in (4, 5, 6):
            assert said[index].startswith("A layer was copied or pickled while training, " + foreign), said[index]
        assert "`on_train_end`" in said[0]
        assert "`trainer.save_checkpoint(path)`" in said[0]


class FailsAtTheEnd(Classifier):
    def on_train_end(self) -> None:
        if self.trainer.global_rank == 1:
            raise ValueError("the user's own")


def fit_failing_at_the_end() -> str:
    module = FailsAtTheEnd("mlp")
    try:
        quiet_trainer(devices=2, strategy=DDGStrategy(2, ["net.3"]), max_epochs=1).fit(module, loader("mlp"))
    except Exception as error:  # noqa: BLE001 - what each rank says is what is tested
        return str(error)
    return "trained"


def test_a_hook_that_fails_at_the_end_ends_all() -> None:
    zero, one = run_ranks(fit_failing_at_the_end, 2)
    assert one == "the user's own"
    assert "Rank 1" in zero
    assert "the user's own" in zero


class CopiesCallbacks(pl.Callback):
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.copies = copy.deepcopy([callback for callback in trainer.callbacks if callback is not self])


def fit_copying_callbacks(devices: int) -> list[str]:
    copies = CopiesCallbacks()
    saves = ModelCheckpoint(monitor="train_loss")
    trainer = quiet_trainer(
        devices=devices,
        strategy=DDGStrategy(2, ["net.3"]),
        max_epochs=1,
        callbacks=[copies, LambdaCallback(), saves],
        enable_checkpointing=True,
        limit_train_batches=2,
    )
    trainer.validate(Classifier("mlp"), loader("mlp"), verbose=False)
    assert pickle.loads(pickle.dumps(trainer.strategy)).run is None
    trainer.fit(Classifier("mlp"), loader("mlp"))
    return [type(callback).__name__ for callback in copies.copies]


def test_callbacks_and_the_strategy_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit_copying_callbacks(1) == ["Callback", "LambdaCallback", "ModelCheckpoint"]
    assert run_ranks(fit_copying_callbacks, 2, 2) == [["Callback", "LambdaCallback", "ModelCheckpoint"]] * 2


class MakesBuffers(nn.Module):
    """Its first forward leaves a scale in the checkpoint, and an index beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.register_buffer("scale", x.detach().std(dim=0) + 1)
            self.register_buffer("index", torch.arange(10), persistent=False)
        return self.fc(x)[:, self.index] / self.scale


class OfMakers(Classifier):
    def __init__(self) -> None:
        super().__init__("mlp", step_lr=False)
        self.net = nn.Sequential(*self.net[:3], *(MakesBuffers() for _ in range(4)), *self.net[5:]).double()


def fit_makers(strategy: str, devices: int, validates: bool) -> tuple[dict[str, Tensor], list[str]]:
    pl.seed_everything(2, verbose=False)
    module = OfMakers()
    chosen = strategy if strategy == "auto" else DDGStrategy(2, balance="parameters")
    trainer = quiet_trainer(devices=devices, strategy=chosen, limit_train_batches=1)
    trainer.fit(module, loader("mlp"), loader("mlp") if validates else None)
    return state_of(module), sorted(name for name, _ in module.named_buffers())


@pytest.mark.parametrize("validates", [False, True])
def test_buffers_that_a_forward_makes_are_everywhere_and_saved(validates: bool) -> None:
    state, buffers = run_ranks(fit_makers, 1, "auto", 1, validates)[0]
    assert len(buffers) == 8
    assert "net.3.scale" in state
    others = [run_ranks(fit_makers, devices, "ddg", devices, validates) for devices in (1, 2)]
    for found, found_buffers in itertools.chain(*others):
        assert largest_difference(found, state) <= 1e-12
        assert found_buffers == buffers
