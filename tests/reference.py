"""The oracle: decoupled parallel backpropagation by plain backprop and a history of gradients, without the package.

It knows nothing of Lightning, stages as modules, messages or stashes, so that it can only be right or wrong by itself.
It may be changed when the algorithm's definition does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn


def flat_stages(network: nn.Sequential, starts: Sequence[int]) -> list[list[nn.Parameter]]:
    """The parameters of each stage of a flat ``nn.Sequential`` cut at ``starts``."""
    bounds = [0, *starts, len(network)]
    return [
        [p for layer in network[begin:end] for p in layer.parameters()]
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def train(
    network: nn.Module,
    stages: Sequence[list[nn.Parameter]],
    epochs: Iterable[Sequence[Any]],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    scheduler: Callable[[torch.optim.Optimizer], Any] | None,
    drain: str,
    skipped: Collection[int] = (),
) -> None:
    """Trains a network whose parameters are those of the stages; each has an optimizer and a scheduler of its own.

    Batches whose numbers are ``skipped`` have no gradient: no backward is run, and a step finds none.
    """
    number = count()
    optimizers = [optimizer(parameters) if parameters else None for parameters in stages]
    schedulers = [scheduler(o) if scheduler and o is not None else None for o in optimizers]
    history: list[list[list[Tensor | None]]] = []

    def update(stage: int, batch: int) -> None:
        chosen = optimizers[stage]
        if chosen is None:
            return
        for parameter, grad in zip(stages[stage], history[batch][stage], strict=True):
            parameter.grad = None if grad is None else grad.clone()
        chosen.step()

    def apply_the_rest() -> None:
        for ahead in range(1, len(stages)):
            for stage in range(len(stages)):
                delay = len(stages) - 1 - stage
                batch = len(history) - 1 + ahead - delay
                if ahead <= delay and batch >= 0:
                    update(stage, batch)
        history.clear()

    for batches in epochs:
        for x, y in batches:
            network.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            if next(number) not in skipped:
                loss.backward()
            history.append([[None if p.grad is None else p.grad.clone() for p in stage] for stage in stages])
            for stage in range(len(stages)):
                batch = len(history) - 1 - (len(stages) - 1 - stage)
                if batch >= 0:
                    update(stage, batch)
            for chosen in schedulers:
                if chosen is not None:
                    chosen.step()
        if drain == "epoch":
            apply_the_rest()
    if drain == "fit":
        apply_the_rest()
