"""Tests of the wide residual networks live here: their layers, their size in the literature, their YAML file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from recipes.wide_resnet import WideBlock, WideResNet


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# In millions, as the paper's Table 4 prints them.
@pytest.mark.parametrize(("depth", "widen", "millions"), [(40, 1, 0.6), (40, 2, 2.2), (16, 8, 11.0), (28, 10, 36.5)])
def test_sizes_are_those_of_the_paper(depth: int, widen: int, millions: float) -> None:
    with torch.device("meta"):
        network = WideResNet(depth, widen)
    assert round(parameters(network) / 1e6, 1) == millions


@pytest.mark.parametrize("depth", [10, 16, 28])
def test_depth_counts_the_convolutions(depth: int) -> None:
    # Not with widen=1: there the first group's shortcut needs no convolution.
    assert sum(isinstance(module, nn.Conv2d) for module in WideResNet(depth, widen=2).modules()) == depth


def test_images_become_logits() -> None:
    network = WideResNet(depth=10, widen=2, classes=7)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert network.group3(network.group2(network.group1(torch.rand(2, 16, 32, 32)))).shape == (2, 128, 8, 8)


def test_a_block_that_changes_nothing_passes_its_input_by() -> None:
    block = WideBlock(4, 4, stride=1, dropout=0.0)
    nn.init.zeros_(block.conv2.weight)
    images = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(images), images)


def test_dropout_follows_train_and_eval() -> None:
    network = WideResNet(depth=10, widen=1, dropout=0.5)
    images = torch.rand(2, 3, 16, 16)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


@pytest.mark.parametrize("depth", [4, 20, 30])
def test_a_depth_that_three_groups_cannot_have_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth={depth}: .* 6n \+ 4 layers; give 10, 16, 22, 28 or 40"):
        WideResNet(depth)


def test_yaml_has_the_papers_settings(build: Callable[..., LightningCLI]) -> None:
    cli = build("wide_resnet.yaml", "--model.network.depth", "10", "--model.network.widen", "1")
    assert isinstance(cli.model.network, WideResNet)
    (optimizer,), (scheduler,) = cli.model.configure_optimizers()
    rates = []
    for _ in range(cli.trainer.max_epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1] * 60 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 40)
