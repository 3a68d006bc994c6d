"""Tests of the recipe with synthetic gradients live here: its formulas against backpropagation, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recipes.dni import Boundary, DNIClassifier, Synthesizer, decoupled_backward, into_parts
from recipes.resnet_cifar import CifarResNet

BATCH = 6


def boundaries_of(module: DNIClassifier, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Boundary]]:
    """What the training step does, without Lightning."""
    boundaries = []
    *lower, last = module.network
    for part, synthesizer in zip(lower, module.synthesizers, strict=True):
        below = part(images)
        images = below.detach().requires_grad_()
        boundaries.append(Boundary(below, images, synthesizer(images.detach(), labels)))
    return cross_entropy(last(images), labels), boundaries


class Oracle(nn.Module):
    """Knows the gradient of each image's loss, because it runs the rest of the network."""

    def __init__(self, rest: list[nn.Module]) -> None:
        super().__init__()
        self.rest = [*rest]  # a plain list: the network's parameters are not the oracle's
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, activation: Tensor, labels: Tensor) -> Tensor:
        leaf = activation.detach().requires_grad_()
        value = leaf
        for part in self.rest:
            value = part(value)
        (gradient,) = torch.autograd.grad(cross_entropy(value, labels, reduction="sum"), leaf)
        return gradient * self.scale


@pytest.fixture
def module() -> DNIClassifier:
    torch.manual_seed(0)
    return DNIClassifier(CifarResNet(8), num_parts=3).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(BATCH, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 5])


def backprop(module: DNIClassifier, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients by the network's parameters, and by what crosses each boundary."""
    crossing, value = [], images
    for part in list(module.network)[:-1]:
        value = part(value)
        value.retain_grad()
        crossing.append(value)
    module.zero_grad()
    cross_entropy(module.network[-1](value), labels).backward()
    found = {name: p.grad.clone() for name, p in module.network.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found, [value.grad for value in crossing if value.grad is not None]


def test_the_last_boundarys_target_is_the_true_gradient(module: DNIClassifier, batch: tuple[Tensor, Tensor]) -> None:
    _, crossing = backprop(module, *batch)
    loss, boundaries = boundaries_of(module, *batch)
    targets = decoupled_backward(loss, boundaries)
    torch.testing.assert_close(targets[-1], BATCH * crossing[-1])
    assert targets[0].abs().max() == 0, "the second prediction is 0 at first, and so is what it sends down"


def test_a_target_further_down_comes_through_the_next_prediction(
    module: DNIClassifier, batch: tuple[Tensor, Tensor]
) -> None:
    predicted = torch.randn(BATCH, 32, 16, 16, dtype=torch.float64)

    class Fixed(nn.Module):
        def forward(self, activation: Tensor, labels: Tensor) -> Tensor:
            return predicted.clone().requires_grad_()

    assert isinstance(module.synthesizers[1], Synthesizer)
    below = module.network[0](batch[0]).detach().requires_grad_()
    crossing = module.network[1](below)
    predicted = torch.randn_like(crossing)
    (expected,) = torch.autograd.grad(crossing, below, predicted)
    module.synthesizers[1] = Fixed()
    targets = decoupled_backward(*boundaries_of(module, *batch))
    torch.testing.assert_close(targets[0], expected)


def test_a_synthesizer_learns_by_squared_errors(module: DNIClassifier, batch: tuple[Tensor, Tensor]) -> None:
    loss, boundaries = boundaries_of(module, *batch)
    targets = decoupled_backward(loss, boundaries)
    bias = module.synthesizers[1].conv2.bias
    assert bias.grad is not None
    # The prediction is 0, and the bias is added to it: d mean(|0 + b - target|^2) / d b, over images and pixels.
    expected = -2 * targets[1].mean((0, 2, 3))
    torch.testing.assert_close(bias.grad, expected)


def test_with_perfect_predictions_the_gradients_are_backpropagations(
    module: DNIClassifier, batch: tuple[Tensor, Tensor]
) -> None:
    parts = list(module.network)
    module.synthesizers = nn.ModuleList(Oracle(parts[index:]) for index in range(1, len(parts)))
    expected, crossing = backprop(module, *batch)
    loss, boundaries = boundaries_of(module, *batch)
    targets = decoupled_backward(loss, boundaries)
    found = {name: p.grad for name, p in module.network.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    for target, gradient in zip(targets, crossing, strict=True):
        torch.testing.assert_close(target, BATCH * gradient)
    for synthesizer in module.synthesizers:
        assert abs(synthesizer.scale.grad) < 1e-12, "there is nothing left to learn"


def test_units_compute_what_the_network_does_with_its_own_layers() -> None:
    network = CifarResNet(14).eval()
    images = torch.rand(2, 3, 32, 32)
    units = network.units()
    assert len(units) == 1 + 6 + 1
    assert torch.equal(nn.Sequential(*units)(images), network(images))
    shared = {id(p) for unit in units for p in unit.parameters()}
    assert shared == {id(p) for p in network.parameters()}


def test_parts_are_even_and_in_order() -> None:
    units = [nn.Identity() for _ in range(5)]
    assert [len(part) for part in into_parts(units, 2)] == [2, 3]
    assert [len(part) for part in into_parts(units, 5)] == [1] * 5
    assert [unit for part in into_parts(units, 3) for unit in part] == units


@pytest.mark.parametrize("number", [1, 6])
def test_a_number_of_parts_that_cannot_be_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"num_parts={number}: the network has 5 units; give 2 to 5"):
        DNIClassifier(CifarResNet(8), num_parts=number)


def test_a_network_without_units_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear does not say where it may be cut: give it a method `units\(\)`"):
        DNIClassifier(nn.Linear(3, 3))


def test_a_conditioned_synthesizer_sees_the_labels() -> None:
    torch.manual_seed(0)
    plain, conditioned = Synthesizer(4), Synthesizer(4, classes=3)
    activation = torch.rand(2, 4, 8, 8)
    for synthesizer, differs in ((plain, False), (conditioned, True)):
        one, other = (synthesizer(activation, torch.tensor(labels)) for labels in ([0, 1], [2, 1]))
        assert one.shape == activation.shape
        assert one.abs().max() == 0, "as long as nothing has been learned"
        nn.init.normal_(synthesizer.conv2.weight)
        one, other = (synthesizer(activation, torch.tensor(labels)) for labels in ([0, 1], [2, 1]))
        assert torch.equal(one, other) != differs


def test_synthesizers_come_to_beat_predicting_nothing(module: DNIClassifier, batch: tuple[Tensor, Tensor]) -> None:
    optimizer = torch.optim.SGD(module.synthesizers.parameters(), lr=0.01, momentum=0.9)
    missed = []
    for _ in range(30):
        optimizer.zero_grad()
        loss, boundaries = boundaries_of(module, *batch)
        targets = decoupled_backward(loss, boundaries)
        optimizer.step()
        missed.append((boundaries[-1].predicted - targets[-1]).square().sum() / targets[-1].square().sum())
    assert missed[0] == 1
    assert missed[-1] < 0.9


def test_yaml_trains_a_small_fit(build: Callable[..., LightningCLI], image_folder: Path) -> None:
    run = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "8", "--trainer.enable_progress_bar", "false"]
    data = ["--data.root", str(image_folder), "--data.batch_size", "6", "--data.num_workers", "0"]
    cli: Any = build("dni.yaml", *run, *data, "--model.conditioned", "true", "--trainer.log_every_n_steps", "1")
    first = {name: parameter.clone() for name, parameter in cli.model.named_parameters()}
    cli.trainer.fit(cli.model, cli.datamodule)
    found = cli.trainer.callback_metrics
    assert found["val_acc"] > 0.9, "three colours that cannot be taken for each other"
    assert "synthesis_error" in found
    assert all(not torch.equal(first[name], now) for name, now in cli.model.named_parameters())
