"""Clipping of gradients stage by stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from lightning_ddg.plugin.compat import Undo, replaced
from lightning_ddg.plugin.host import LightningModule, Precision


def clip_norm_per_stage(plugin: Precision, stage_of: Callable[[nn.Parameter], int]) -> Undo:
    """In one process, clip the norm of each stage's gradients by itself, as K processes must do."""

    def clip_grad_by_norm(optimizer: Optimizer, clip_val: float) -> None:
        parts: dict[int, list[nn.Parameter]] = {}
        for parameter in plugin.main_params(optimizer):
            parts.setdefault(stage_of(parameter), []).append(parameter)
        for parameters in parts.values():
            clip_grad_norm_(parameters, clip_val)

    return replaced(plugin, "clip_grad_by_norm", clip_grad_by_norm)


def clip_values_that_exist(plugin: Precision) -> Undo:
    """Clip by value where there is any gradient: torch fails without, as a stage is while it warms up, or is frozen."""

    def clip_grad_by_value(optimizer: Optimizer, clip_val: float) -> None:
        parameters = [parameter for parameter in plugin.main_params(optimizer) if parameter.grad is not None]
        if parameters:
            clip_grad_value_(parameters, clip_val)

    return replaced(plugin, "clip_grad_by_value", clip_grad_by_value)


def remembered_clipping(module: LightningModule) -> tuple[Callable[[], object], Undo]:
    """Remember how a step in manual optimization clips, for the gradients that are applied outside any step.

    Returns:
        What clips as the last step did, and what undoes this.
    """
    clip = module.clip_gradients
    last: list[Callable[[], object]] = []

    def clip_and_remember(*args: Any, **kwargs: Any) -> None:
        last[:] = [functools.partial(clip, *args, **kwargs)]
        clip(*args, **kwargs)

    return lambda: [again() for again in last], replaced(module, "clip_gradients", clip_and_remember)
