"""The oracles of the update rules, each from its formula, without the package.

They know stages only as parts of a flat ``nn.Sequential``. Change one only when its formula in ``docs/staleness.md``
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.core.extrapolation_reference import Compensated, ahead, shares

Optimizer = Callable[[Any], torch.optim.Optimizer]
Epochs = Iterable[Sequence[tuple[Tensor, Tensor]]]


def parts_of(network: nn.Sequential, starts: Sequence[int]) -> list[nn.Sequential]:
    """The stages of a network that is cut at ``starts``."""
    bounds = [0, *starts, len(network)]
    return [network[begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]


def delays_of(count: int, slack: int) -> list[int]:
    """The delays of stages: as many batches as stages follow, each ``1 + slack`` times."""
    return [late * (1 + slack) for late in reversed(range(count))]


class Steps:
    """One optimizer a stage, whose learning rate in step ``t`` is ``lr * d ** -(1 - t / T)`` while ``t < T``.

    ``rate`` is what a scheduler multiplies it by. With ``compensate`` they are SGD with spike compensation.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        optimizer: Optimizer,
        slow_start: int = 0,
        rate: Callable[[int], float] = lambda step: 1.0,
        compensate: bool = False,
        clip: Callable[[Sequence[nn.Parameter]], object] | None = None,
        slack: int = 0,
    ) -> None:
        self.parameters = [list(part.parameters()) for part in parts]
        self.delays = delays_of(len(parts), slack)
        self.optimizers = [optimizer(own) if own else None for own in self.parameters]
        if compensate:
            self.optimizers = [one and Compensated(one.param_groups[0]["params"], one) for one in self.optimizers]
        self.base = next(one.param_groups[0]["lr"] for one in self.optimizers if one is not None)
        self.slow_start, self.rate, self.clip = slow_start, rate, clip
        self.t = 0

    def lr(self, stage: int, step: int) -> float:
        delay = self.delays[stage]
        slow = delay ** -(1 - step / self.slow_start) if delay and step < self.slow_start else 1.0
        return float(self.base * self.rate(step) * slow)

    def ahead(self, stage: int, steps: float, idle: int) -> list[Tensor]:
        chosen, first = self.optimizers[stage], self.t + idle
        rates = [self.lr(stage, first + number) * share for number, share in enumerate(shares(steps))]
        return [] if chosen is None else ahead(chosen, rates)

    def apply(self, stage: int, grads: Sequence[Tensor | None], batches: int = 1) -> None:
        chosen, delay = self.optimizers[stage], self.delays[stage]
        if chosen is None:
            return
        for parameter, grad in zip(self.parameters[stage], grads, strict=True):
            parameter.grad = grad
        if self.clip is not None:
            self.clip(self.parameters[stage])
        for group in chosen.param_groups:
            group["lr"] = self.lr(stage, self.t)
        if isinstance(chosen, Compensated):
            chosen.delay = delay / batches
        chosen.step()


def train_exactly(
    network: nn.Sequential,
    starts: Sequence[int],
    epochs: Epochs,
    optimizer: Optimizer,
    *,
    shrink: float = 1.0,
    slow_start: int = 0,
    by_last_step: bool = False,
    extrapolate: bool = False,
    compensate: bool = False,
    accumulate: int = 1,
    rate: Callable[[int], float] = lambda step: 1.0,
    clip: Callable[[Sequence[nn.Parameter]], object] | None = None,
    slack: int = 0,
) -> None:
    """Rules whose gradient is one of the full network, at ``w`` or further on.

    With ``by_last_step`` that is ``w + d (w - w before)``; with ``extrapolate`` where the optimizer will have taken
    ``w`` by the steps that come before the gradient's use.
    """
    parts = parts_of(network, starts)
    steps, batches_of_step = Steps(parts, optimizer, slow_start, rate, compensate, clip, slack), 1
    count, delays = len(parts), steps.delays
    for batches in epochs:
        history: list[list[list[Tensor]]] = []
        velocity = [[torch.zeros_like(p) for p in own] for own in steps.parameters]
        sums: list[list[Tensor] | None] = [None] * count
        for number, (x, y) in enumerate(batches):
            today = [[p.detach().clone() for p in own] for own in steps.parameters]
            if extrapolate and number % accumulate == 0:
                waiting = [min(number, delay) for delay in delays]
                points = [
                    steps.ahead(stage, late / batches_of_step, (delays[stage] - late) // batches_of_step)
                    for stage, late in enumerate(waiting)
                ]
            if extrapolate:
                with torch.no_grad():
                    for own, values in zip(steps.parameters, points, strict=True):
                        for p, value in zip(own, values, strict=True):
                            p.copy_(value)
            if by_last_step:
                with torch.no_grad():
                    for stage, own in enumerate(steps.parameters):
                        for p, v in zip(own, velocity[stage], strict=True):
                            p.copy_(p + delays[stage] * v)
            network.zero_grad()
            (nn.functional.cross_entropy(network(x), y) / accumulate).backward()
            history.append(
                [[p.grad * shrink ** (count - 1 - stage) for p in own] for stage, own in enumerate(steps.parameters)]
            )
            with torch.no_grad():
                for own, values in zip(steps.parameters, today, strict=True):
                    for p, value in zip(own, values, strict=True):
                        p.copy_(value)
            for stage in range(count):
                due = number - delays[stage]
                if due >= 0:
                    new, old = history[due][stage], sums[stage]
                    sums[stage] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
            if (number + 1) % accumulate and number + 1 < len(batches):
                continue
            batches_of_step = number % accumulate + 1
            for stage, total in enumerate(sums):
                if total is not None:
                    steps.apply(stage, total, batches_of_step)
                before = zip(steps.parameters[stage], today[stage], strict=True)
                velocity[stage] = [(p.detach() - value) / batches_of_step for p, value in before]
            sums = [None] * count
            steps.t += 1
        for stage in range(count):
            late = [grads[stage] for grads in history[max(0, len(history) - delays[stage]) :]]
            for first in range(0, len(late), accumulate):
                steps.apply(
                    stage, [sum(same) for same in zip(*late[first : first + accumulate], strict=True)], batches_of_step
                )


def train_with_features_replayed(
    network: nn.Sequential,
    starts: Sequence[int],
    epochs: Epochs,
    optimizer: Optimizer,
    slow_start: int = 0,
    slack: int = 0,
) -> None:
    """Features Replay: ``g_k = d< F_k(h_{k-1}^s ; w_k^t), delta_k^s >``, the forward run again with today's weights."""
    parts = parts_of(network, starts)

    def backward(stage: int, x: Tensor, state: Any, delta: Tensor) -> tuple[list[Tensor], Tensor]:
        x = x.detach().requires_grad_()
        own = list(parts[stage].parameters())
        *grads, by_input = torch.autograd.grad(parts[stage](x), [*own, x], delta)
        return grads, by_input

    steps = Steps(parts, optimizer, slow_start, slack=slack)
    _train_stages(parts, epochs, steps, lambda part, x: (part(x), None), backward)


def train_with_current_weights(
    network: nn.Sequential,
    starts: Sequence[int],
    epochs: Epochs,
    optimizer: Optimizer,
    shrink: float = 1.0,
    slack: int = 0,
) -> None:
    """The released code: stale activations and today's weights, layer by layer, for linear layers and ``tanh``."""
    parts = parts_of(network, starts)

    def forward(part: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        values = [x]
        for layer in part.children():
            values.append(layer(values[-1]))
        return values[-1], values

    def backward(stage: int, x: Tensor, values: Any, delta: Tensor) -> tuple[list[Tensor], Tensor]:
        grads: list[Tensor] = []
        for layer, before, after in reversed(list(zip(parts[stage].children(), values[:-1], values[1:], strict=True))):
            if isinstance(layer, nn.Tanh):
                delta = delta * (1 - after**2)
            else:
                assert isinstance(layer, nn.Linear)
                grads = [delta.T @ before, delta.sum(dim=0), *grads]
                delta = delta @ layer.weight
        return grads, delta * shrink

    _train_stages(parts, epochs, Steps(parts, optimizer, slack=slack), forward, backward)


def _train_stages(
    parts: Sequence[nn.Module], epochs: Epochs, steps: Steps, forward: Callable[..., Any], backward: Callable[..., Any]
) -> None:
    """Batch by batch: all forwards, then each stage's backward of the batch that is due, then all updates."""
    count = len(parts)
    for batches in epochs:
        inputs: list[list[Tensor]] = []
        states: list[list[Any]] = []
        deltas: dict[tuple[int, int], Tensor] = {}

        def update(number: int, last: int, inputs: Any = inputs, states: Any = states, deltas: Any = deltas) -> None:
            ready = {}
            for stage in range(count):
                due = number - steps.delays[stage]
                if 0 <= due < last:
                    ready[stage] = backward(stage, inputs[due][stage], states[due][stage], deltas[due, stage])
            for stage, (grads, by_input) in ready.items():
                steps.apply(stage, [grad.detach() for grad in grads])
                deltas[number - steps.delays[stage], stage - 1] = by_input.detach()

        for number, (x, y) in enumerate(batches):
            inputs.append([])
            states.append([])
            with torch.no_grad():
                for part in parts:
                    inputs[-1].append(x)
                    x, state = forward(part, x)
                    states[-1].append(state)
            output = x.detach().requires_grad_()
            nn.functional.cross_entropy(output, y).backward()
            assert output.grad is not None
            deltas[number, count - 1] = output.grad
            update(number, number + 1)
            steps.t += 1
        for late in range(1, 1 + steps.delays[0]):
            update(len(inputs) - 1 + late, len(inputs))
