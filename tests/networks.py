"""Small networks, data and LightningModules that the tests train; add one when a test needs a kind that is missing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# Lightning 2.5 has neither the argument nor a `val_check_interval` in seconds.
BEFORE_2_6 = "weights_only" not in inspect.signature(pl.Trainer.fit).parameters
SAFELY: dict[str, Any] = {} if BEFORE_2_6 else {"weights_only": True}


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


def tanh_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)
    )  # fmt: skip


def noisy_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Linear(16, 16), nn.BatchNorm1d(16, momentum=None), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.BatchNorm1d(16), nn.Linear(16, 3),
    )  # fmt: skip


class UNet(nn.Module):
    """Two levels: what the way down keeps crosses every cut between the two ends."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = self.block(1, 4)
        self.down2 = self.block(4, 6)
        self.bottom = self.block(6, 8)
        self.up2 = self.block(14, 6)
        self.up1 = self.block(10, 4)
        self.head = nn.Linear(4, 3)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        y = self.bottom(nn.functional.max_pool2d(second, 2, ceil_mode=True))
        y = self.up2(torch.cat([nn.functional.interpolate(y, size=second.shape[-2:]), second], dim=1))
        y = self.up1(torch.cat([nn.functional.interpolate(y, size=first.shape[-2:]), first], dim=1))
        return self.head(y.mean(dim=(2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("seen", torch.ones(context, context).tril().bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~self.seen[:length, :length], float("-inf"))
        weights = nn.functional.dropout(scores.softmax(dim=-1), self.dropout, training=self.training)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class GPTBlock(nn.Module):
    def __init__(self, width: int, context: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, 2, context, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Written by hand, as people do: an assertion, a parameter of its own, functional dropout, a loop over blocks."""

    def __init__(self, dropout: float = 0.0, layers: int = 2) -> None:
        super().__init__()
        self.context, self.dropout = 8, dropout
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.randn(self.context, 8) / 10)
        self.blocks = nn.ModuleList([GPTBlock(8, self.context, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        assert length <= self.context, f"{length} tokens are more than the context of {self.context}"
        x = self.tokens(tokens) + self.positions[:length]
        x = nn.functional.dropout(x, self.dropout, training=self.training)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def dropout_gpt() -> nn.Module:
    return GPT(dropout=0.2)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "convnet": convnet,
    "transformer": transformer,
    "dropout_mlp": dropout_mlp,
    "tanh_mlp": tanh_mlp,
    "noisy_mlp": noisy_mlp,
    "unet": UNet,
    "gpt": GPT,
    "dropout_gpt": dropout_gpt,
}


def dataset(network: str, count: int = 22) -> TensorDataset:
    """``count`` samples for a network: with batches of 5, the last one has 2."""
    generator = torch.Generator().manual_seed(7)
    if network in ("convnet", "unet"):
        x: Tensor = torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    elif network in ("transformer", "gpt", "dropout_gpt"):
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


def seeded_network(network: str) -> nn.Module:
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
