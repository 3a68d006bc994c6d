"""Networks of kornia, and its augmentations in a step."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from tests.wild.trying import (
    WAYS,
    Case,
    Supervised,
    check,
    classify_images,
    draw_classes,
    draw_images,
    fit,
    needs,
    one_batch,
)

pytestmark = needs("kornia")


def vit(arguments: dict[str, Any]) -> None:
    from kornia.models.vit import VisionTransformer

    body = VisionTransformer(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)
    classify_images(arguments, Head(body))


class Head(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean(dim=1))


def tiny_vit(arguments: dict[str, Any]) -> None:
    from kornia.models.tiny_vit import TinyViT

    sizes: dict[str, Any] = {
        "embed_dims": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 2],
        "window_sizes": [4, 4, 4, 2],
    }
    classify_images(arguments, TinyViT(img_size=64, num_classes=3, drop_path_rate=0.0, **sizes), size=64)


class Augmented(Supervised):
    """The transfer hook augments, as kornia's own examples do."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        import kornia.augmentation as K

        if not self.trainer.training:
            return batch
        augment = K.AugmentationSequential(K.RandomHorizontalFlip(p=0.5), K.RandomAffine(10.0), data_keys=["input"])
        return augment(batch[0]), batch[1]


def augmented(arguments: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    net(draw_images())
    fit(arguments, Augmented(net, nn.functional.cross_entropy), one_batch(draw_images(), draw_classes(4)))


def local_features(arguments: dict[str, Any]) -> None:
    from kornia.feature import HardNet

    fit(arguments, Supervised(HardNet(pretrained=False), apart), one_batch(draw_images(8, 32, 1), draw_classes(8)))


def apart(found: Tensor, classes: Tensor) -> Tensor:
    return (found[:4] - found[4:]).square().sum(dim=1).mean()


CASES = {
    "VisionTransformer": Case(vit),
    "TinyViT": Case(tiny_vit),
    "AugmentationSequential in a transfer hook": Case(augmented),
    "HardNet": Case(local_features, draws=True),  # it has dropout
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_kornia(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
