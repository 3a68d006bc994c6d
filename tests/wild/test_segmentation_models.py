"""Networks of segmentation-models-pytorch, as a LightningModule around them uses them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.wild.trying import WAYS, Case, Supervised, check, draw_classes, draw_images, fit, needs, one_batch

pytestmark = needs("segmentation_models_pytorch")


def train(kind: str, encoder: str, how: dict[str, Any], arguments: dict[str, Any]) -> None:
    import segmentation_models_pytorch as smp

    net = smp.create_model(kind, encoder, encoder_weights=None, classes=3, **how)
    loss = smp.losses.DiceLoss("multiclass")
    fit(arguments, Supervised(net, loss), one_batch(draw_images(size=64), draw_classes(4, 64, 64)))


# Dropout is left out where an argument says so; two have a stochastic depth, which no argument turns off.
NETWORKS: list[tuple[str, str, dict[str, Any]]] = [
    ("unet", "resnet18", {}),
    ("unetplusplus", "resnet18", {}),
    ("fpn", "mobilenet_v2", {"decoder_dropout": 0.0}),
    ("linknet", "timm-mobilenetv3_small_minimal_100", {}),
    ("deeplabv3plus", "resnet18", {"decoder_aspp_dropout": 0.0}),
    ("manet", "efficientnet-b0", {}),
    ("pspnet", "resnet18", {"psp_dropout": 0.0}),
    ("segformer", "mit_b0", {}),
]
CASES = {
    f"{kind}, {encoder}": Case(partial(train, kind, encoder, how), draws=kind in ("manet", "segformer"))
    for kind, encoder, how in NETWORKS
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_segmentation_models(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
