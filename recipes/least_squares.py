"""Delayed gradients on a least-squares problem live here: simulated, and beside what the theory says of them.

There everything can be reckoned: whether a learning rate is stable is an eigenvalue, not an opinion. What is derived is
in ``docs/theory.md``; a further curve is a further function here. Run it from the repository's root:

    python -m recipes.least_squares --picture docs/images/least_squares.png
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import pi, sin
from pathlib import Path

import torch
from lightning import LightningModule
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

SEED = 0
PARTS = 16  # layers; a stage has PARTS / K of them
WIDTH = 2  # weights of a layer
SAMPLES = 512
CONDITION = 100.0  # largest over smallest eigenvalue of the Hessian
NOISE = 0.5  # standard deviation of what the targets have beyond a linear function

STAGES = (1, 2, 3, 4, 6, 8, 12, 16)
SHOWN = (1, 2, 4, 8)
UNSTABLE = 16
RATE = 0.4  # times 1/L; above the limit of K = 16, below that of all others that are shown
STEPS = 3000
DRAWN = 1000  # iterations in the picture
BATCH = 16

_INK, _FAINT = "#222222", "#8a8a8a"
_COLOURS = {1: "#222222", 2: "#3274a1", 4: "#3a923a", 8: "#d9822b", 16: "#b03a5b"}


@dataclass(frozen=True)
class Problem:
    """Minimise ``f(w) = ||A w - b||^2 / (2 n)``.

    Attributes:
        features: ``A``, shape ``(n, p)``, scaled so that the Hessian's largest eigenvalue L is 1.
        targets: ``b``, shape ``(n,)``.
    """

    features: Tensor
    targets: Tensor

    @property
    def hessian(self) -> Tensor:
        """``A' A / n``, shape ``(p, p)``."""
        return self.features.T @ self.features / len(self.features)

    def gradient(self, weights: Tensor, batch: Tensor) -> Tensor:
        """The mean gradient of some samples.

        Args:
            weights: ``(r, p)``: of r trainings.
            batch: The samples' numbers.

        Returns:
            ``(r, p)``.
        """
        features = self.features[batch]
        return (weights @ features.T - self.targets[batch]) @ features / len(features)


def make_problem(seed: int = SEED) -> Problem:
    """A problem whose eigenvalues lie evenly on a logarithmic scale, each mode spread over all weights."""
    generator = torch.Generator().manual_seed(seed)
    count = PARTS * WIDTH

    def orthogonal(rows: int) -> Tensor:
        normal = torch.randn(rows, count, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal).Q

    roots = torch.logspace(0, -0.5, count, base=CONDITION, dtype=torch.float64)
    features = SAMPLES**0.5 * orthogonal(SAMPLES) * roots @ orthogonal(count).T
    weights = torch.randn(count, generator=generator, dtype=torch.float64)
    noise = NOISE * torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    return Problem(features, features @ weights + noise)


# ---- the rule


def stages_of_parts(num_stages: int) -> list[int]:
    """The stage ``1..K`` of each layer, cut as evenly as it goes."""
    return [part * num_stages // PARTS + 1 for part in range(PARTS)]


def delays_of_weights(num_stages: int) -> Tensor:
    """The delay ``d(k) = K - k`` of each weight, shape ``(p,)``."""
    stages = torch.tensor(stages_of_parts(num_stages)).repeat_interleave(WIDTH)
    return num_stages - stages


def simulate(
    problem: Problem, num_stages: int, rates: Sequence[float], batches: Iterable[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Trains with delayed gradients, from zero and without a drain, with several learning rates at once.

    Args:
        problem: What to minimise.
        num_stages: ``K``.
        rates: The learning rates, r of them.
        batches: Which samples each iteration sees, T of them; ``None``: all.

    Returns:
        The squared norm of the whole gradient before each iteration, ``(T, r)``, and the last weights, ``(r, p)``.
    """
    delays = delays_of_weights(num_stages)
    hessian = problem.hessian
    constant = problem.features.T @ problem.targets / len(problem.targets)
    steps = torch.tensor(rates, dtype=torch.float64)[:, None]
    weights = torch.zeros(len(rates), len(delays), dtype=torch.float64)
    # Row s modulo K holds the gradient of iteration s; before there is one, zero, so that its stage stays as it is.
    history = torch.zeros(num_stages, *weights.shape, dtype=torch.float64)
    columns = torch.arange(len(delays))
    norms = []
    for iteration, batch in enumerate(batches):
        whole = weights @ hessian - constant
        norms.append(whole.square().sum(dim=1))
        history[iteration % num_stages] = whole if batch is None else problem.gradient(weights, batch)
        weights = weights - steps * history[(iteration - delays) % num_stages, :, columns].T
    return torch.stack(norms), weights


class Part(nn.Module):
    """A layer that adds what its features contribute to the prediction, and passes both on."""

    def __init__(self, begin: int) -> None:
        super().__init__()
        self.columns = slice(begin, begin + WIDTH)
        self.weight = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, value: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Map features ``(batch, p)`` and a prediction ``(batch,)`` to the same features and the next prediction."""
        features, prediction = value
        return features, prediction + features[:, self.columns] @ self.weight


class LeastSquares(LightningModule):
    """The problem as a network in layers, for a Trainer: the simulation's oracle.

    Args:
        rate: The learning rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(*(Part(part * WIDTH) for part in range(PARTS)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        features, targets = batch
        _, prediction = self.net((features, torch.zeros_like(targets)))
        return (prediction - targets).square().mean() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


# ---- the theory


def limit_of_delay(delay: int) -> float:
    """The largest stable learning rate, times the eigenvalue, of a mode whose weights all have one delay."""
    return 2 * sin(pi / (2 * (2 * delay + 1)))


def limit_of_spread(num_stages: int) -> float:
    """The same of a mode that is spread evenly over K stages."""
    return 2 * num_stages * sin(pi / (2 * num_stages)) ** 2


def spectral_radius(hessian: Tensor, delays: Tensor, rate: float) -> float:
    """By what the error is multiplied in an iteration, in the long run: stable below 1.

    Args:
        hessian: ``(p, p)``.
        delays: Of each weight, ``(p,)``.
        rate: The learning rate.
    """
    count, depth = len(delays), int(delays.max()) + 1
    # The error of now and of the `depth - 1` iterations before, one below the other.
    companion = torch.zeros(depth * count, depth * count, dtype=torch.float64)
    companion[:count, :count] = torch.eye(count, dtype=torch.float64)
    for delay in range(depth):
        rows = (delays == delay).nonzero().flatten()
        companion[rows, delay * count : (delay + 1) * count] -= rate * hessian[rows]
    companion[count:, :-count] += torch.eye((depth - 1) * count, dtype=torch.float64)
    return float(torch.linalg.eigvals(companion).abs().max())


def largest_stable_rate(hessian: Tensor, delays: Tensor, relative: float = 1e-3) -> float:
    """The learning rate at which the spectral radius becomes 1, by bisection.

    Args:
        hessian: ``(p, p)``, with the largest eigenvalue 1.
        delays: Of each weight, ``(p,)``.
        relative: How exact.
    """
    low, high = 0.0, 2.5
    while high - low > relative * high:
        middle = (low + high) / 2
        stable = spectral_radius(hessian, delays, middle) < 1
        low, high = (middle, high) if stable else (low, middle)
    return (low + high) / 2


# ---- the experiments


def measured_limit(problem: Problem, num_stages: int, rates: Sequence[float]) -> float:
    """The largest of some ascending learning rates with which training by whole gradients ends nearer to the minimum.

    From the first rate that fails, all larger ones count as failed.
    """
    norms, _ = simulate(problem, num_stages, rates, [None] * STEPS)
    # Near the limit it oscillates.
    good = norms[-100:].amax(dim=0) < norms[0]
    return rates[int(good.int().cumprod(dim=0).sum()) - 1]


def random_batches(steps: int, seed: int = SEED) -> list[Tensor]:
    """Which ``BATCH`` samples each iteration sees."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, SAMPLES, (steps, BATCH), generator=generator))


def floors(problem: Problem, num_stages: int, rates: Sequence[float]) -> Tensor:
    """The mean squared norm of the gradient that training by mini-batches ends at, ``(r,)``; inf or nan if unstable."""
    norms, _ = simulate(problem, num_stages, rates, random_batches(3 * STEPS))
    return norms[STEPS:].mean(dim=0)


@dataclass(frozen=True)
class Results:
    """What the picture shows.

    Attributes:
        exact: By K, the largest stable learning rate by the spectral radius.
        measured: By K, the same by training.
        norms: By K, the squared norm of the gradient before each iteration with the learning rate ``RATE``, ``(T,)``.
        factors: By K, the spectral radius at that rate.
        rates: The learning rates of the mini-batches.
        floors: By K, what they end at, ``(r,)``.
    """

    exact: dict[int, float]
    measured: dict[int, float]
    norms: dict[int, Tensor]
    factors: dict[int, float]
    rates: list[float]
    floors: dict[int, Tensor]


def run() -> Results:
    """All experiments."""
    problem = make_problem()
    hessian = problem.hessian
    candidates = torch.logspace(-1.3, 0.4, 200, dtype=torch.float64).tolist()
    rates = torch.logspace(-1.5, 0.3, 28, dtype=torch.float64).tolist()
    return Results(
        {stages: largest_stable_rate(hessian, delays_of_weights(stages)) for stages in STAGES},
        {stages: measured_limit(problem, stages, candidates) for stages in STAGES},
        {stages: simulate(problem, stages, [RATE], [None] * DRAWN)[0][:, 0] for stages in (*SHOWN, UNSTABLE)},
        {stages: spectral_radius(hessian, delays_of_weights(stages), RATE) for stages in (*SHOWN, UNSTABLE)},
        rates,
        {stages: floors(problem, stages, rates) for stages in SHOWN},
    )


# ---- the picture


def draw(results: Results) -> Figure:
    """Draw the stable learning rates, the gradients of some trainings, and where mini-batches end."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_limits(left, results)
    _draw_norms(middle, results)
    _draw_floors(right, results)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_limits(axes: Axes, results: Results) -> None:
    smooth = range(1, max(STAGES) + 1)
    axes.plot(smooth, [limit_of_spread(k) for k in smooth], color=_FAINT, ls="--", label="2K sin²(π/2K): an even mode")
    axes.plot(
        smooth,
        [limit_of_delay(k - 1) for k in smooth],
        color=_FAINT,
        ls=":",
        label="2 sin(π/(4K−2)): delay K−1 everywhere",
    )
    axes.plot(*zip(*results.exact.items(), strict=True), color=_COLOURS[2], label="spectral radius = 1, this problem")
    axes.plot(
        *zip(*results.measured.items(), strict=True), "o", color=_INK, mfc="white", ms=6, label="trained, this problem"
    )
    axes.set(xscale="log", yscale="log", xlabel="stages K", ylabel="largest stable learning rate × L")
    axes.set_xticks(STAGES, [str(stages) for stages in STAGES])
    axes.set_xticks([], minor=True)
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axes.set_yticks([], minor=True)
    axes.set_title("The stable learning rate falls like 1/K", loc="left", fontsize=11)
    axes.legend(fontsize=8.5, frameon=False, loc="lower left")


def _draw_norms(axes: Axes, results: Results) -> None:
    # K = 1, 2 and 4 lie on each other: the first are wide enough to be seen below the last.
    for (stages, norms), width in zip(results.norms.items(), (5.0, 2.8, 1.2, 1.2, 1.2), strict=True):
        axes.plot(norms, color=_COLOURS[stages], lw=width, alpha=0.35 if stages == 1 else 1.0, label=f"K = {stages}")
    # What the spectral radius says of the end, drawn through the last point.
    for stages in (1, UNSTABLE):
        norms, factor = results.norms[stages], results.factors[stages]
        at = torch.arange(len(norms))
        axes.plot(at, norms[-1] * factor ** (2.0 * (at - at[-1])), color=_INK, ls=(0, (1, 2)), lw=1.2)
    axes.plot([], [], color=_INK, ls=(0, (1, 2)), lw=1.2, label="spectral radius")
    first = float(results.norms[1][0])
    axes.set(yscale="log", xlabel="iteration t", ylabel="‖∇f(w)‖²", ylim=(first * 1e-9, first * 1e3))
    axes.set_title(f"Whole gradients, learning rate {RATE}/L", loc="left", fontsize=11)
    axes.legend(fontsize=8.5, frameon=False, ncols=2, loc="upper right")


def _draw_floors(axes: Axes, results: Results) -> None:
    for stages, values in results.floors.items():
        stable = [rate < results.exact[stages] for rate in results.rates]
        points = [(x, float(y)) for x, y, ok in zip(results.rates, values, stable, strict=True) if ok]
        axes.plot(*zip(*points, strict=True), "o-", ms=3.5, lw=1.3, color=_COLOURS[stages], label=f"K = {stages}")
        axes.axvline(results.exact[stages], color=_COLOURS[stages], lw=1, ls="--", alpha=0.7)
    axes.plot([], [], color=_FAINT, lw=1, ls="--", label="largest stable rate without noise")
    axes.set(
        xscale="log", yscale="log", xlabel="learning rate × L", ylabel="mean of ‖∇f(w)‖² at the end", ylim=(5e-4, 1)
    )
    axes.set_title(f"Mini-batches of {BATCH}", loc="left", fontsize=11)
    axes.legend(fontsize=8.5, frameon=False, loc="upper left")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments, print the limits, and draw the picture."""
    parser = argparse.ArgumentParser(description="Delayed gradients on a least-squares problem.")
    parser.add_argument("--picture", type=Path, required=True, help="where to draw it: a .png or .svg file")
    path: Path = parser.parse_args(arguments).picture
    results = run()
    print("largest stable learning rate, times L")
    print(" K  delay K-1  exact  trained  even mode")
    for stages in STAGES:
        figures = (limit_of_delay(stages - 1), results.exact[stages], results.measured[stages], limit_of_spread(stages))
        print(f"{stages:2d}  {figures[0]:9.3f}  {figures[1]:5.3f}  {figures[2]:7.3f}  {figures[3]:9.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(path, dpi=150)
    print(f"drawn in {path}")


if __name__ == "__main__":
    main()
