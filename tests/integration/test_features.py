"""Trainer flags and unusual modules: the two executions, independent of each other, must still agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
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
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}


class ZeroingGradients(Classifier):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


class ManualAccumulation(ManualClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()


class Noting(Callback):
    """Counts the steps that hooks see."""

    def __init__(self) -> None:
        self.steps = 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps += 1


CASES: dict[str, tuple[Callable[[], Classifier], dict[str, Any], float]] = {
    "clip by norm": (lambda: Classifier("mlp", "nesterov"), {"gradient_clip_val": 0.1}, 1e-12),
    "clip by value": (
        lambda: Classifier("mlp", "adam"),
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        1e-12,
    ),
    "accumulate 2": (lambda: Classifier("convnet", "nesterov"), {"accumulate_grad_batches": 2}, 1e-12),
    "accumulate 3 and clip": (
        lambda: Classifier("mlp", "adamw_fused"),
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05},
        1e-12,
    ),
    "max_steps": (lambda: Classifier("mlp", "adam"), {"max_steps": 7}, 1e-12),
    "one batch an epoch": (lambda: Classifier("mlp", "nesterov"), {"limit_train_batches": 1}, 1e-12),
    "frozen": (Frozen, {}, 1e-12),
    "groups": (Groups, {}, 1e-12),
    "plateau": (Plateau, {}, 1e-12),
    "zeroing gradients": (lambda: ZeroingGradients("mlp", "adamw_fused"), {}, 1e-12),
    "manual accumulation": (lambda: ManualAccumulation("mlp", "nesterov"), {}, 1e-12),
    "bf16-mixed": (lambda: Classifier("transformer", "nesterov").float(), {"precision": "bf16-mixed"}, 1e-6),
    "bf16-true": (lambda: Classifier("mlp", "sgd").float(), {"precision": "bf16-true"}, 1e-6),
    "64-true": (lambda: Classifier("transformer", "adam").float(), {"precision": "64-true"}, 1e-12),
    "detect anomaly": (lambda: Classifier("mlp", "sgd"), {"detect_anomaly": True}, 1e-12),
    "deterministic": (lambda: Classifier("convnet", "sgd"), {"deterministic": True}, 1e-12),
}


def train(name: str, devices: int) -> tuple[dict[str, Tensor], int, int, float]:
    warnings.simplefilter("ignore")
    make, flags, _ = CASES[name]
    module, noting = make(), Noting()
    strategy = DDGStrategy(num_stages=3, split_points=POINTS)
    trainer = quiet_trainer(devices=devices, strategy=strategy, callbacks=[noting], **flags)
    data = loader("transformer" if "transformer" in str(module.net) or hasattr(module.net[0], "num_embeddings") else
                  "convnet" if isinstance(module.net[0], nn.Conv2d) else "mlp")  # fmt: skip
    if flags.get("precision") in ("bf16-mixed", "bf16-true"):
        data.dataset.tensors = tuple(t.float() if t.is_floating_point() else t for t in data.dataset.tensors)  # type: ignore[attr-defined]
    trainer.fit(module, data, data)
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    return state_of(module), trainer.global_step, noting.steps, lr


def train_all(devices: int) -> list[Any]:
    return [train(name, devices) for name in CASES]


@pytest.fixture(scope="module")
def ranks() -> list[list[Any]]:
    return run_ranks(train_all, 3, 3, timeout=200)


@pytest.mark.parametrize("name", CASES)
def test_executions_agree(name: str, ranks: list[list[Any]]) -> None:
    state, steps, _, lr = train(name, 1)
    for rank in ranks:
        got, got_steps, _, got_lr = rank[list(CASES).index(name)]
        assert got_steps == steps
        assert got_lr == lr
        assert largest_difference(got, state) <= CASES[name][2]
    for value in state.values():
        assert torch.isfinite(value).all()


def test_plateau_lowers_the_learning_rate_on_every_rank(ranks: list[list[Any]]) -> None:
    lrs = {rank[list(CASES).index("plateau")][3] for rank in ranks}
    assert len(lrs) == 1
    assert lrs.pop() <= 0.1


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
