"""Image networks of timm."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.wild.trying import WAYS, Case, check, classify_images, needs

pytestmark = needs("timm")


def train(name: str, sizes: dict[str, Any], arguments: dict[str, Any]) -> None:
    import timm

    classify_images(arguments, timm.create_model(name, pretrained=False, num_classes=3, **sizes))


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet10t": {},
    "vit_tiny_patch16_224": SMALL,
    "deit3_small_patch16_224": SMALL,
    "eva02_tiny_patch14_224": SMALL,
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24)},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {"drop_path_rate": 0.0, "drop_rate": 0.0},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 12,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "drop_path_rate": 0.0,
    },
    "densenet121": {"growth_rate": 4, "block_config": (2, 2), "drop_rate": 0.0},
    "regnety_002": {},
}
CASES = {name: Case(partial(train, name, sizes)) for name, sizes in NETWORKS.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_timm(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
