"""Optimization in all its forms: the two executions, independent of each other, must still agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, GradientAccumulationScheduler
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.networks import Classifier, ManualClassifier, largest_difference, loader, quiet_trainer, state_of

POINTS = ["net.2", "net.5"]


class Frozen(Classifier):
    """The first layer and the whole second stage are frozen."""

    def __init__(self) -> None:
        super().__init__("mlp", "nesterov")
        self.net[0].requires_grad_(False)
        self.net[2:5].requires_grad_(False)


class Groups(Classifier):
    """No decay on biases; a parameter outside the network."""

    def __init__(self) -> None:
        super().__init__("convnet")
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x) * self.scale, y)

    def configure_optimizers(self) -> Any:
        biases = [parameter for name, parameter in self.named_parameters() if name.endswith("bias")]
        others = [parameter for name, parameter in self.named_parameters() if not name.endswith("bias")]
        groups = [{"params": others, "weight_decay": 0.1}, {"params": biases, "lr": 0.02}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.5)


class Plateau(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.1)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


class ZeroingGradients(Classifier):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


class ManualAccumulation(ManualClassifier):
    last_too = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]) / 2)
        if batch_idx % 2 or (self.last_too and self.trainer.is_last_batch):
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()


class WithoutSchedule(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class ManualAsLightningDoes(ManualAccumulation, WithoutSchedule):
    last_too = True


class ManualWithoutLightning(ManualClassifier):
    """Steps with the optimizer itself, of which Lightning knows nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()


class OneCycle(Classifier):
    """Cycles the momentum against the learning rate, at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class EverySecond(Classifier):
    """A scheduler at every second batch or epoch."""

    def __init__(self, interval: str) -> None:
        super().__init__("mlp", "adam")
        self.interval = interval

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        config = {"scheduler": scheduler, "interval": self.interval, "frequency": 2}
        return {"optimizer": optimizer, "lr_scheduler": config}


class PlateauOnTraining(Classifier):
    """Watches a metric that only the last stage's rank knows, after every epoch or every second batch."""

    def __init__(self, interval: str) -> None:
        super().__init__("mlp", "sgd")
        self.interval = interval

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.02)
        config = {"scheduler": scheduler, "interval": self.interval, "frequency": 1 + (self.interval == "step")}
        return {"optimizer": optimizer, "lr_scheduler": {**config, "monitor": "train_loss"}}


class SchedulesItself(Classifier):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if self.trainer.global_step % 3 == 0:
            scheduler.step()


class WarmsUp(Classifier):
    """The usual override of `optimizer_step`: the learning rate grows linearly."""

    def __init__(self) -> None:
        super().__init__("mlp", "nesterov", step_lr=False)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (self.trainer.global_step + 1) / 8) * 0.05


class StepsNowAndThen(Classifier):
    """Steps at odd batches; at even ones, such as the last, it only runs the closure."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class ClipsItself(Classifier):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        value = 0.1 / (1 + self.current_epoch)
        self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm="norm")


class Backboned(Classifier):
    """A backbone that is unfrozen while it trains; its layers lie on stages 1 and 2."""

    @property
    def backbone(self) -> nn.Module:
        return self.net[:4]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Unfreezing(BaseFinetuning):
    """Unfreezes a layer an epoch, the last first; some are in the optimizer from the beginning."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.net[0], pl_module.net[1], pl_module.net[3]])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        layer = {0: pl_module.net[5], 1: pl_module.net[3], 2: [pl_module.net[0], pl_module.net[1]]}[epoch]
        self.unfreeze_and_add_param_group(layer, optimizer, initial_denom_lr=2.0)


class AddsAGroup(Callback):
    """Adds a parameter group by itself, in the middle of an epoch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 6:
            pl_module.net[:4].requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": pl_module.net[:4].parameters(), "lr": 0.03})


class FreezesFirst(AddsAGroup):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.net[:4].requires_grad_(False)


class Norms(Classifier):
    """Logs the norm of its gradients as Lightning's documentation shows."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self.net, norm_type=2))


class Noting(Callback):
    """Counts the steps that hooks see, and notes the learning rates and momenta that batches end with."""

    def __init__(self) -> None:
        self.steps = 0
        self.rates: list[Any] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.rates.append([(group["lr"], group.get("momentum"), group.get("betas")) for group in groups])


Case = tuple[Callable[[], Classifier], dict[str, Any], list[Callable[[], Callback]]]
CASES: dict[str, Case] = {
    "clip by norm": (lambda: Classifier("mlp", "nesterov"), {"gradient_clip_val": 0.1}, []),
    "clip by value": (
        lambda: Classifier("mlp", "adam"),
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        [],
    ),
    "clips itself": (lambda: ClipsItself("mlp", "sgd"), {}, []),
    "accumulate 2": (lambda: Classifier("convnet", "nesterov"), {"accumulate_grad_batches": 2}, []),
    "accumulate 3 and clip": (
        lambda: Classifier("mlp", "adamw_fused"),
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05},
        [],
    ),
    "accumulation scheduler": (
        lambda: Classifier("mlp", "nesterov"),
        {"max_epochs": 4},
        [lambda: GradientAccumulationScheduler({0: 1, 1: 3, 3: 2})],
    ),
    "max_steps": (lambda: Classifier("mlp", "adam"), {"max_steps": 7}, []),
    "one batch an epoch": (lambda: Classifier("mlp", "nesterov"), {"limit_train_batches": 1}, []),
    "frozen": (Frozen, {}, []),
    "groups": (Groups, {}, []),
    "one cycle": (OneCycle, {}, []),
    "every second batch": (lambda: EverySecond("step"), {}, []),
    "every second epoch": (lambda: EverySecond("epoch"), {"max_epochs": 5}, []),
    "plateau": (Plateau, {}, []),
    "plateau on training, epoch": (lambda: PlateauOnTraining("epoch"), {"max_epochs": 5}, []),
    "plateau on training, step": (lambda: PlateauOnTraining("step"), {}, []),
    "schedules itself": (lambda: SchedulesItself("mlp", "adam"), {}, []),
    "warms up": (WarmsUp, {}, []),
    "steps now and then": (lambda: StepsNowAndThen("mlp", "nesterov"), {}, []),
    "unfreezing": (Backboned, {}, [Unfreezing]),
    "backbone": (Backboned, {"max_epochs": 4}, [lambda: BackboneFinetuning(2, lambda epoch: 1.5, verbose=True)]),
    "adds a group": (Backboned, {}, [FreezesFirst]),
    "gradient norms": (lambda: Norms("mlp", "sgd"), {"logger": False}, []),
    "zeroing gradients": (lambda: ZeroingGradients("mlp", "adamw_fused"), {}, []),
    "manual accumulation": (lambda: ManualAccumulation("mlp", "nesterov"), {}, []),
    "manual accumulation, the last batch too": (ManualAsLightningDoes, {}, []),
    "the same automatically": (WithoutSchedule, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, []),
    "manual without Lightning's step": (lambda: ManualWithoutLightning("mlp", "nesterov"), {}, []),
    "detect anomaly": (lambda: Classifier("mlp", "sgd"), {"detect_anomaly": True}, []),
    "deterministic": (lambda: Classifier("convnet", "sgd"), {"deterministic": True}, []),
}


@dataclass
class Trained:
    """What one case ended with."""

    state: dict[str, Tensor]
    start: dict[str, Tensor]
    steps: int
    rates: list[Any]
    metrics: dict[str, float]
    optimizer: Any


def train(name: str, devices: int) -> Trained:
    warnings.simplefilter("ignore")
    make, flags, callbacks = CASES[name]
    module, noting = make(), Noting()
    start = state_of(module)
    strategy = DDGStrategy(num_stages=3, split_points=POINTS)
    callbacks = [*(callback() for callback in callbacks), noting]
    trainer = quiet_trainer(devices=devices, strategy=strategy, callbacks=callbacks, **flags)
    data = loader("convnet" if isinstance(module.net[0], nn.Conv2d) else "mlp")
    trainer.fit(module, data, data)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    checkpoint = trainer._checkpoint_connector.dump_checkpoint() if trainer.optimizers else {}
    optimizer = checkpoint["optimizer_states"][0] if trainer.is_global_zero else None
    return Trained(state_of(module), start, trainer.global_step, noting.rates, metrics, optimizer)


def train_all(devices: int) -> list[Trained]:
    return [train(name, devices) for name in CASES]


@pytest.fixture(scope="module")
def ranks() -> list[list[Trained]]:
    return run_ranks(train_all, 3, 3, timeout=200)


@pytest.fixture(scope="module")
def alone() -> dict[str, Trained]:
    return {name: train(name, 1) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_executions_agree(name: str, ranks: list[list[Trained]], alone: dict[str, Trained]) -> None:
    expected = alone[name]
    for rank in ranks:
        got = rank[list(CASES).index(name)]
        assert got.steps == expected.steps
        assert got.rates == expected.rates
        assert largest_difference(got.state, expected.state) <= 1e-12
        for key in expected.metrics.keys() & got.metrics.keys():
            if not key.startswith("grad_"):
                assert got.metrics[key] == pytest.approx(expected.metrics[key], abs=1e-6)
    first = ranks[0][list(CASES).index(name)]
    assert same_optimizer_state(first.optimizer, expected.optimizer)
    for value in expected.state.values():
        assert torch.isfinite(value).all()


def test_accumulating_by_hand_is_accumulating(alone: dict[str, Trained]) -> None:
    by_hand, automatic = alone["manual accumulation, the last batch too"], alone["the same automatically"]
    assert by_hand.steps == automatic.steps
    assert largest_difference(by_hand.state, automatic.state) <= 1e-12


def same_optimizer_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool((a.double() - b.double()).abs().max() <= 1e-12)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_optimizer_state(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_optimizer_state, a, b))
    return bool(a == b)


def changed(trained: Trained) -> set[str]:
    return {name for name, value in trained.state.items() if not torch.equal(value, trained.start[name])}


def test_the_cases_do_what_they_are_named_for(alone: dict[str, Trained]) -> None:
    rates = {name: [batch[0] for batch in trained.rates] for name, trained in alone.items()}
    assert len({momentum for _, momentum, _ in rates["one cycle"]}) > 10
    assert len({lr for lr, _, _ in rates["every second batch"]}) == 7
    assert len({lr for lr, _, _ in rates["every second epoch"]}) == 3
    for name in ("plateau", "plateau on training, epoch", "plateau on training, step"):
        assert len({lr for lr, _, _ in rates[name]}) > 1, name
    assert len({lr for lr, _, _ in rates["schedules itself"]}) > 1
    assert alone["accumulation scheduler"].steps == 5 + 2 + 2 + 3
    assert [len(batch) for batch in alone["unfreezing"].rates] == [1] * 5 + [2] * 5 + [3] * 5
    assert [len(batch) for batch in alone["backbone"].rates] == [1] * 10 + [2] * 10
    assert [len(batch) for batch in alone["adds a group"].rates] == [1] * 6 + [2] * 9
    for name in ("unfreezing", "backbone", "adds a group"):
        assert {"net.0.weight", "net.3.weight", "net.6.weight"} <= changed(alone[name])
    assert "net.0.weight" not in changed(alone["frozen"])
    assert "net.3.weight" not in changed(alone["frozen"])
    assert alone["gradient norms"].metrics.keys() >= {"grad_2.0_norm_total"}


def fit_with_a_stage_without_parameters(devices: int) -> Any:
    warnings.simplefilter("ignore")
    module = Classifier("mlp", "adamw_fused")
    strategy = DDGStrategy(num_stages=3, split_points=["net.2", "net.3"])
    quiet_trainer(devices=devices, strategy=strategy).fit(module, loader("mlp"))
    return state_of(module)


def test_a_stage_without_parameters() -> None:
    alone = fit_with_a_stage_without_parameters(1)
    for got in run_ranks(fit_with_a_stage_without_parameters, 3, 3):
        assert largest_difference(got, alone) <= 1e-12


CONFIG = """
strategy: {class_path: lightning_ddg.DDGStrategy, init_args: {num_stages: 2, split_points: [net.3]}}
max_epochs: 2
accelerator: cpu
logger: false
enable_checkpointing: false
enable_progress_bar: false
enable_model_summary: false
"""


class Bare(Classifier):
    """Leaves its optimizer to the command line."""

    configure_optimizers = LightningModule.configure_optimizers


def fit_from_the_command_line(devices: int) -> Any:
    warnings.simplefilter("ignore")
    optimizer = ["--optimizer=torch.optim.RMSprop", "--optimizer.lr=0.02", "--optimizer.momentum=0.5"]
    scheduler = ["--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=train_loss", "--lr_scheduler.patience=0"]
    threshold = ["--lr_scheduler.threshold=0.9"]
    cli = LightningCLI(Bare, run=False, save_config_callback=None, trainer_defaults=yaml.safe_load(CONFIG), args=[
        f"--trainer.devices={devices}", *optimizer, *scheduler, *threshold])  # fmt: skip
    cli.trainer.fit(cli.model, loader("mlp"))
    (chosen,) = cli.trainer.optimizers
    return state_of(cli.model), type(chosen).__name__, chosen.param_groups[0]["lr"], chosen.param_groups[0]["momentum"]


def test_an_optimizer_from_the_command_line() -> None:
    alone = fit_from_the_command_line(1)
    assert alone[1:] == ("RMSprop", 0.002, 0.5)
    for got in run_ranks(fit_from_the_command_line, 2, 2):
        assert got[1:] == alone[1:]
        assert largest_difference(got[0], alone[0]) <= 1e-12
