"""Small networks, data and LightningModules that the tests train; add one when a test needs a kind that is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class MeanOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 10),
        nn.LayerNorm(10),
        nn.Tanh(),
        nn.Linear(10, 10),
        nn.ReLU(inplace=True),
        nn.Linear(10, 8),
        nn.Linear(8, 3),
    )


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 8), nn.PReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def transformer() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(11, 8),
        SelfAttention(8, 2),
        nn.Linear(8, 8),
        nn.GELU(),
        SelfAttention(8, 2),
        MeanOverTime(),
        nn.Linear(8, 3),
    )


def dropout_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.Dropout(0.3),
        nn.Linear(16, 16),
        nn.Dropout(0.5),
        nn.Linear(16, 3),
    )


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "mlp": mlp,
    "convnet": convnet,
    "transformer": transformer,
    "dropout_mlp": dropout_mlp,
}


def dataset(network: str, count: int = 22) -> TensorDataset:
    """``count`` samples for a network: with batches of 5, the last one has 2."""
    generator = torch.Generator().manual_seed(7)
    if network == "convnet":
        x: Tensor = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    elif network == "transformer":
        x = torch.randint(0, 11, (count, 5), generator=generator)
    else:
        x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (count,), generator=generator))


def loader(network: str, count: int = 22, batch_size: int = 5) -> DataLoader[Any]:
    return DataLoader(dataset(network, count), batch_size=batch_size)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True),
}


def seeded_network(network: str) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return NETWORKS[network]().double()


class Classifier(pl.LightningModule):
    """An ordinary module: the network in a child, called through ``forward``."""

    def __init__(self, network: str = "mlp", optimizer: str = "sgd", step_lr: bool = True) -> None:
        super().__init__()
        self.net = seeded_network(network)
        self.optimizer_name, self.step_lr = optimizer, step_lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", nn.functional.cross_entropy(self.net(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer_name](self.parameters())
        if not self.step_lr:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ManualClassifier(Classifier):
    """The manual twin of :class:`Classifier`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        optimizer = self.optimizers()
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_epoch=True)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        schedulers = self.lr_schedulers()
        if schedulers is not None:
            schedulers.step()


def quiet_trainer(**kwargs: Any) -> pl.Trainer:
    """A Trainer without anything that prints or writes, unless asked for."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **kwargs})


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference between two state dicts with the same keys."""
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
