"""Tests of CIFAR in memory live here: what is decoded and kept, how images are chosen, what is done to a batch."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import functional

from recipes.cifar import CifarData
from recipes.cifar_tensors import Batches, CifarTensors, Images, balanced, crop_and_flip, read_images


@pytest.fixture
def archive(image_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "images.tar.xz"
    with tarfile.open(path, "w:xz") as file:
        for part in ("test", "train"):
            file.add(image_folder / part, part)
    return path


def test_a_folder_and_an_archive_of_it_give_the_images_that_the_recipe_reads(
    image_folder: Path, archive: Path, tmp_path: Path
) -> None:
    folder, packed = (read_images(root, "cifar10", tmp_path / "cache") for root in (image_folder, archive))
    for part, count in (("train", 24), ("test", 12)):
        assert folder[part].pixels.shape == (count, 3, 32, 32)
        assert torch.equal(folder[part].pixels, packed[part].pixels)
        assert torch.equal(folder[part].labels, packed[part].labels)
    one_by_one = CifarData(str(image_folder), batch_size=12, num_workers=0)
    one_by_one.setup("test")
    expected, _ = next(iter(one_by_one.test_dataloader()))
    found, _ = next(iter(Batches(folder["test"], "cifar10", 12)))
    assert (expected.sum((1, 2, 3)).sort().values - found.sum((1, 2, 3)).sort().values).abs().max() < 1e-2


def test_files_are_decoded_once_and_again_when_the_archive_changes(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_images(archive, "cifar10", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("recipes.cifar_tensors._from_archive", lambda root: pytest.fail("it has been decoded before"))
        again = read_images(archive, "cifar10", tmp_path / "cache")
        assert torch.equal(first["train"].pixels, again["train"].pixels)
    with tarfile.open(archive, "w:xz"):
        pass
    with pytest.raises(FileNotFoundError, match="it has no files train/<class>/<image>"):
        read_images(archive, "cifar10", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "another file"])
def test_missing_data_names_the_place_and_the_remedies(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "place"
    if kind == "an empty folder":
        root.mkdir()
    elif kind == "another file":
        root.write_text("no archive")
    with pytest.raises(FileNotFoundError, match=r"place' does not hold cifar10. Give .*`--data.download true`"):
        read_images(root, "cifar10", tmp_path / "cache")


def test_a_crop_is_one_of_torchvisions_and_all_of_them_are_as_frequent() -> None:
    # Each pixel tells its place, so that the crop can be read off; white is below 100, padding is 0.
    pixels = torch.stack([torch.arange(1, 33)[:, None].expand(32, 32), torch.arange(1, 33).expand(32, 32)])
    image = torch.cat([pixels, torch.full((1, 32, 32), 99)]).to(torch.uint8)
    count = 9 * 9 * 2 * 50
    cut = crop_and_flip(image.expand(count, 3, 32, 32), torch.Generator().manual_seed(0))
    assert cut.shape == (count, 3, 32, 32)
    assert cut.dtype == torch.uint8
    padded = functional.pad(image, [4])
    seen = dict.fromkeys(((t, left, flip) for t in range(9) for left in range(9) for flip in (False, True)), 0)
    expected = {}
    for top, left, flip in seen:
        crop = functional.crop(padded, top, left, 32, 32)
        expected[top, left, flip] = functional.hflip(crop) if flip else crop
    keys = {crop.numpy().tobytes(): key for key, crop in expected.items()}
    for crop in cut:
        seen[keys[crop.contiguous().numpy().tobytes()]] += 1
    # 162 places, 50 times each on average: chi-squared, whose deviation is the root of twice the degrees of freedom.
    chi_squared = sum((found - 50) ** 2 / 50 for found in seen.values())
    assert abs(chi_squared - 161) < 4 * (2 * 161) ** 0.5


def test_a_class_gives_as_many_images_as_any_other() -> None:
    labels = torch.tensor([2, 0, 0, 1, 2, 1, 0, 2])
    assert balanced(labels, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert balanced(labels, 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize("count", [0, 4, 9])
def test_a_number_that_cannot_be_shared_out_is_refused(count: int) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match=f"{count} images cannot be chosen .* give a multiple of 3, 6 at most"):
        balanced(labels, count)


def test_batches_depend_on_seed_and_round_alone() -> None:
    rng = np.random.default_rng(0)
    images = Images(torch.from_numpy(rng.integers(0, 256, (10, 3, 32, 32), np.uint8)), torch.arange(10))
    one, same, other = (Batches(images, "cifar10", 4, seed) for seed in (1, 1, 2))
    assert len(one) == 3
    first = list(one)
    assert [len(labels) for _, labels in first] == [4, 4, 2]
    assert torch.cat([labels for _, labels in first]).sort().values.tolist() == list(range(10))
    torch.rand(5)  # what others draw makes no difference
    for (pixels, labels), (theirs, shown) in zip(first, same, strict=True):
        assert torch.equal(pixels, theirs)
        assert torch.equal(labels, shown)
    assert not torch.equal(first[0][1], next(iter(one))[1]), "the next round has another order"
    assert not torch.equal(first[0][1], next(iter(other))[1])


def test_normalisation_is_torchvisions() -> None:
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    (found, _), *_ = Batches(Images(pixels, torch.zeros(4)), "cifar100", 4)
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    expected = transforms.Normalize(mean, std)(pixels / 255)
    torch.testing.assert_close(found, expected)


def test_the_data_module_chooses_and_batches(image_folder: Path, tmp_path: Path) -> None:
    data = CifarTensors(str(image_folder), train_images=12, batch_size=5, cache=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_dataloader()) == 3
    _, labels = next(iter(data.val_dataloader()))
    assert labels.bincount().tolist() == [4, 4, 4]


@pytest.mark.slow  # decodes 60 000 files
def test_the_real_archive_is_read(shared_file: Callable[[str], Path], tmp_path: Path) -> None:
    images = read_images(shared_file("cifar10-jpeg.tar.xz"), "cifar10", tmp_path)
    assert images["train"].pixels.shape == (50_000, 3, 32, 32)
    assert images["train"].labels.bincount().tolist() == [5000] * 10
    assert images["test"].labels.bincount().tolist() == [1000] * 10
    (pixels, _), *_ = Batches(images["test"], "cifar10", 10_000)
    assert pixels.mean((0, 2, 3)).abs().max() < 0.05
    assert (pixels.std((0, 2, 3)) - 1).abs().max() < 0.05
