"""The wide residual networks live here, as their paper describes them; only the network may be changed here.

Zagoruyko and Komodakis, *Wide Residual Networks*, BMVC 2016 (arXiv 1605.07146). ``classifier.py`` trains them,
``cifar.py`` gives the images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and a rectifier, and a shortcut around them.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the first convolution; 2 halves the image's sides.
        dropout: Probability of leaving out a value between the convolutions.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, inputs, height, width)`` to ``(batch, outputs, height / stride, width / stride)``."""
        activated = functional.relu(self.bn1(images))
        out = functional.relu(self.bn2(self.conv1(activated)))
        out = self.conv2(functional.dropout(out, self.dropout, training=self.training))
        if self.shortcut is None:
            return out + images
        return out + self.shortcut(activated)


class WideResNet(nn.Module):
    """A WRN for 32x32 images: three groups of ``n`` blocks, ``6n + 4`` layers deep and ``widen`` times as wide.

    The depth counts convolutions, those in the shortcuts of each group's first block among them, as the paper does.

    Args:
        depth: Convolutions: 10, 16, 22, 28, 40, ...
        widen: The groups have 16, 32 and 64 times as many channels.
        classes: Number of logits.
        dropout: Probability of leaving out a value inside a block.

    Raises:
        ValueError: If ``depth`` is not ``6n + 4`` for a whole ``n`` of at least 1.
    """

    def __init__(self, depth: int = 28, widen: int = 10, classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth={depth}: three groups of n blocks have 6n + 4 layers; give 10, 16, 22, 28 or 40")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.group1 = self._group(blocks, 16, 16 * widen, 1, dropout)
        self.group2 = self._group(blocks, 16 * widen, 32 * widen, 2, dropout)
        self.group3 = self._group(blocks, 32 * widen, 64 * widen, 2, dropout)
        self.bn = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _group(blocks: int, inputs: int, outputs: int, stride: int, dropout: float) -> nn.Sequential:
        first = WideBlock(inputs, outputs, stride, dropout)
        return nn.Sequential(first, *(WideBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(batch, 3, height, width)`` to logits ``(batch, classes)``."""
        out = self.group1(self.conv1(images))
        out = self.group2(out)
        out = self.group3(out)
        out = functional.relu(self.bn(out))
        out = functional.adaptive_avg_pool2d(out, 1)
        out = torch.flatten(out, 1)
        return self.fc(out)
