"""Weight prediction or spike compensation? Both beside plain delayed gradients, in a simulation of the algorithm alone.

python -m recipes.experiments.prediction

Two tasks in float64, SGD with momentum 0.9: least squares (64 weights in K blocks) and a network of K layers of
``tanh``. A stage's gradient is the block of the full gradient at the weights of d(k) = K - k batches ago. The formulas
are in `docs/staleness.md`; change one only there and here.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

MOMENTUM = 0.9
METHODS = ("no delay", "plain", "predict", "compensate")
Weights = list[Tensor]
Loss = Callable[[Weights, Tensor | None], Tensor]


def train(method: str, weights: Weights, loss: Loss, batches: list[Tensor], lr: float) -> float:
    """Trains with delayed gradients.

    Args:
        method: One of ``METHODS``.
        weights: The weights of each stage, input side first.
        loss: The loss of a batch (indices of samples), or of all samples for ``None``.
        batches: The batches.
        lr: The learning rate.

    Returns:
        The loss of all samples in the end; infinity where it has no limit.
    """
    count = len(weights)
    delays = [0 if method == "no delay" else count - 1 - stage for stage in range(count)]
    before = weights
    velocity = [torch.zeros_like(w) for w in weights]
    waiting: list[deque[Tensor]] = [deque() for _ in weights]
    for batch in batches:
        point = weights
        if method == "predict":
            point = [w + d * (w - old) for w, old, d in zip(weights, before, delays, strict=True)]
        leaves = [w.detach().requires_grad_() for w in point]
        grads = torch.autograd.grad(loss(leaves, batch), leaves)
        before, weights = weights, list(weights)
        for stage, (grad, d) in enumerate(zip(grads, delays, strict=True)):
            waiting[stage].append(grad)
            if len(waiting[stage]) <= d:
                continue
            due = waiting[stage].popleft()
            velocity[stage] = MOMENTUM * velocity[stage] + due
            step = velocity[stage]
            if method == "compensate":
                step = MOMENTUM**d * step + (1 - MOMENTUM**d) / (1 - MOMENTUM) * due
            weights[stage] = weights[stage] - lr * step
    end = float(loss(weights, None))
    return end if math.isfinite(end) and end < 1e3 else math.inf


def least_squares(num_stages: int, generator: torch.Generator) -> tuple[Weights, Loss, int]:
    """Linear regression on features of very different sizes, with noise in the targets."""
    size, samples = 64, 512
    x = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    x = x @ torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    x = x * torch.logspace(0, -1.5, size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
    y = x @ torch.randn(size, generator=generator, dtype=torch.float64)
    y = y + 0.1 * torch.randn(samples, generator=generator, dtype=torch.float64)

    def loss(weights: Weights, batch: Tensor | None) -> Tensor:
        chosen = slice(None) if batch is None else batch
        return (x[chosen] @ torch.cat(weights) - y[chosen]).square().mean() / 2

    return [torch.zeros(size // num_stages, dtype=torch.float64) for _ in range(num_stages)], loss, samples


def network(num_stages: int, generator: torch.Generator) -> tuple[Weights, Loss, int]:
    """Classification of points by a random network, by one of K layers, one a stage."""
    width, samples = 16, 512
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    hidden = (x @ torch.randn(width, 24, generator=generator, dtype=torch.float64)).tanh()
    y = (hidden @ torch.randn(24, 4, generator=generator, dtype=torch.float64)).argmax(dim=1)

    def loss(weights: Weights, batch: Tensor | None) -> Tensor:
        chosen = slice(None) if batch is None else batch
        value = x[chosen]
        for w in weights[:-1]:
            value = (value @ w).tanh()
        return torch.nn.functional.cross_entropy(value @ weights[-1], y[chosen])

    shapes = [(width, width)] * (num_stages - 1) + [(width, 4)]
    weights = [torch.randn(*shape, generator=generator, dtype=torch.float64) / width**0.5 for shape in shapes]
    return weights, loss, samples


TASKS = {
    "least squares": (least_squares, (0.01, 0.03, 0.05, 0.1)),
    "network": (network, (0.003, 0.01, 0.03, 0.1)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of all runs.

    Args:
        arguments: The command line; ``None`` means ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recipes.experiments.prediction", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=1500, help="batches of 32 samples")
    parser.add_argument("--seeds", type=int, default=3, help="runs, of which the median is shown")
    asked = parser.parse_args(arguments)
    table = Table(title=f"loss after {asked.steps} batches, median of {asked.seeds}; inf: diverged")
    for name in ("task", "K", "lr", *METHODS):
        table.add_column(name, justify="right")
    for task, (make, rates) in TASKS.items():
        for num_stages in (4, 8):
            for lr in rates:
                ends = []
                for method in METHODS:
                    runs = []
                    for seed in range(asked.seeds):
                        generator = torch.Generator().manual_seed(seed)
                        weights, loss, samples = make(num_stages, generator)
                        batches = [torch.randint(samples, (32,), generator=generator) for _ in range(asked.steps)]
                        runs.append(train(method, weights, loss, batches, lr))
                    ends.append(sorted(runs)[len(runs) // 2])
                table.add_row(task, str(num_stages), f"{lr:g}", *(f"{end:.4f}" for end in ends))
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
