"""Tests of the CIFAR data live here: both layouts, what is done to the images, and what is said if they are missing."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from recipes.cifar import CifarData


def test_an_image_folder_gives_normalised_batches(image_folder: Path) -> None:
    data = CifarData(str(image_folder), batch_size=5, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    for loader, batches in ((data.train_dataloader(), 5), (data.val_dataloader(), 3), (data.test_dataloader(), 3)):
        assert len(loader) == batches
        images, labels = next(iter(loader))
        assert images.shape == (5, 3, 32, 32)
        assert images.dtype == torch.float32
        assert images.min() < -1
        assert images.max() > 1
        assert labels.dtype == torch.int64


def test_only_training_images_are_shuffled_cropped_and_flipped(image_folder: Path) -> None:
    data = CifarData(str(image_folder), batch_size=24, num_workers=0)
    data.setup("fit")
    assert torch.equal(next(iter(data.val_dataloader()))[0], next(iter(data.test_dataloader()))[0])
    image = torch.zeros(3, 32, 32)
    image[:, :, 0] = 1
    seen = {tuple(data.train_transform.transforms[1](image)[0, 0].tolist()) for _ in range(20)}
    assert len(seen) == 2, "a flip mirrors the image, or does not"
    cropped = [data.train_transform.transforms[0](torch.ones(3, 32, 32)) for _ in range(20)]
    assert all(crop.shape == (3, 32, 32) for crop in cropped)
    assert any(crop.min() == 0 for crop in cropped), "crops reach into the padding"
    labels = [torch.cat([labels for _, labels in data.train_dataloader()]) for _ in range(2)]
    assert not torch.equal(*labels)


def test_a_folders_first_images_are_of_all_classes_in_the_same_order_each_time(image_folder: Path) -> None:
    found = []
    for _ in range(2):
        data = CifarData(str(image_folder), batch_size=6, num_workers=0)
        data.setup("test")
        found.append(torch.cat([labels for _, labels in data.test_dataloader()]))
    assert torch.equal(*found)
    assert found[0][:6].unique().tolist() == [0, 1, 2]
    assert found[0].bincount().tolist() == [4, 4, 4]


def write_pickle(path: Path, value: Any) -> str:
    path.write_bytes(pickle.dumps(value))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("dataset", "kind", "key", "labels"),
    [("cifar10", CIFAR10, "label_names", "labels"), ("cifar100", CIFAR100, "fine_label_names", "fine_labels")],
)
def test_torchvisions_own_layout_is_read(
    dataset: Any, kind: Any, key: str, labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    for part, images in (("train_list", 6), ("test_list", 4)):
        pixels = np.arange(images * 3072, dtype=np.int64).reshape(images, 3072).astype(np.uint8)
        checksum = write_pickle(folder / part, {"data": pixels, labels: list(range(images))})
        monkeypatch.setattr(kind, part, [[part, checksum]])
    checksum = write_pickle(folder / "meta", {key: [str(index) for index in range(10)]})
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": key, "md5": checksum})

    data = CifarData(str(tmp_path), dataset, download=True, batch_size=4, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_dataloader()) == 2
    images, found = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert found.tolist() == [0, 1, 2, 3]

    (folder / "train_list").write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match=r"does not hold cifar.*not found or corrupted"):
        CifarData(str(tmp_path), dataset).setup("fit")


def test_missing_data_names_the_folder_and_the_remedies(tmp_path: Path) -> None:
    data = CifarData(str(tmp_path / "nowhere"), "cifar100")
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not hold cifar100. Set `download: true`") as caught:
        data.setup("fit")
    assert "train/<class>/" in str(caught.value)


def test_a_folder_of_training_images_alone_is_missing_data(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(image_folder / "train")
    with pytest.raises(FileNotFoundError, match="does not hold cifar10.*test"):
        CifarData(str(tmp_path)).setup("fit")


def test_constants_normalise_the_real_images(shared_file: Callable[[str], Path], tmp_path: Path) -> None:
    with tarfile.open(shared_file("cifar10-jpeg.tar.xz")) as archive:
        chosen = [member for member in archive.getmembers() if "/000" in member.name or "/001" in member.name]
        archive.extractall(tmp_path, chosen, filter="data")
    data = CifarData(str(tmp_path), batch_size=1000, num_workers=0)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    assert labels.bincount().tolist() == [20] * 10
    # The spread of the mean over 200 images is about a twentieth of a standard deviation.
    assert images.mean((0, 2, 3)).abs().max() < 0.2
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.1
