"""The routines of torch-uncertainty."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.wild.trying import WAYS, Case, check, draw_classes, draw_images, fit, needs, one_batch

pytestmark = needs("torch_uncertainty")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def classify(kind: str, sizes: dict[str, Any], how: dict[str, Any], arguments: dict[str, Any]) -> None:
    from torch_uncertainty.losses import ELBOLoss
    from torch_uncertainty.models import classification
    from torch_uncertainty.routines import ClassificationRoutine
    from torch_uncertainty.transforms import RepeatTarget

    net = getattr(classification, kind)(in_channels=3, num_classes=3, **sizes)
    loss: nn.Module = nn.CrossEntropyLoss()
    if kind.startswith("bayesian"):
        loss = ELBOLoss(model=net, inner_loss=loss, kl_weight=0.01, num_samples=2)
    if sizes.get("num_estimators"):
        how = {**how, "is_ensemble": True, "format_batch_fn": RepeatTarget(sizes["num_estimators"])}
    routine = ClassificationRoutine(model=net, num_classes=3, loss=loss, optim_recipe=sgd(net), **how)
    fit(arguments, routine, one_batch(draw_images(), draw_classes(4)))


def regress(how: dict[str, Any], arguments: dict[str, Any]) -> None:
    from torch_uncertainty.losses import DistributionNLLLoss
    from torch_uncertainty.models.mlp import mlp
    from torch_uncertainty.routines import RegressionRoutine

    net = mlp(in_features=5, num_outputs=1, hidden_dims=[8, 8], **how)
    loss = DistributionNLLLoss() if how else nn.MSELoss()
    routine = RegressionRoutine(model=net, output_dim=1, loss=loss, optim_recipe=sgd(net), **how)
    draw = torch.Generator().manual_seed(5)
    fit(arguments, routine, one_batch(torch.randn(6, 5, generator=draw), torch.randn(6, generator=draw)))


def segment(arguments: dict[str, Any]) -> None:
    from torch_uncertainty.models.segmentation.unet import small_unet
    from torch_uncertainty.routines import SegmentationRoutine

    net = small_unet(in_channels=3, num_classes=3, bilinear=False)
    # All pixels count for the metrics; a part of them would be drawn.
    how = {"loss": nn.CrossEntropyLoss(), "optim_recipe": sgd(net), "metric_subsampling_rate": 1.0}
    routine = SegmentationRoutine(model=net, num_classes=3, **how)
    fit(arguments, routine, one_batch(draw_images(), draw_classes(4, 32, 32)))


def ensemble(arguments: dict[str, Any]) -> None:
    from torch_uncertainty.methods import deep_ensembles
    from torch_uncertainty.models.classification import lenet
    from torch_uncertainty.routines import ClassificationRoutine
    from torch_uncertainty.transforms import RepeatTarget

    net = deep_ensembles(lenet(3, 3), num_estimators=2, task="classification", reset_model_parameters=True)
    routine = ClassificationRoutine(
        model=net,
        num_classes=3,
        loss=nn.CrossEntropyLoss(),
        optim_recipe=sgd(net),
        is_ensemble=True,
        format_batch_fn=RepeatTarget(2),
    )
    fit(arguments, routine, one_batch(draw_images(), draw_classes(4)))


CASES = {
    "LeNet": Case(partial(classify, "lenet", {}, {})),
    "packed LeNet": Case(partial(classify, "packed_lenet", {"num_estimators": 2, "alpha": 2, "gamma": 1}, {})),
    "batch ensemble LeNet": Case(
        partial(classify, "batchensemble_lenet", {"num_estimators": 2, "repeat_training_inputs": True}, {})
    ),
    # The loss uses what all layers have left in attributes, after each of several calls of the network.
    "Bayesian LeNet, ELBO": Case(
        partial(classify, "bayesian_lenet", {"num_samples": 2}, {}), dict.fromkeys(WAYS, "the network has 1 layer")
    ),
    "ResNet-18": Case(partial(classify, "resnet", {"arch": 18}, {})),
    "regression, MLP": Case(partial(regress, {})),
    "regression, normal": Case(partial(regress, {"dist_family": "normal"})),
    "segmentation, U-Net": Case(segment),
    "deep ensemble": Case(ensemble),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_torch_uncertainty(request: pytest.FixtureRequest, name: str, way: str) -> None:
    check(request, name, way)
