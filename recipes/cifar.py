"""CIFAR-10 and CIFAR-100 live here, downloaded or from a folder; how their images are read and augmented may be
changed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100

from recipes.folders import image_folder

Batch = tuple[Tensor, Tensor]  # images (batch, 3, 32, 32) and labels (batch,)

DATASETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}

# Mean and standard deviation of red, green and blue over all pixels of all training images, where white is 1
# (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, describes the images).
NORMALIZATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class CifarData(LightningDataModule):
    """The 50 000 training and 10 000 test images of CIFAR-10 or CIFAR-100, 32x32 pixels each.

    They are read from ``root`` in the layout of torchvision's download, or, if ``root`` has a folder ``train``, as
    image files ``train/<class>/*`` and ``test/<class>/*``. Training images are padded by 4 pixels, cropped to 32x32 at
    random and flipped at random; all are normalised.

    Validation is on the test images, as in the papers whose curves and best accuracies one compares with: choose
    nothing by it that you then report as a test.

    Args:
        root: The folder that holds the data.
        dataset: Which of the two.
        download: Whether torchvision may download what is missing into ``root``.
        batch_size: Images in a batch.
        num_workers: Processes that read images.

    Raises:
        FileNotFoundError: At ``setup``, if ``root`` does not hold the data.
    """

    def __init__(
        self,
        root: str = "runs/data",
        dataset: Literal["cifar10", "cifar100"] = "cifar10",
        download: bool = False,
        batch_size: int = 128,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.dataset = dataset
        self.download = download
        self.batch_size = batch_size
        self.num_workers = num_workers
        normalize = [transforms.ToTensor(), transforms.Normalize(*NORMALIZATION[dataset])]
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        self.train_transform = transforms.Compose([*augment, *normalize])
        self.test_transform = transforms.Compose(normalize)
        self.train: Dataset[Any]
        self.test: Dataset[Any]

    def prepare_data(self) -> None:
        """Download the data set, if asked to and if it is not there."""
        if self.download and not self._is_image_folder():
            DATASETS[self.dataset](str(self.root), download=True)

    def setup(self, stage: str) -> None:
        """Find the images; they are read batch by batch."""
        self.train = self._part(train=True)
        self.test = self._part(train=False)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test)

    def _is_image_folder(self) -> bool:
        return (self.root / "train").is_dir()

    def _part(self, train: bool) -> Dataset[Any]:
        transform = self.train_transform if train else self.test_transform
        try:
            if self._is_image_folder():
                return image_folder(self.root / ("train" if train else "test"), transform)
            return DATASETS[self.dataset](str(self.root), train, transform)
        except (FileNotFoundError, RuntimeError) as error:  # RuntimeError: torchvision's archive is missing or damaged
            raise FileNotFoundError(
                f"root={str(self.root)!r} does not hold {self.dataset}. Set `download: true` to download it there, or "
                "set `root` to a folder that holds torchvision's download, or image files in train/<class>/ and "
                f"test/<class>/. ({error})"
            ) from error

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False) -> DataLoader[Batch]:
        workers = self.num_workers
        return DataLoader(dataset, self.batch_size, shuffle, num_workers=workers, persistent_workers=workers > 0)
