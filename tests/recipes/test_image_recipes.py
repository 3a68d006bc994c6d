"""Tests of the other image recipes' YAML files live here: they build, and train for a few batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torchvision.models import VisionTransformer

from recipes.cifar import CifarData
from recipes.classifier import ImageClassifier
from recipes.resnet_cifar import CifarResNet

PLAIN = ["--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
PLAIN += ["--trainer.enable_progress_bar", "false"]


def test_cifar100_variant_has_a_hundred_classes_everywhere(build: Callable[..., LightningCLI]) -> None:
    cli = build("resnet_cifar100.yaml")
    assert isinstance(cli.datamodule, CifarData)
    assert cli.datamodule.dataset == "cifar100"
    assert cli.model(torch.rand(1, 3, 32, 32)).shape == (1, 100)
    assert cli.model.val_acc.num_classes == 100


def test_adam_variant_differs_in_the_optimizer_alone(build: Callable[..., LightningCLI]) -> None:
    configs = []
    for recipe in ("resnet_cifar.yaml", "resnet_cifar_adam.yaml"):
        cli = build(recipe)
        (optimizer,), _ = cli.model.configure_optimizers()
        configs.append(cli.config.as_dict())
    assert type(optimizer) is torch.optim.Adam
    for key in ("model", "data", "lr_scheduler", "seed_everything"):
        assert configs[0][key] == configs[1][key]
    assert configs[0]["trainer"]["max_epochs"] == configs[1]["trainer"]["max_epochs"] == 300


def test_vit_is_tiny_and_trains(build: Callable[..., LightningCLI], image_folder: Path) -> None:
    data = ["--data.root", str(image_folder), "--data.batch_size", "4", "--data.num_workers", "0"]
    cli = build("vit_cifar.yaml", *PLAIN, *data, "--trainer.fast_dev_run", "true")
    network = cli.model.network
    assert isinstance(network, VisionTransformer)
    width, layers, patches, classes = 192, 12, 64, 10
    block = (width + 1) * 4 * width + (width + 1) * 4 * width + (4 * width + 1) * width + 2 * 2 * width
    around = (3 * 16 + 1) * width + width + (patches + 1) * width + 2 * width + (width + 1) * classes
    assert sum(parameter.numel() for parameter in network.parameters()) == layers * block + around
    assert network.encoder.ln.eps == 1e-6
    cli.trainer.fit(cli.model, cli.datamodule)
    assert {"train_loss", "val_acc"} <= cli.trainer.callback_metrics.keys()


def test_wandb_is_one_flag_away_and_stays_offline(build: Callable[..., LightningCLI]) -> None:
    overlay = Path(__file__).parents[2] / "recipes" / "wandb.yaml"
    cli = build("resnet_cifar.yaml", "--config", str(overlay), *PLAIN)
    csv, wandb = cli.trainer.loggers
    assert isinstance(csv, CSVLogger)
    assert isinstance(wandb, WandbLogger)
    assert wandb._offline


@pytest.mark.parametrize("recipe", ["resnet_cifar", "resnet_cifar100", "resnet_cifar_adam", "wide_resnet", "vit_cifar"])
def test_a_run_is_named_after_its_recipe(recipe: str, build: Callable[..., LightningCLI]) -> None:
    small = ["--model.network.depth", "10", "--model.network.widen", "1"] if recipe == "wide_resnet" else []
    cli = build(f"{recipe}.yaml", *small)
    assert cli.trainer.logger.name == recipe
    assert Path(cli.trainer.checkpoint_callback.dirpath).name == recipe


def test_a_checkpoint_is_loaded_with_the_network_it_was_trained_with(
    build: Callable[..., LightningCLI], image_folder: Path, tmp_path: Path
) -> None:
    data = ["--data.root", str(image_folder), "--data.batch_size", "12", "--data.num_workers", "0"]
    cli = build("resnet_cifar.yaml", *PLAIN, *data, "--trainer.max_epochs", "1", "--model.network.depth", "8")
    cli.trainer.fit(cli.model, cli.datamodule)
    path = tmp_path / "runs/resnet_cifar/best.ckpt"
    module = ImageClassifier.load_from_checkpoint(path, network=CifarResNet(8))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(module.eval()(images), cli.model.eval()(images))
