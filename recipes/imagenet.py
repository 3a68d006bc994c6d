"""An ImageNet folder lives here, or any folder of photographs by class; how they are read and augmented may be
changed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from recipes.folders import image_folder

Batch = tuple[Tensor, Tensor]  # images (batch, 3, size, size) and labels (batch,)

# Mean and standard deviation of red, green and blue that torchvision's own ImageNet weights are used with.
NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageNetData(LightningDataModule):
    """Photographs in ``train/<class>/`` and ``val/<class>/``, as ImageNet's are once unpacked.

    Training images are cropped, scaled and flipped at random, the others scaled and cropped at the centre, as in
    He et al., *Deep Residual Learning for Image Recognition*, and Szegedy et al., *Going Deeper with Convolutions*.

    Args:
        root: The folder that holds ``train`` and ``val``.
        size: Sides of the images given, in pixels.
        batch_size: Images in a batch.
        num_workers: Processes that read images.

    Raises:
        FileNotFoundError: At ``setup``, if ``root`` does not hold the images.
    """

    def __init__(self, root: str = "runs/data/imagenet", size: int = 224, batch_size: int = 256, num_workers: int = 8):
        super().__init__()
        self.root = Path(root)
        self.batch_size = batch_size
        self.num_workers = num_workers
        end = [transforms.ToTensor(), transforms.Normalize(*NORMALIZATION)]
        crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        self.train_transform = transforms.Compose([*crop, *end])
        # Eight sevenths: the usual 256 for 224.
        self.val_transform = transforms.Compose([transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), *end])
        self.train: Dataset[Any]
        self.val: Dataset[Any]

    def setup(self, stage: str) -> None:
        """Find the images; they are read batch by batch."""
        try:
            self.train = image_folder(self.root / "train", self.train_transform)
            self.val = image_folder(self.root / "val", self.val_transform)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"root={str(self.root)!r} does not hold images in train/<class>/ and val/<class>/. ImageNet cannot be "
                f"downloaded without an account at image-net.org: unpack it so, and set `root` to its folder. ({error})"
            ) from error

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val)

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False) -> DataLoader[Batch]:
        workers = self.num_workers
        return DataLoader(dataset, self.batch_size, shuffle, num_workers=workers, persistent_workers=workers > 0)
