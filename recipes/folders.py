"""Folders of image files by class are read here, for every recipe that takes one; their order may be changed here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder

ORDER_SEED = 0


def image_folder(folder: Path, transform: Callable[[Any], Tensor]) -> Dataset[tuple[Tensor, int]]:
    """Find the images ``folder/<class>/*``, in an order that is mixed and always the same.

    So the first images are of all classes, and a validation cut short by ``limit_val_batches`` judges them all.

    Args:
        folder: The folder that holds a folder for each class.
        transform: Makes a tensor of an image.

    Raises:
        FileNotFoundError: If there is no such folder, or no image in one of the classes.
    """
    images = ImageFolder(str(folder), transform)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(ORDER_SEED))
    return Subset(images, order.tolist())
