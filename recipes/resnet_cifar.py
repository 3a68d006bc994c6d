"""The residual networks for CIFAR live here, as their paper describes them; only the network may be changed here.

He, Zhang, Ren and Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016 (arXiv 1512.03385), section 4.2.
``classifier.py`` trains them, ``cifar.py`` gives the images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PaddedShortcut(nn.Module):
    """The paper's option A: leaves out every second row and column, and adds channels of zeros. No parameters.

    Args:
        channels: Channels of zeros to add, after those that come in.
        stride: Distance of the rows and columns kept.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, c, height, width)`` to ``(batch, c + channels, height / stride, width / stride)``."""
        kept = images[:, :, :: self.stride, :: self.stride]
        return functional.pad(kept, (0, 0, 0, 0, 0, self.channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut around them.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out, at least ``inputs``.
        stride: Of the first convolution; 2 halves the image's sides.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = PaddedShortcut(outputs - inputs, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, inputs, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        out = functional.relu(self.bn1(self.conv1(images)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(images))


class CifarResNet(nn.Module):
    """A ResNet for 32x32 images: three groups of ``n`` blocks with 16, 32 and 64 channels, ``6n + 2`` layers deep.

    Convolutions start as He, Zhang, Ren and Sun propose for rectifiers (*Delving Deep into Rectifiers*, ICCV 2015).

    Args:
        depth: Layers with weights: 8, 14, 20, 32, 44, 56, 110, ...
        classes: Number of logits.
        width: Channels of the first group; the second has twice, the third four times as many.

    Raises:
        ValueError: If ``depth`` is not ``6n + 2`` for a whole ``n`` of at least 1.
    """

    def __init__(self, depth: int = 20, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth={depth}: three groups of n blocks have 6n + 2 layers; give 8, 20, 32, 56 or 110")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._group(blocks, width, width, stride=1)
        self.layer2 = self._group(blocks, width, 2 * width, stride=2)
        self.layer3 = self._group(blocks, 2 * width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _group(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))

    def units(self) -> list[nn.Module]:
        """List what a picture of the network shows as boxes: the stem, each block, the head.

        Called one after the other, they compute what the network does; they share its layers.
        """
        stem = nn.Sequential(self.conv1, self.bn1, nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), self.fc)
        return [stem, *self.layer1, *self.layer2, *self.layer3, head]

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, 3, height, width)`` to logits ``(batch, classes)``."""
        out = functional.relu(self.bn1(self.conv1(images)))
        out = self.layer1(out)
        out = self.layer2(out)
        out = self.layer3(out)
        out = functional.adaptive_avg_pool2d(out, 1)
        out = torch.flatten(out, 1)
        return self.fc(out)
