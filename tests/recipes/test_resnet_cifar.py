"""Tests of the ResNets for CIFAR live here: their layers, their sizes in the literature, their YAML file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_ddg import DDGStrategy
from recipes.cifar import CifarData
from recipes.classifier import ImageClassifier
from recipes.resnet_cifar import BasicBlock, CifarResNet, PaddedShortcut


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def expected_parameters(depth: int, classes: int) -> int:
    """Counts weights by the paper's description: 3x3 kernels, and a gain and a bias for each channel they give."""

    def convolution(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + 2 * outputs

    n = (depth - 2) // 6
    group1 = 2 * n * convolution(16, 16)
    group2 = convolution(16, 32) + (2 * n - 1) * convolution(32, 32)
    group3 = convolution(32, 64) + (2 * n - 1) * convolution(64, 64)
    return convolution(3, 16) + group1 + group2 + group3 + 64 * classes + classes


# The sizes that He et al. print in Table 6, in millions; ResNet-8 is not in it.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_sizes_are_those_of_the_paper(depth: int, millions: float) -> None:
    count = parameters(CifarResNet(depth))
    assert count == expected_parameters(depth, classes=10)
    assert count / 1e6 == pytest.approx(millions, rel=0.02)


def test_size_of_the_smallest_and_with_a_hundred_classes() -> None:
    assert parameters(CifarResNet(8)) == expected_parameters(8, classes=10)
    assert parameters(CifarResNet(56, classes=100)) == expected_parameters(56, classes=100)


@pytest.mark.parametrize("depth", [8, 20, 56, 110])
def test_depth_counts_the_layers_with_weights(depth: int) -> None:
    layers = [m for m in CifarResNet(depth).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_three_groups_halve_the_image_and_double_the_channels() -> None:
    network = CifarResNet(14, classes=7)
    out = network.bn1(network.conv1(torch.rand(2, 3, 32, 32)))
    shapes = []
    for group in (network.layer1, network.layer2, network.layer3):
        assert len(group) == 2
        out = group(out)
        shapes.append(tuple(out.shape))
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_shortcut_has_no_parameters_keeps_every_second_pixel_and_adds_zeros() -> None:
    block = BasicBlock(2, 5, stride=2)
    assert isinstance(block.shortcut, PaddedShortcut)
    assert not list(block.shortcut.parameters())
    assert not list(block.shortcut.buffers())
    images = torch.rand(1, 2, 4, 6)
    out = block.shortcut(images)
    assert out.shape == (1, 5, 2, 3)
    assert torch.equal(out[:, :2], images[:, :, ::2, ::2])
    assert torch.equal(out[:, 2:], torch.zeros(1, 3, 2, 3))


def test_equal_shapes_are_passed_by_as_they_are() -> None:
    assert isinstance(BasicBlock(4, 4).shortcut, nn.Identity)


@pytest.mark.parametrize("depth", [2, 18, 54])
def test_a_depth_that_three_groups_cannot_have_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth={depth}: .* 6n \+ 2 layers; give 8, 20, 32, 56 or 110"):
        CifarResNet(depth)


def test_yaml_has_the_papers_settings(build: Callable[..., LightningCLI]) -> None:
    cli = build("resnet_cifar.yaml")
    assert isinstance(cli.model, ImageClassifier)
    assert isinstance(cli.model.network, CifarResNet)
    assert parameters(cli.model) == expected_parameters(56, classes=10)
    assert isinstance(cli.datamodule, CifarData)
    assert (cli.datamodule.dataset, cli.datamodule.batch_size) == ("cifar10", 128)
    assert isinstance(cli.trainer.strategy, DDGStrategy)
    assert cli.trainer.num_devices == 2
    assert cli.trainer.max_epochs == 300
    assert isinstance(cli.trainer.logger, CSVLogger)
    checkpoint = cli.trainer.checkpoint_callback
    assert isinstance(checkpoint, ModelCheckpoint)
    assert checkpoint.monitor == "val_acc"
    (optimizer,), (scheduler,) = cli.model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.01, 0.9, True, 5e-4)
    rates = []
    for _ in range(300):
        rates.append(group["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.01] * 150 + [0.001] * 75 + [0.0001] * 75)


def test_yaml_trains_and_tests_on_a_folder_of_images(build: Callable[..., LightningCLI], image_folder: Path) -> None:
    run = ["--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
    run += ["--trainer.max_epochs", "4", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"]
    data = ["--data.root", str(image_folder), "--data.batch_size", "6", "--data.num_workers", "0"]
    cli = build("resnet_cifar.yaml", *run, *data, "--model.network.depth", "8")
    cli.trainer.fit(cli.model, cli.datamodule)
    trained = cli.trainer.callback_metrics
    assert {"train_loss", "train_loss_epoch", "train_acc", "val_loss", "val_acc"} <= trained.keys()
    (tested,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    # Three colours that cannot be taken for each other; ten classes guessed at random would give 0.1.
    assert tested["test_acc"] == trained["val_acc"] > 0.9
