"""The digits recipe lives here: a small residual network and its data; any Lightning idiom may be shown here.

It is an ordinary Lightning project that knows nothing of stages: which strategy trains it, and with which optimizer,
is said in ``digits.yaml`` alone.
"""

from __future__ import annotations

import torch
from lightning import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

CLASSES = 10
SPLIT = (1197, 240, 360)  # training, validation and test images, of 1797
SPLIT_SEED = 0

Batch = tuple[Tensor, ...]  # images and labels, as TensorDataset types them


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut around them.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the first convolution; 2 halves the image's sides.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, inputs, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        return functional.relu(self.body(images) + self.shortcut(images))


class DigitsModule(LightningModule):
    """Classifies 8x8 grey images with a residual network of five blocks.

    Args:
        width: Channels of the first blocks; the last ones have twice as many.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            ResidualBlock(width, width),
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 2 * width),
            ResidualBlock(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, CLASSES),
        )
        self.val_acc = MulticlassAccuracy(CLASSES, average="micro")
        self.test_acc = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, 1, 8, 8)`` in [0, 1] to logits ``(batch, 10)``."""
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", functional.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc)


class DigitsData(LightningDataModule):
    """scikit-learn's handwritten digits: 1797 images that come with that package, so nothing is downloaded.

    The split into training, validation and test images is the same in every run, whatever the run's seed.

    Args:
        batch_size: Images in a batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train: Subset[Batch]
        self.val: Subset[Batch]
        self.test: Subset[Batch]

    def setup(self, stage: str) -> None:
        """Load the images as ``(1797, 1, 8, 8)`` in [0, 1], the labels as ``(1797,)``, and split them."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        dataset = TensorDataset(images, torch.tensor(labels, dtype=torch.int64))
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        self.train, self.val, self.test = random_split(dataset, SPLIT, generator)

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.test, self.batch_size)
