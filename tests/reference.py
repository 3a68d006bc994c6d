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
    skipped: Collection[Any] = (),
    micro_batches: int = 1,
    accumulate: int = 1,
    clip: Callable[[list[nn.Parameter]], object] | None = None,
    synchronous_from: int | None = None,
    slack: int = 0,
    replicas: int = 1,
) -> None:
    """Trains a network whose parameters are those of the stages; each has an optimizer and a scheduler of its own.

    Batches whose numbers are ``skipped`` have no gradient: no backward is run, and a step finds none.

    What travels, and what delays count, are micro-batches; of a batch's loss each has the part that it has of its
    samples. After a batch (or ``accumulate`` batches, or an epoch's last one) each stage steps with the sum of the
    gradients that have become due since its last step, clipped.

    Each delay is ``1 + slack`` times as long as the number of the stages that follow.

    Before the batch ``synchronous_from`` what is late is applied, and from there on nothing is late.

    With several ``replicas`` each batch is a list of as many, one of each. The gradient is the mean of theirs, where
    one that is skipped, as a number and a replica, counts as zero. Buffers are those of the first.
    """
    number, delays = count(), [late * (1 + slack) for late in reversed(range(len(stages)))]
    optimizers = [optimizer(parameters) if parameters else None for parameters in stages]
    schedulers = [scheduler(o) if scheduler and o is not None else None for o in optimizers]
    # Of each micro-batch, the gradients of all stages; and of each stage, what has become due since its last step.
    history: list[list[list[Tensor | None]]] = []
    due: list[list[list[Tensor | None]]] = [[] for _ in stages]

    def step(stage: int) -> None:
        chosen, gradients = optimizers[stage], due[stage]
        if chosen is not None and gradients:
            for at, parameter in enumerate(stages[stage]):
                there = [grads[at] for grads in gradients if grads[at] is not None]
                parameter.grad = sum(there[1:], start=there[0].clone()) if there else None  # type: ignore[union-attr]
            if clip is not None:
                clip(stages[stage])
            chosen.step()
        due[stage] = []

    def apply_the_rest() -> None:
        for stage in range(len(stages)):
            late = min(delays[stage], len(history))
            rest = [gradients[stage] for gradients in history[len(history) - late :]]
            for first in range(0, len(rest), micro_batches * accumulate):
                due[stage] = rest[first : first + micro_batches * accumulate]
                step(stage)
        history.clear()

    for batches in epochs:
        for index, batch in enumerate(batches):
            now = next(number)
            shares = [batch] if replicas == 1 else batch
            if now == synchronous_from:
                apply_the_rest()
                delays = [0] * len(stages)
            parts = min(micro_batches, len(shares[0][0]))
            for part in range(parts):
                network.zero_grad()
                for replica, (x, y) in enumerate(shares):
                    buffers = [buffer.clone() for buffer in network.buffers()]
                    part_x, part_y = x.tensor_split(parts)[part], y.tensor_split(parts)[part]
                    loss = nn.functional.cross_entropy(network(part_x), part_y)
                    if now not in skipped and (now, replica) not in skipped:
                        (loss / accumulate * (len(part_x) / len(x)) / replicas).backward()
                    for buffer, before in zip(network.buffers(), buffers, strict=True) if replica else ():
                        buffer.copy_(before)
                history.append([[None if p.grad is None else p.grad.clone() for p in stage] for stage in stages])
                for stage in range(len(stages)):
                    at = len(history) - 1 - delays[stage]
                    if at >= 0:
                        due[stage].append(history[at][stage])
            if (index + 1) % accumulate and index + 1 < len(batches):
                continue
            for stage in range(len(stages)):
                step(stage)
            for chosen in schedulers:
                if chosen is not None:
                    chosen.step()
        if drain == "epoch":
            apply_the_rest()
    if drain == "fit":
        apply_the_rest()
