"""The LightningModule of all image recipes lives here; what a classifier computes and logs may be changed here.

The network comes from a recipe's YAML file, as do the optimizer and its schedule.
"""

from __future__ import annotations

from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]  # images (batch, 3, height, width) and labels (batch,)


class ImageClassifier(LightningModule):
    """Trains a network that maps images to logits, by cross-entropy.

    Args:
        network: Maps images ``(batch, 3, height, width)`` to logits ``(batch, classes)``.
        classes: Number of logits that the network gives.
    """

    def __init__(self, network: nn.Module, classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="network")
        self.network = network
        self.train_acc = MulticlassAccuracy(classes, average="micro")
        self.val_acc = MulticlassAccuracy(classes, average="micro")
        self.test_acc = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, 3, height, width)`` to logits ``(batch, classes)``."""
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        return self.training_loss(self(images), labels)

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Log how good logits ``(batch, classes)`` of a training batch are, and return their loss."""
        loss = functional.cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", functional.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.test_acc(logits, labels)
        self.log("test_loss", functional.cross_entropy(logits, labels))
        self.log("test_acc", self.test_acc)
