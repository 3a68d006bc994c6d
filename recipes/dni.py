"""Decoupled neural interfaces (DNI) live here: training with predicted gradients, as something to compare DDG with; how
gradients are predicted, and from what, may be changed here.

Jaderberg, Czarnecki, Osindero, Vinyals, Graves, Silver and Kavukcuoglu, *Decoupled Neural Interfaces using Synthetic
Gradients*, ICML 2017 (arXiv 1608.05343). The network is cut into parts. At each boundary a synthesizer predicts, from
the activation, the gradient that backpropagation would send down there; the part below learns from the prediction at
once, and the synthesizer from the gradient that the part above computes, itself with the prediction of the next
boundary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.classifier import Batch, ImageClassifier


class Synthesizer(nn.Module):
    """Predicts each image's gradient by an activation with two 3x3 convolutions.

    The last one starts at zero, as in the paper: a part does not move before there is something to learn from. The
    paper's own synthesizers for images are larger (128 channels, kernels of 5x5), and would take longer here than the
    network.

    Args:
        channels: Of the activation.
        classes: What the label can be, if the prediction is conditioned on it (the paper's cDNI): each class is a
            further channel that goes in. 0 leaves the label out.
    """

    def __init__(self, channels: int, classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.conv1 = nn.Conv2d(channels + classes, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, activation: Tensor, labels: Tensor) -> Tensor:
        """Map ``(batch, channels, height, width)`` and labels ``(batch,)`` to the shape of the activation."""
        if self.classes:
            planes = functional.one_hot(labels, self.classes).to(activation.dtype)[:, :, None, None]
            activation = torch.cat([activation, planes.expand(-1, -1, *activation.shape[2:])], 1)
        return self.conv2(functional.relu(self.bn1(self.conv1(activation))))


class Boundary(NamedTuple):
    """What one batch leaves at a boundary, shapes ``(batch, channels, height, width)``.

    Attributes:
        below: What the part below computed, with its graph.
        above: The same values as a leaf, from which the part above went on.
        predicted: The gradient of each image's own loss by them, as the synthesizer sees it, with its graph.
    """

    below: Tensor
    above: Tensor
    predicted: Tensor


def decoupled_backward(loss: Tensor, boundaries: Sequence[Boundary]) -> list[Tensor]:
    """Adds to every parameter's ``grad`` what DNI says, the synthesizers' by their L2 loss.

    The L2 loss is the squared length of what is missed of a pixel's gradient, on average over images and pixels.

    A prediction is of the gradient of one image's loss, which is larger than that of the batch's mean by the number of
    images: its size, and so the synthesizers' learning rate, does not depend on the size of the batch.

    Args:
        loss: The mean loss of the batch, computed from the last boundary's ``above``.
        boundaries: From the input's side to the loss's.

    Returns:
        Each boundary's target: the gradients that its synthesizer should have predicted.
    """
    loss.backward()
    for boundary in boundaries:
        torch.autograd.backward(boundary.below, boundary.predicted.detach() / len(boundary.below))
    targets = []
    for boundary in boundaries:
        assert boundary.above.grad is not None
        targets.append(boundary.above.grad * len(boundary.above))
        missed = boundary.predicted - targets[-1]
        missed.square().sum(1).mean().backward()
    return targets


def into_parts(units: Sequence[nn.Module], num_parts: int) -> list[nn.Module]:
    """Cuts a list of units into consecutive parts of about as many units each.

    Raises:
        ValueError: If there are fewer than two parts, or fewer units than parts.
    """
    if not 2 <= num_parts <= len(units):
        raise ValueError(f"num_parts={num_parts}: the network has {len(units)} units; give 2 to {len(units)}.")
    bounds = [round(part * len(units) / num_parts) for part in range(num_parts + 1)]
    return [nn.Sequential(*units[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]


class DNIClassifier(ImageClassifier):
    """Trains a network that maps images to logits, by synthetic gradients.

    All parts and synthesizers take their step at the end of the iteration, with one optimizer. The weights are those of
    immediate steps: nothing in an iteration is computed twice, so that no result of a step would be seen before the
    next iteration.

    Args:
        network: Has ``units()``, a list of modules to be called one after the other; every one but the last returns
            ``(batch, channels, height, width)``.
        classes: Number of logits that the network gives.
        num_parts: Number of parts.
        conditioned: Whether the synthesizers see the labels (the paper's cDNI).

    Raises:
        ValueError: If the network does not say what its units are, or cannot be cut into so many parts.
    """

    def __init__(self, network: nn.Module, classes: int = 10, num_parts: int = 2, conditioned: bool = False) -> None:
        units = getattr(network, "units", None)
        if units is None:
            raise ValueError(
                f"{type(network).__name__} does not say where it may be cut: give it a method `units()` that lists its"
                " modules in the order of their calls, as recipes/resnet_cifar.py does."
            )
        super().__init__(nn.Sequential(*into_parts(units(), num_parts)), classes)
        channels = _channels(self.network)
        self.synthesizers = nn.ModuleList(Synthesizer(count, classes if conditioned else 0) for count in channels)
        self._boundaries: list[Boundary] = []
        self._error = torch.tensor(0.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        *lower, last = self.network
        self._boundaries = []
        for part, synthesizer in zip(lower, self.synthesizers, strict=True):
            below = part(images)
            images = below.detach().requires_grad_()
            self._boundaries.append(Boundary(below, images, synthesizer(images.detach(), labels)))
        return self.training_loss(last(images), labels)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Give each part its own gradients, in place of backpropagation's."""
        targets = decoupled_backward(loss, self._boundaries)
        missed = sum((b.predicted.detach() - target).square().sum() for b, target in _pairs(self._boundaries, targets))
        self._error = missed / sum(target.square().sum() for target in targets)
        self._boundaries = []

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # Of the targets' squares the part that was missed: 1 is no better than predicting nothing.
        self.log("synthesis_error", self._error, on_step=False, on_epoch=True, batch_size=len(batch[1]))


def _pairs(boundaries: Sequence[Boundary], targets: Sequence[Tensor]) -> Any:
    return zip(boundaries, targets, strict=True)


def _channels(parts: nn.Module) -> list[int]:
    """The channels that cross each boundary, found with a black image."""
    channels = []
    parts.eval()
    with torch.no_grad():
        value = torch.zeros(1, 3, 32, 32)
        for part in list(parts.children())[:-1]:
            value = part(value)
            channels.append(value.shape[1])
    parts.train()
    return channels
