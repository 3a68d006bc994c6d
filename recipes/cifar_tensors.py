"""CIFAR held in memory as one tensor lives here, for many short fits on a small machine; how it is decoded, chosen from
and augmented may be changed here.

``cifar.py`` reads the same images one by one. What it does to each of them is done here to a batch at once, without
worker processes.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.datasets import ImageFolder

from recipes.cifar import DATASETS, NORMALIZATION

Batch = tuple[Tensor, Tensor]  # images (batch, 3, 32, 32) and labels (batch,)

PADDING = 4
SIDE = 32
EVALUATED = 500  # images of a batch that is only evaluated: none of its activations are kept


class Images(NamedTuple):
    """Images and what they show.

    Attributes:
        pixels: ``(images, 3, 32, 32)``, uint8.
        labels: ``(images,)``, int64.
    """

    pixels: Tensor
    labels: Tensor


# ---- what is done to images


def crop_and_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pads each image by 4 black pixels, cuts 32x32 out of it at random, and mirrors every second one at random.

    Each image's place is drawn for itself, as by torchvision's ``RandomCrop(32, padding=4)`` and
    ``RandomHorizontalFlip()`` on one image after the other.

    Args:
        pixels: ``(batch, 3, 32, 32)``.
        generator: Draws the places.

    Returns:
        The same shape and type, channels last in memory, which convolutions on a CPU are faster with.
    """
    count = len(pixels)
    padded = functional.pad(pixels, (PADDING,) * 4)
    top, left = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    along = torch.arange(SIDE)
    rows = top + along
    columns = left + torch.where(mirrored, along.flip(0), along)
    cut = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)


def normalize(pixels: Tensor, dataset: str) -> Tensor:
    """Maps uint8 images ``(batch, 3, height, width)`` to floats of about mean 0 and variance 1 in each colour."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATION[dataset])
    return (pixels / 255 - mean) / std


def balanced(labels: Tensor, count: int) -> Tensor:
    """Chooses the first images of each class, as many of each.

    Args:
        labels: ``(images,)``.
        count: How many in all.

    Returns:
        Their indices, in the order of ``labels``.

    Raises:
        ValueError: If ``count`` is no multiple of the number of classes, or there are too few images.
    """
    classes, sizes = labels.unique(return_counts=True)
    each, rest = divmod(count, len(classes))
    if rest or not 0 < each <= sizes.min():
        most = int(sizes.min()) * len(classes)
        raise ValueError(
            f"{count} images cannot be chosen with as many of each class: give a multiple of {len(classes)},"
            f" {most} at most."
        )
    chosen = torch.cat([(labels == label).nonzero()[:each, 0] for label in classes])
    return chosen.sort().values


# ---- where they come from


def read_images(root: Path, dataset: str, cache: Path) -> dict[str, Images]:
    """Reads the images ``"train"`` and ``"test"``, decoding files only the first time.

    Args:
        root: A folder with torchvision's download, a folder with ``train/<class>/`` and ``test/<class>/``, or a tar
            archive of the latter.
        dataset: Which of CIFAR's two.
        cache: The folder for what has been decoded.

    Raises:
        FileNotFoundError: If ``root`` does not hold the data.
    """
    files = root.is_file() or (root / "train").is_dir()
    kept = cache / f"{root.name}-{_fingerprint(root)}.npz"
    try:
        if not files:
            return {"train": _downloaded(root, dataset, True), "test": _downloaded(root, dataset, False)}
        if not kept.exists():
            _keep(kept, _from_archive(root) if root.is_file() else _from_folder(root))
    except (FileNotFoundError, RuntimeError, tarfile.TarError) as error:
        raise FileNotFoundError(
            f"root={str(root)!r} does not hold {dataset}. Give a folder with torchvision's download (`--data.download"
            " true` of the recipe `resnet_cifar` makes one), or a folder or a tar archive with image files in"
            f" train/<class>/ and test/<class>/. ({error})"
        ) from error
    with np.load(kept) as arrays:
        return {
            part: Images(torch.from_numpy(arrays[f"{part}_pixels"]), torch.from_numpy(arrays[f"{part}_labels"]))
            for part in ("train", "test")
        }


Arrays = dict[str, NDArray[Any]]


def _fingerprint(root: Path) -> str:
    """Changes when an archive does, or a class is added to a folder."""
    places = [root, *sorted(root.glob("*/*"))] if root.is_dir() else [root]
    stats = [(place.name, place.stat().st_size, place.stat().st_mtime_ns) for place in places if place.exists()]
    return hashlib.sha256(repr((str(root.resolve()), stats)).encode()).hexdigest()[:12]


def _downloaded(root: Path, dataset: str, train: bool) -> Images:
    found = DATASETS[dataset](str(root), train)
    return Images(torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets))


def _from_folder(root: Path) -> Arrays:
    arrays = {}
    for part in ("train", "test"):
        found = ImageFolder(str(root / part), np.asarray)
        arrays |= _arrays(part, [pixels for pixels, _ in found], found.targets)
    return arrays


def _from_archive(root: Path) -> Arrays:
    # Read in the archive's order, because going back in a compressed file means starting again, and sorted afterwards.
    decoded: dict[str, dict[tuple[str, str], NDArray[np.uint8]]] = {"train": {}, "test": {}}
    with tarfile.open(root) as archive:
        for member in archive:
            place = PurePosixPath(member.name).parts[-3:]
            file = archive.extractfile(member)
            if file is not None and len(place) == 3 and place[0] in decoded:
                decoded[place[0]][place[1:]] = np.asarray(Image.open(file).convert("RGB"))
    arrays = {}
    for part, images in decoded.items():
        if not images:
            raise FileNotFoundError(f"it has no files {part}/<class>/<image>")
        order = sorted(images)
        classes = sorted({name for name, _ in order})
        arrays |= _arrays(part, [images[place] for place in order], [classes.index(name) for name, _ in order])
    return arrays


def _arrays(part: str, pixels: Sequence[NDArray[np.uint8]], labels: Sequence[int]) -> Arrays:
    stacked = np.stack(pixels).transpose(0, 3, 1, 2)
    return {f"{part}_pixels": np.ascontiguousarray(stacked), f"{part}_labels": np.asarray(labels, dtype=np.int64)}


def _keep(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be decoding too, and this one may be killed: the file appears whole or not at all.
    partial = path.with_suffix(f".{os.getpid()}.part")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


# ---- batches of them


class Batches:
    """An iterable of batches; training batches come in a new order, augmented anew, each time it is gone through.

    Order and augmentation depend on the seed and on how often it has been gone through, and on nothing else that is
    drawn: fits with the same seed see the same batches whatever they draw themselves.

    Args:
        images: What it gives.
        dataset: Which of CIFAR's two, for the normalisation.
        batch_size: Images in a batch; the last one has what is left.
        seed: Of training batches; ``None`` gives all images in their order, as they are.
    """

    def __init__(self, images: Images, dataset: str, batch_size: int, seed: int | None = None) -> None:
        self.images = images
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self._rounds = 0

    def __len__(self) -> int:
        return -(-len(self.images.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        pixels, labels = self.images
        if self.seed is None:
            for some, shown in zip(pixels.split(self.batch_size), labels.split(self.batch_size), strict=True):
                yield normalize(some.contiguous(memory_format=torch.channels_last), self.dataset), shown
            return
        # Mixed, because torch's generator takes no more than 32 bits of a seed.
        (mixed,) = np.random.SeedSequence((self.seed, self._rounds)).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed))
        self._rounds += 1
        for chosen in torch.randperm(len(labels), generator=generator).split(self.batch_size):
            yield normalize(crop_and_flip(pixels[chosen], generator), self.dataset), labels[chosen]


class CifarTensors(LightningDataModule):
    """CIFAR-10 or CIFAR-100, or a part of it with as many images of each class, in memory.

    Validation is on the test images, as in ``cifar.py``.

    Args:
        root: A folder with torchvision's download, or a folder or a tar archive with image files in
            ``train/<class>/`` and ``test/<class>/``.
        dataset: Which of the two.
        train_images: How many training images to use; all of them if not given.
        test_images: How many test images to use; all of them if not given.
        batch_size: Images in a training batch.
        seed: Of the training batches' order and augmentation.
        cache: The folder for images that have been decoded.

    Raises:
        FileNotFoundError: At ``prepare_data`` or ``setup``, if ``root`` does not hold the data.
        ValueError: At ``setup``, if so many images cannot be chosen.
    """

    def __init__(
        self,
        root: str = "runs/data",
        dataset: Literal["cifar10", "cifar100"] = "cifar10",
        train_images: int | None = None,
        test_images: int | None = None,
        batch_size: int = 128,
        seed: int = 1,
        cache: str = "runs/cache",
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.dataset = dataset
        self.counts = {"train": train_images, "test": test_images}
        self.batch_size = batch_size
        self.seed = seed
        self.cache = Path(cache)
        self.parts: dict[str, Images] = {}

    def prepare_data(self) -> None:
        """Decode the images, if they have not been decoded before."""
        read_images(self.root, self.dataset, self.cache)

    def setup(self, stage: str) -> None:
        """Load the images and choose from them."""
        for part, images in read_images(self.root, self.dataset, self.cache).items():
            count = self.counts[part]
            if count is not None:
                chosen = balanced(images.labels, count)
                images = Images(images.pixels[chosen], images.labels[chosen])
            self.parts[part] = images

    def train_dataloader(self) -> Batches:
        return Batches(self.parts["train"], self.dataset, self.batch_size, self.seed)

    def val_dataloader(self) -> Batches:
        return Batches(self.parts["test"], self.dataset, EVALUATED)

    def test_dataloader(self) -> Batches:
        return self.val_dataloader()
