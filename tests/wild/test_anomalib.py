"""Models of anomalib, trained by its Engine; those that need no downloaded weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.wild.trying import WAYS, Case, check, draw_images, needs, one_batch

pytestmark = needs("anomalib")


def loader(size: int) -> Any:
    from anomalib.data import ImageBatch, ImageItem

    def collate(rows: list[Any]) -> Any:
        items = [ImageItem(image=row["image"], gt_mask=row["mask"], gt_label=row["label"]) for row in rows]
        return ImageBatch.collate(items)

    masks = torch.zeros(4, size, size, dtype=torch.bool)
    masks[1::2, :8, :8] = True
    return one_batch(
        image=draw_images(size=size).sigmoid(), mask=masks, label=torch.tensor([0, 1, 0, 1]).bool(), collate=collate
    )


def train(name: str, sizes: dict[str, Any], arguments: dict[str, Any]) -> None:
    from anomalib import models
    from anomalib.engine import Engine

    make = getattr(models, name)
    # The visualizer writes files; the Engine has a checkpoint of its own.
    module = make(pre_processor=make.configure_pre_processor((64, 64)), visualizer=False, **sizes)
    kept = {key: value for key, value in arguments.items() if key != "enable_checkpointing"}
    Engine(**kept).fit(module, loader(64), loader(64))


CASES = {
    "Fastflow": Case(partial(train, "Fastflow", {"pre_trained": False, "flow_steps": 2}), precision="32-true"),
    "ReverseDistillation": Case(
        partial(train, "ReverseDistillation", {"pre_trained": False, "backbone": "resnet18"}), precision="32-true"
    ),
    "Fre": Case(
        partial(train, "Fre", {"pre_trained": False, "backbone": "resnet18", "input_dim": 1024, "latent_dim": 8}),
        precision="32-true",
    ),
    "Cflow": Case(
        partial(train, "Cflow", {"pre_trained": False, "backbone": "resnet18", "layers": ("layer2", "layer3")}),
        {"one process": "`manual_backward` was called before the network", "two processes": "The step calls a layer"},
        precision="32-true",
    ),
    "Padim": Case(partial(train, "Padim", {"pre_trained": False}), precision="32-true"),
    "Patchcore": Case(partial(train, "Patchcore", {"pre_trained": False, "backbone": "resnet18"}), precision="32-true"),
    "Ganomaly": Case(
        partial(train, "Ganomaly", {"batch_size": 4, "n_features": 4}),
        dict.fromkeys(WAYS, "`configure_optimizers` returned 2 optimizers"), precision="32-true",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_anomalib(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
