"""Tests of the ImageNet folder and of its recipe live here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torchvision.models import ResNet

from recipes.imagenet import ImageNetData
from tests.recipes.conftest import make_images


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("photographs"), {"train": 4, "val": 2}, size=80)


def test_a_folder_gives_normalised_batches_of_the_size_asked_for(photographs: Path) -> None:
    data = ImageNetData(str(photographs), size=64, batch_size=4, num_workers=0)
    data.setup("fit")
    for loader, batches in ((data.train_dataloader(), 3), (data.val_dataloader(), 2), (data.test_dataloader(), 2)):
        assert len(loader) == batches
        images, labels = next(iter(loader))
        assert images.shape == (4, 3, 64, 64)
        assert images.min() < -1
        assert images.max() > 1
        assert labels.shape == (4,)


def test_only_training_images_are_shuffled_and_augmented(photographs: Path) -> None:
    data = ImageNetData(str(photographs), size=64, batch_size=12, num_workers=0)
    data.setup("fit")
    train = [next(iter(data.train_dataloader()))[0] for _ in range(2)]
    assert not torch.equal(*train)
    val = [next(iter(data.val_dataloader()))[0] for _ in range(2)]
    assert torch.equal(*val)


def test_missing_images_name_the_folder_and_the_remedy(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not hold images in train/<class>/ and val/<class>/"):
        ImageNetData(str(tmp_path / "nowhere")).setup("fit")
    (tmp_path / "train").symlink_to(photographs / "train")
    with pytest.raises(FileNotFoundError, match=r"does not hold images .* set `root` to its folder"):
        ImageNetData(str(tmp_path)).setup("fit")


def test_yaml_trains_torchvisions_network(build: Callable[..., LightningCLI], photographs: Path) -> None:
    run = ["--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
    data = ["--data.root", str(photographs), "--data.size", "32", "--data.batch_size", "4", "--data.num_workers", "0"]
    cli = build("resnet50.yaml", *run, *data, "--trainer.fast_dev_run", "true")
    assert isinstance(cli.model.network, ResNet)
    # He et al. print 25.5 M; torchvision's documentation this number.
    assert sum(parameter.numel() for parameter in cli.model.parameters()) == 25_557_032
    cli.trainer.fit(cli.model, cli.datamodule)
    assert {"train_loss", "val_acc"} <= cli.trainer.callback_metrics.keys()
