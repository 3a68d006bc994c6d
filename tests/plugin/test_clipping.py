"""Tests of ``clipping.py``."""

from __future__ import annotations

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from lightning_ddg.plugin.clipping import clip_norm_per_stage
from lightning_ddg.plugin.ownership import Ownership


def test_norms_are_clipped_per_stage() -> None:
    root = nn.Module()
    stages = [nn.ParameterList(torch.zeros(2) for _ in range(count)) for count in (2, 1)]
    root.stages, root.outside = nn.ModuleList(stages), nn.Parameter(torch.zeros(2))
    everything = [*stages[0].parameters(), *stages[1].parameters(), root.outside]
    optimizer = torch.optim.SGD(everything, lr=1.0)

    def clipped(plugin: Precision) -> list[float]:
        for parameter, value in zip(everything, (3.0, 4.0, 0.06, 0.08), strict=True):
            parameter.grad = torch.tensor([value, 0.0])
        plugin.clip_gradients(optimizer, 1.0)
        return [round(float(parameter.grad[0]), 4) for parameter in everything if parameter.grad is not None]

    plugin = Precision()
    undo = clip_norm_per_stage(plugin, Ownership(root, stages).stage_of)
    # The last stage, with what is outside the network, is short enough; one norm over all would shrink it too.
    assert clipped(plugin) == [0.6, 0.8, 0.06, 0.08]
    everything[0].grad = None
    plugin.clip_gradients(optimizer, 1.0)
    undo()
    assert clipped(plugin) == [0.5999, 0.7998, 0.012, 0.016]
