"""The tasks of torchgeo: LightningModules that are used as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.wild.trying import WAYS, Case, check, draw_classes, draw_images, fit, needs, one_batch

pytestmark = needs("torchgeo")


def images(**target: torch.Tensor) -> Any:
    return one_batch(image=draw_images(), **target)


def boxes() -> Any:
    """Two objects an image, as lists of tensors."""
    from torchgeo.datamodules.utils import collate_fn_detection

    corners = torch.tensor([[2.0, 3.0, 14.0, 15.0], [10.0, 8.0, 30.0, 28.0]]).expand(4, 2, 4)
    return one_batch(
        image=draw_images(size=64), bbox_xyxy=corners, label=draw_classes(4, 2) + 1, collate=collate_fn_detection
    )


def train(task: str, how: dict[str, Any], arguments: dict[str, Any]) -> None:
    from torchgeo import trainers

    module = getattr(trainers, task)(**how)
    if task == "ClassificationTask":
        loader = images(label=draw_classes(4))
    elif task == "RegressionTask":
        loader = images(label=draw_classes(4).float())
    elif task == "PixelwiseRegressionTask":
        loader = images(mask=draw_classes(4, 32, 32).float())
    elif task == "SemanticSegmentationTask":
        loader = images(mask=draw_classes(4, 32, 32))
    elif task == "ChangeDetectionTask":
        pairs = torch.stack([draw_images(), draw_images().flip(0)], dim=1)
        loader = one_batch(image=pairs, mask=draw_classes(4, 1, 32, 32, classes=2))
    elif task == "ObjectDetectionTask":
        loader = boxes()
    else:
        loader = images()
    fit(arguments, module, loader)


CASES = {
    "classification": Case(partial(train, "ClassificationTask", {"model": "resnet18", "num_classes": 3})),
    "classification, frozen backbone": Case(
        partial(train, "ClassificationTask", {"model": "resnet18", "num_classes": 3, "freeze_backbone": True})
    ),
    "regression": Case(partial(train, "RegressionTask", {"model": "resnet18"}), precision="32-true"),
    "pixelwise regression": Case(
        partial(train, "PixelwiseRegressionTask", {"model": "unet", "backbone": "resnet18"}), precision="32-true"
    ),
    "segmentation, fcn": Case(
        partial(train, "SemanticSegmentationTask", {"model": "fcn", "num_classes": 3, "num_filters": 4})
    ),
    "segmentation, unet": Case(
        partial(train, "SemanticSegmentationTask", {"model": "unet", "backbone": "resnet18", "num_classes": 3})
    ),
    "change detection, unet": Case(
        partial(train, "ChangeDetectionTask", {"model": "unet", "backbone": "resnet18"}), precision="32-true"
    ),
    "change detection, fcsiamdiff": Case(
        partial(train, "ChangeDetectionTask", {"model": "fcsiamdiff", "backbone": "resnet18"}), precision="32-true"
    ),
    "detection, retinanet": Case(
        partial(train, "ObjectDetectionTask", {"model": "retinanet", "backbone": "resnet18", "num_classes": 4}),
        precision="32-true",
    ),
    "simclr": Case(partial(train, "SimCLRTask", {"model": "resnet18"}), draws=True, precision="32-true"),
    "moco": Case(
        partial(train, "MoCoTask", {"model": "resnet18", "version": 2, "layers": 2, "hidden_dim": 16, "output_dim": 8}),
        {"two processes": "changes without a gradient. It is a copy of"}, draws=True, precision="32-true",
    ),
    "byol": Case(partial(train, "BYOLTask", {"model": "resnet18"}), draws=True),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_torchgeo(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
