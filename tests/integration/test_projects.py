"""LightningModules as different people write them: each runs unmodified, whatever the strategy.

The catalogue comes first, what is asked of every project of it second. Add a project that is written in another way;
nothing in one may know of this package.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import Accuracy, MeanMetric, MetricCollection

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.integration.steps import STEPS
from tests.networks import quiet_trainer, state_of

# ---- data


def images(count: int = 14) -> Dataset[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (count,), generator=generator))


class Texts(Dataset[Any]):
    """Sentences of different lengths, as dictionaries."""

    def __init__(self, count: int = 14) -> None:
        generator = torch.Generator().manual_seed(6)
        self.ids = torch.randint(1, 11, (count, 5), generator=generator)
        self.lengths = torch.randint(2, 6, (count,), generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        mask = torch.arange(5) < self.lengths[index]
        return {"input_ids": self.ids[index] * mask, "attention_mask": mask, "labels": self.labels[index]}


class ImageData(pl.LightningDataModule):
    """Most projects keep their loaders in a data module."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        self.data = images()

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.hparams["batch_size"])

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class TextData(ImageData):
    def setup(self, stage: str) -> None:
        self.data = Texts()


# ---- the catalogue


def small_convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3),
    )  # fmt: skip


class Template(pl.LightningModule):
    """The template of many repositories: a network passed in, ``_step`` shared, metrics in a collection."""

    def __init__(self, net: nn.Module, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.model = net
        self.criterion = nn.CrossEntropyLoss()
        metrics = MetricCollection({"acc": Accuracy("multiclass", num_classes=3), "loss": MeanMetric()})
        self.train_metrics = metrics.clone("train/")
        self.val_metrics = metrics.clone("val/")
        self.test_metrics = metrics.clone("test/")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def _step(self, batch: Any, metrics: MetricCollection) -> Tensor:
        x, y = batch
        logits = self.forward(x)
        loss = self.criterion(logits, y)
        metrics["acc"](logits, y)
        metrics["loss"](loss.detach())
        self.log_dict({f"{metrics.prefix}{name}": metric for name, metric in metrics.items(keep_base=True)})
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, self.train_metrics)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


class NetworkInHyperparameters(pl.LightningModule):
    """``save_hyperparameters()`` with the network among them, steps without an index, the optimizer passed in."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = net

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch: Any) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def test_step(self, batch: Any) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self.net(x), y))

    def predict_step(self, batch: Any) -> Tensor:
        return self.net(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> Any:
        return self.hparams.optimizer(params=self.parameters())


class OwnLayers(pl.LightningModule):
    """The first example of many tutorials: layers on the module itself, functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_1 = nn.Linear(36, 16)
        self.layer_2 = nn.Linear(16, 16)
        self.layer_3 = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch_size, _channels, _height, _width = x.size()
        x = x.view(batch_size, -1)
        x = F.relu(self.layer_1(x))
        x = torch.relu(self.layer_2(x))
        return F.log_softmax(self.layer_3(x), dim=1)

    def training_step(self, train_batch: Any, batch_idx: int) -> Tensor:
        x, y = train_batch
        loss = F.nll_loss(self.forward(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, val_batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = val_batch
        loss = F.nll_loss(self.forward(x), y)
        self.log("val_loss", loss, prog_bar=True)
        return {"val_loss": loss}

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).exp()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class EncoderDecoder(pl.LightningModule):
    """An autoencoder: ``forward`` calls both halves, the step compares with its input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 36))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)).view(x.shape)

    def _shared_step(self, batch: Any, name: str) -> Tensor:
        x, _ = batch
        loss = F.mse_loss(self(x), x)
        self.log(f"{name}_loss", loss, on_step=name == "train", on_epoch=True)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._shared_step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._shared_step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._shared_step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class EmbeddingForward(EncoderDecoder):
    """The same, but ``forward`` is for inference: it embeds; the step calls the halves itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def _shared_step(self, batch: Any, name: str) -> Tensor:
        x, _ = batch
        z = self.encoder(x)
        loss = F.mse_loss(self.decoder(z), x.view(x.size(0), -1))
        self.log(f"{name}_loss", loss)
        return loss


class InferenceForward(Template):
    """``forward`` gives probabilities to users; the steps call ``self.model`` for logits."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).softmax(dim=1)

    def _step(self, batch: Any, metrics: MetricCollection) -> Tensor:
        x, y = batch
        logits = self.model(x)
        metrics["acc"](logits, y)
        loss = self.criterion(logits, y)
        metrics["loss"](loss.detach())
        self.log_dict({f"{metrics.prefix}{name}": metric for name, metric in metrics.items(keep_base=True)})
        return loss


class LossInForward(pl.LightningModule):
    """``forward`` returns the loss beside the logits if it is given labels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(3)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        h = self.embed(x.squeeze(1))
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        logits = self.head(h.mean(dim=1))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels)
        return logits, loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, loss = self(*batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(*batch)[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        logits, loss = self(batch[0], labels=batch[1])
        self.log_dict({"test_loss": loss, "test_acc": (logits.argmax(dim=1) == batch[1]).double().mean()})

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, _ = self(batch[0])
        return logits

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class TextModel(nn.Module):
    """Like the models of a hub: arguments by name, a mask, the loss inside, an object as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 8, padding_idx=0)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2)])
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        h = self.embeddings(input_ids)
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=~attention_mask)
        mask = attention_mask.unsqueeze(-1)
        logits = self.classifier((h * mask).sum(dim=1) / mask.sum(dim=1))
        return Output(logits, None if labels is None else F.cross_entropy(logits, labels))


class HubStyle(pl.LightningModule):
    """``self.model(**batch)``, as with the models of a hub; the optimizer's groups by name."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TextModel()
        self.accuracy = Accuracy("multiclass", num_classes=3)

    def forward(self, **inputs: Tensor) -> Output:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self(**batch)
        self.log("train_loss", outputs.loss)
        return outputs.loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        outputs = self(**batch)
        self.accuracy(outputs.logits, batch["labels"])
        self.log("val_loss", outputs.loss)
        self.log("val_acc", self.accuracy, metric_attribute="accuracy")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.model(**batch).loss)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def configure_optimizers(self) -> Any:
        no_decay = ["bias", "norm"]
        decayed = [p for n, p in self.model.named_parameters() if not any(part in n for part in no_decay)]
        others = [p for n, p in self.model.named_parameters() if any(part in n for part in no_decay)]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.1, 1 - step / (10 * steps)))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class MaskedDictionaries(HubStyle):
    """Batches as dictionaries, taken apart by the step; the loss is masked there and returned in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 11))  # type: ignore[assignment]

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(batch["input_ids"])
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
        mask = batch["attention_mask"][:, 1:]
        return (losses * mask).sum() / mask.sum()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self._loss(batch)
        return {"loss": loss, "log": {"tokens": int(batch["attention_mask"].sum())}}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_ppl", self._loss(batch).exp(), batch_size=len(batch["labels"]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_ppl", self._loss(batch).exp(), batch_size=len(batch["labels"]))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {"next": self.model(batch["input_ids"]).argmax(dim=-1), "mask": batch["attention_mask"]}


class CollectsOutputs(pl.LightningModule):
    """What used to be ``validation_epoch_end``: outputs in lists, concatenated when the epoch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_convnet()
        self.outputs: dict[str, list[Any]] = {"train": [], "val": [], "test": []}

    def step(self, batch: Any, name: str) -> dict[str, Tensor]:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.outputs[name].append({"loss": loss.detach(), "logits": logits.detach(), "y": y})
        return {"loss": loss, "logits": logits.detach()}

    def end(self, name: str) -> None:
        rows = self.outputs[name]
        logits, y = torch.cat([row["logits"] for row in rows]), torch.cat([row["y"] for row in rows])
        self.log(f"{name}_loss", torch.stack([row["loss"] for row in rows]).mean())
        self.log(f"{name}_acc", (logits.argmax(dim=1) == y).double().mean())
        rows.clear()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.step(batch, "train")

    def on_train_epoch_end(self) -> None:
        self.end("train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self.end("val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch, "test")

    def on_test_epoch_end(self) -> None:
        self.end("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Distillation(pl.LightningModule):
    """A frozen teacher beside the student that learns from it; no ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = small_convnet().eval().requires_grad_(False)
        self.student = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            self.teacher.eval()
            taught = self.teacher(x).softmax(dim=1)
        learned = self.student(x)
        soft = F.kl_div(learned.log_softmax(dim=1), taught, reduction="batchmean")
        hard = F.cross_entropy(learned, y)
        self.log_dict({"soft": soft, "hard": hard})
        return 0.5 * soft + 0.5 * hard

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_agreement", (self.student(x).argmax(1) == self.teacher(x).argmax(1)).double().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.student(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.student.parameters(), lr=1e-2)


class TransferLearning(pl.LightningModule):
    """A pretrained backbone, frozen by ``no_grad`` and ``eval`` inside ``forward``, and a new classifier."""

    def __init__(self) -> None:
        super().__init__()
        backbone = small_convnet()
        self.feature_extractor = backbone[:-1]
        self.feature_extractor.eval()
        self.classifier = nn.Sequential(nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.feature_extractor.eval()
        with torch.no_grad():
            representations = self.feature_extractor(x).flatten(1)
        return self.classifier(representations)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.classifier.parameters(), lr=1e-2)


class TwoHeads(pl.LightningModule):
    """Two tasks on one trunk: two outputs of one call, two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.heads = nn.ModuleDict({"label": nn.Linear(16, 3), "brightness": nn.Linear(16, 1)})
        self.log_variances = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}

    def _losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        out = self(x)
        return F.cross_entropy(out["label"], y), F.mse_loss(out["brightness"].squeeze(1), x.mean(dim=(1, 2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        losses = torch.stack(self._losses(batch))
        weighted = (losses * torch.exp(-self.log_variances) + self.log_variances).sum()
        return {"loss": weighted, "classification": losses[0].detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict(dict(zip(("val_label", "val_brightness"), self._losses(batch), strict=True)))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", sum(self._losses(batch)))

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class BuiltLate(pl.LightningModule):
    """The network is built in ``configure_model``, of a recurrent layer whose state is thrown away."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Recurrent(self.hparams["width"])

    def forward(self, x: Tensor) -> Tensor:
        assert self.net is not None
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss/train", loss, on_step=True, on_epoch=True, prog_bar=True, logger=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss/val", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss/test", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=max(int(steps), 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, _state = self.lstm(x.squeeze(1))
        return self.fc(self.norm(out[:, -1]))


class Manual(Template):
    """Manual optimization, with everything that the loop would do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self._step(batch, self.train_metrics)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="value")
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()


PROJECTS: dict[str, tuple[Callable[[], pl.LightningModule], type[ImageData]]] = {
    "template": (lambda: Template(small_convnet()), ImageData),
    "network in hyperparameters": (
        lambda: NetworkInHyperparameters(small_convnet(), partial(torch.optim.SGD, lr=0.1)),
        ImageData,
    ),
    "own layers": (OwnLayers, ImageData),
    "encoder and decoder": (EncoderDecoder, ImageData),
    "forward embeds": (EmbeddingForward, ImageData),
    "forward for inference": (lambda: InferenceForward(small_convnet()), ImageData),
    "loss in forward": (LossInForward, ImageData),
    "hub style": (HubStyle, TextData),
    "masked dictionaries": (MaskedDictionaries, TextData),
    "collects outputs": (CollectsOutputs, ImageData),
    "distillation": (Distillation, ImageData),
    "transfer learning": (TransferLearning, ImageData),
    "two heads": (TwoHeads, ImageData),
    "built late": (BuiltLate, ImageData),
    "manual": (lambda: Manual(small_convnet()), ImageData),
    **{name: (make, ImageData) for name, make in STEPS.items()},
}

# Their schedule has moved on when the gradient of an epoch's last batch is applied.
SCHEDULED = {"template", "forward for inference", "hub style", "masked dictionaries", "built late"}

# ---- what is asked of every project


def fitted(name: str, strategy: Any, devices: int) -> dict[str, Any]:
    """What a fit of all batches leaves."""
    return live(name, strategy, devices, ("fit",))


def live(
    name: str,
    strategy: Any,
    devices: int,
    what: Sequence[str] = ("validate", "fit", "evaluate"),
    **trainer_arguments: Any,
) -> dict[str, Any]:
    """What a user does with a project, and what comes of it."""
    warnings.simplefilter("ignore")
    make, make_data = PROJECTS[name]
    pl.seed_everything(1)
    module, data = make(), make_data()
    trainer = quiet_trainer(
        max_epochs=2, strategy=strategy, devices=devices, precision="64-true", log_every_n_steps=1, **trainer_arguments
    )
    found: dict[str, Any] = {}
    if "validate" in what:
        found["before"] = trainer.validate(module, datamodule=data, verbose=False)
    found["started"] = state_of(module)
    trainer.fit(module, datamodule=data)
    found["state"] = state_of(module)
    found["metrics"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    if "evaluate" in what:
        found["validated"] = trainer.validate(module, datamodule=data, verbose=False)
        found["tested"] = trainer.test(module, datamodule=data, verbose=False)
        found["predicted"] = trainer.predict(module, datamodule=data)
    return found


def live_all(strategy: str, devices: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Each project with one batch an epoch, and with all of them; all fits must cut at the same place."""

    def same_cut() -> Any:
        return DDGStrategy(balance="parameters") if strategy == "ddg" else strategy

    return {
        name: (live(name, same_cut(), devices, limit_train_batches=1), fitted(name, same_cut(), devices))
        for name in PROJECTS
    }


@pytest.fixture(scope="module")
def auto() -> Any:
    return run_ranks(live_all, 1, "auto", 1)[0]


@pytest.fixture(scope="module")
def one_process() -> Any:
    return run_ranks(live_all, 1, "ddg", 1)[0]


@pytest.fixture(scope="module")
def two_processes() -> Any:
    return run_ranks(live_all, 2, "ddg", 2, timeout=240)


def assert_same(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    """The same nest of the same numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], tolerance)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, tolerance)
    else:
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_trains_as_in_one_process_and_is_whole_on_all_ranks(
    name: str, one_process: Any, two_processes: Any
) -> None:
    first, expected = one_process[name]
    for rank in two_processes:
        assert_same((first, expected), rank[name])
    trained = [key for key in expected["state"] if not key.startswith(("teacher", "feature_extractor"))]
    moved = [key for key in trained if not torch.equal(expected["state"][key], first["started"][key])]
    assert len(moved) > len(trained) / 2, moved


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_is_evaluated_as_without_the_strategy(name: str, auto: Any, two_processes: Any) -> None:
    for rank in two_processes:
        assert_same(auto[name][0]["before"], rank[name][0]["before"])


@pytest.mark.parametrize("name", [name for name in PROJECTS if name not in SCHEDULED])
def test_one_batch_an_epoch_trains_as_without_the_strategy(name: str, auto: Any, two_processes: Any) -> None:
    """Where every batch is drained before the next one comes, no gradient is stale."""
    for rank in two_processes:
        for key in ("state", "validated", "tested", "predicted"):
            assert_same(auto[name][0][key], rank[name][0][key])


# ---- what cannot be followed in several processes


class MeanTeacher(Distillation):
    """The teacher is a moving average of the student."""

    def __init__(self, when: str, how: str = "in place") -> None:
        super().__init__()
        self.student = small_convnet()
        # Some leave the copy as it is, and nothing computes a gradient for it.
        self.teacher = copy.deepcopy(self.student).requires_grad_(how == "wanting gradients")
        self.when, self.how = when, how

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)  # type: ignore[no-any-return]

    def follow(self, when: str) -> None:
        if when != self.when:
            return
        for average, parameter in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if self.how in ("in place", "wanting gradients"):
                with torch.no_grad():
                    average.mul_(0.9).add_(parameter, alpha=0.1)
            elif self.how == "data":
                average.data.mul_(0.9).add_(parameter.data, alpha=0.1)
            else:
                average.data = average.data * 0.9 + parameter.data * 0.1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.follow("batch")

    def on_train_epoch_end(self) -> None:
        self.follow("epoch")


class TwoViews(nn.Module):
    """A network with its average inside, whose weights want gradients and get none."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = small_convnet()
        self.target = copy.deepcopy(self.backbone)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)  # type: ignore[no-any-return]


class Bootstraps(MeanTeacher):
    """The step calls the network and its average, and moves the average (as BYOL does)."""

    def __init__(self, when: str, how: str) -> None:
        super().__init__(when, how)
        self.net = TwoViews()
        del self.student, self.teacher

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            target = self.net.target(batch[0])
        loss = F.mse_loss(self.net(batch[0]), target + 1)
        for average, parameter in zip(self.net.target.parameters(), self.net.backbone.parameters(), strict=True):
            average.data = average.data * 0.9 + parameter.data * 0.1
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass

    on_train_epoch_end = pl.LightningModule.on_train_epoch_end  # type: ignore[assignment]
    validation_step = pl.LightningModule.validation_step  # type: ignore[assignment]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=1e-2)


def fit_bootstraps(devices: int) -> tuple[bool, str]:
    module = Bootstraps("step", "")
    before = state_of(module.net.target)
    try:
        quiet_trainer(max_epochs=1, strategy="ddg", devices=devices).fit(module, datamodule=ImageData())
    except RuntimeError as error:
        return False, str(error)
    return any(not torch.equal(value, before[name]) for name, value in state_of(module.net.target).items()), ""


def test_an_average_inside_the_network_is_refused_in_several_processes() -> None:
    assert run_ranks(fit_bootstraps, 1, 1)[0] == (True, "")
    for _, error in run_ranks(fit_bootstraps, 2, 2):
        assert "'net.target.0.weight' changes without a gradient. It is a copy of 'net.backbone.0.weight'" in error


def fit_mean_teacher(when: str, how: str, devices: int) -> tuple[bool, str]:
    """Whether the teacher has moved, and the error if there was one."""
    module = MeanTeacher(when, how)
    before = state_of(module.teacher)
    trainer = quiet_trainer(max_epochs=2, strategy="ddg", devices=devices)
    try:
        trainer.fit(module, datamodule=ImageData())
    except RuntimeError as error:
        return False, str(error)
    return any(not torch.equal(value, before[name]) for name, value in state_of(module.teacher).items()), ""


@pytest.mark.parametrize(
    ("when", "how"),
    [
        ("batch", "in place"),
        ("epoch", "in place"),
        ("batch", "data"),
        ("epoch", "new data"),
        ("batch", "wanting gradients"),
    ],
)
def test_a_mean_teacher_trains_in_one_process_and_is_refused_in_several(when: str, how: str) -> None:
    assert run_ranks(fit_mean_teacher, 1, when, how, 1)[0] == (True, "")
    for _, error in run_ranks(fit_mean_teacher, 2, when, how, 2):
        assert "'teacher.0.weight' changes without a gradient. It is a copy of 'student.0.weight'" in error
        assert "stage 1" in error
        assert "`devices=1`" in error


class BuildsLate(Template):
    """A module that is built when it is first needed."""

    def __init__(self) -> None:
        super().__init__(small_convnet())
        self.projector: nn.Module | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.projector is None:
            self.projector = nn.Linear(3, 3)
        return loss


def fit_what_builds_late(devices: int) -> str:
    try:
        quiet_trainer(max_epochs=1, strategy="ddg", devices=devices).fit(BuildsLate(), datamodule=ImageData())
    except RuntimeError as error:
        return str(error)
    return ""


def test_parameters_that_a_step_makes_are_refused_in_several_processes() -> None:
    assert run_ranks(fit_what_builds_late, 1, 1) == [""]
    for error in run_ranks(fit_what_builds_late, 2, 2):
        assert "The training step has made 'projector.bias', 'projector.weight', which the optimizer does not" in error


class Twins(nn.Module):
    """Two halves of the same names and shapes, both of which train."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 36))
        self.decoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 36))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))[:, :3]  # type: ignore[no-any-return]


def fit_twins() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(max_epochs=2, strategy="ddg", devices=2).fit(Template(Twins()), datamodule=ImageData())
    return [str(warning.message) for warning in caught if "not compared" in str(warning.message)]


def test_layers_that_are_alike_by_name_train_and_are_proved() -> None:
    assert run_ranks(fit_twins, 2) == [[], []]


def fit_with_a_frozen_copy(when: str) -> None:
    """A teacher that is left alone is what it was."""
    module = MeanTeacher(when)
    quiet_trainer(max_epochs=2, strategy="ddg", devices=2).fit(module, datamodule=ImageData())


def test_a_frozen_copy_that_does_not_follow_is_left_alone() -> None:
    run_ranks(fit_with_a_frozen_copy, 2, "never")
