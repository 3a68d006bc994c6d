"""LightningModules whose training step is more than one call of one network: for ``test_projects.py``.

Batches are images of 1 x 6 x 6 and one of 3 labels each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric


class Step(pl.LightningModule):
    """Every step gives a loss, and predictions are what :meth:`predicted` makes of the images."""

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def predicted(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.predicted(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Autoencoder(nn.Module):
    """A network with methods, and a ``forward`` for inference."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.down = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.up = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 36))

    def encode(self, x: Tensor) -> Tensor:
        return self.down(x) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        return self.up(z).view(-1, 1, 6, 6)

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.decode(self.encode(x)), x)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


class Methods(Step):
    """The step calls methods of the network that are not its ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Autoencoder()

    def loss(self, batch: Any) -> Tensor:
        return self.net.loss(batch[0])

    def predicted(self, x: Tensor) -> Tensor:
        return self.net(x)


class Contrastive(Step):
    """Two views of each image go through one network with normalisation, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4)
        )

    def loss(self, batch: Any) -> Tensor:
        one, other = self.net(batch[0]), self.net(batch[0].flip(-1) + 0.1)
        return -F.cosine_similarity(one, other).mean() + 0.1 * one.square().mean()

    def predicted(self, x: Tensor) -> Tensor:
        return self.net(x)


class Variational(Step):
    """Modules called in turn, with noise and a part of the loss between them; no ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(16, 4), nn.Linear(16, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 36))

    def loss(self, batch: Any) -> Tensor:
        h = self.encoder(batch[0])
        mean, log_variance = self.mean(h), self.log_variance(h)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        z = mean + self.noise(mean) * (0.5 * log_variance).exp()
        reconstruction = F.mse_loss(self.decoder(z), batch[0].flatten(1), reduction="none").sum(1).mean()
        if self.training:
            self.log_dict({"kl": divergence, "reconstruction": reconstruction.detach()})
        return reconstruction + 0.1 * divergence

    def noise(self, like: Tensor) -> Tensor:
        # Stages draw other numbers than a whole network does, and all ways of training shall agree here.
        return torch.zeros_like(like)

    def predicted(self, x: Tensor) -> Tensor:
        return self.decoder(self.mean(self.encoder(x)))


class DeepSupervision(Step):
    """Bare lists of layers and a position embedding on the module; a loss at every depth, with the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.position = nn.Parameter(torch.zeros(1, 6, 8))
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(3)])
        self.accuracy = Accuracy("multiclass", num_classes=3)

    def outputs(self, x: Tensor) -> list[Tensor]:
        h = self.embed(x.squeeze(1)) + self.position
        outputs = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            h = h + torch.tanh(block(h))
            outputs.append(head(h.mean(1)))
        return outputs

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        outputs = self.outputs(x)
        losses = [F.cross_entropy(output, y) for output in outputs]
        self.accuracy(outputs[-1], y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return sum(losses) / len(losses)  # type: ignore[return-value]

    def predicted(self, x: Tensor) -> Tensor:
        return torch.stack(self.outputs(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.mid, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        h, hidden = self.rnn(x, hidden)
        return self.head(torch.tanh(self.mid(h))), hidden


class TruncatedBackprop(Step):
    """A hidden state goes from batch to batch, and a count, by which the loss is weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Recurrent()
        self.hidden: Tensor | None = None
        self.batches = 0

    def on_train_epoch_start(self) -> None:
        self.hidden = None

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0].squeeze(1), None)[0], batch[0].squeeze(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].squeeze(1)
        hidden = self.hidden if self.hidden is not None and self.hidden.shape[1] == len(x) else None
        y, hidden = self.net(x / (1 + 0.1 * self.batches), hidden)
        loss = F.mse_loss(y, x) * (1 + 0.5 ** (1 + self.batches))
        self.hidden = hidden.detach()
        self.batches += 1
        return loss

    def predicted(self, x: Tensor) -> Tensor:
        return self.net(x.squeeze(1), None)[0]


class Denoising(Step):
    """A network learns the noise that the step has added: what is drawn is used on both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(4, 8)
        self.enter = nn.Linear(36, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.leave = nn.Linear(8, 36)

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = h + block(F.silu(h + self.time(t)))
        return self.leave(h)

    def loss(self, batch: Any) -> Tensor:
        x = batch[0].flatten(1)
        t = (x.sum(1) * 10).long() % 4
        noise = x.roll(1, 0)
        alpha = ((t + 1) / 5).unsqueeze(1)
        return F.mse_loss(self.denoised(alpha * x + (1 - alpha) * noise, t), noise)

    def predicted(self, x: Tensor) -> Tensor:
        return self.denoised(x, torch.zeros(len(x), dtype=torch.long))


class Sometimes(Step):
    """Returns no loss for some batches, and a dictionary, which a hook uses, for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.mean = MeanMetric()

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.head(self.body(batch[0]))
        if batch_idx == 1:
            return None
        loss = F.cross_entropy(logits, batch[1])
        return {"loss": loss, "logits": logits.detach(), "right": int(logits.argmax(1).eq(batch[1]).sum())}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs and "logits" in outputs:
            self.mean.update(outputs["logits"].mean())

    def on_train_epoch_end(self) -> None:
        self.log("mean", self.mean)

    def predicted(self, x: Tensor) -> Tensor:
        return self.body(x)


class SeveralSamples(nn.Module):
    """Evaluated, it gives two outputs an image, one after the other, as ensembles and Bayesian networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(h if self.training else torch.cat([h, -h]))


class LossAroundNetwork(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(self.net(view), y) for view in (x, x.flip(-1))]).mean()


class LossHoldsNetwork(Step):
    """The network is called by the loss, as with an evidence lower bound, and by itself only in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SeveralSamples()
        self.criterion = LossAroundNetwork(self.net)

    def loss(self, batch: Any) -> Tensor:
        if self.training:
            return self.criterion(*batch)
        return F.cross_entropy(self.predicted(batch[0]), batch[1])

    def predicted(self, x: Tensor) -> Tensor:
        return self.net(x).unflatten(0, (2, -1)).mean(0)


class Rescaled(MeanMetric):
    """A loss that is told by the network's ``forward`` how its outputs are to be read."""

    def rescaled(self, x: Tensor, how: str) -> Tensor:
        self.how = how
        return 2 * x

    def read(self, x: Tensor) -> Tensor:
        return getattr(torch, self.how)(x)


class LeavesForTheLoss(Step):
    """``forward`` leaves in an attribute of the loss what the step needs after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.rescale = Rescaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.rescale.rescaled(self.head(self.body(x)), "sinh")

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.rescale.read(self(batch[0])), batch[1])

    def predicted(self, x: Tensor) -> Tensor:
        return self.rescale.read(self(x))


STEPS: dict[str, Callable[[], pl.LightningModule]] = {
    "methods": Methods,
    "two calls": Contrastive,
    "modules in turn": Variational,
    "a loss at every depth": DeepSupervision,
    "hidden state": TruncatedBackprop,
    "noise on both ends": Denoising,
    "no loss for some": Sometimes,
    "the loss holds the network": LossHoldsNetwork,
    "left for the loss": LeavesForTheLoss,
}
