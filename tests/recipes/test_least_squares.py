"""Tests of the least-squares experiment: the simulation against a Trainer, the theory against known cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddg import DDGStrategy
from recipes import least_squares
from recipes.least_squares import (
    PARTS,
    WIDTH,
    LeastSquares,
    delays_of_weights,
    largest_stable_rate,
    limit_of_delay,
    limit_of_spread,
    make_problem,
    measured_limit,
    random_batches,
    simulate,
    spectral_radius,
    stages_of_parts,
)
from tests.networks import quiet_trainer


@pytest.mark.parametrize("stages", [1, 2, 4, 6])
def test_the_simulation_is_what_a_trainer_does(stages: int) -> None:
    problem, batches = make_problem(), random_batches(9)
    cut = stages_of_parts(stages)
    points = [f"net.{part}" for part in range(1, PARTS) if cut[part] != cut[part - 1]]
    module = LeastSquares(0.3)
    data = TensorDataset(problem.features[torch.cat(batches)], problem.targets[torch.cat(batches)])
    strategy = DDGStrategy(num_stages=stages, split_points=points, drain="never")
    quiet_trainer(strategy=strategy, max_epochs=1).fit(module, DataLoader(data, batch_size=len(batches[0])))
    trained = torch.cat([parameter.detach() for parameter in module.parameters()])
    _, weights = simulate(problem, stages, [0.1, 0.3], batches)
    assert trained.abs().max() > 0
    assert torch.allclose(weights[1], trained, rtol=0, atol=1e-13)
    assert not torch.allclose(weights[0], trained, rtol=0, atol=1e-3)


def test_the_problem_is_the_same_every_time_and_scaled() -> None:
    one, other = make_problem(), make_problem()
    assert torch.equal(one.features, other.features)
    eigenvalues = torch.linalg.eigvalsh(one.hessian)
    assert float(eigenvalues[-1]) == pytest.approx(1.0)
    assert float(eigenvalues[0]) == pytest.approx(1 / least_squares.CONDITION)
    everything = torch.arange(least_squares.SAMPLES)
    gradients = one.gradient(torch.ones(1, PARTS * WIDTH, dtype=torch.float64), everything)
    residuals = one.features.sum(dim=1) - one.targets
    assert torch.allclose(gradients[0], one.features.T @ residuals / len(residuals))


@pytest.mark.parametrize("delay", [0, 1, 2, 7])
def test_the_limit_of_one_delay_is_that_of_its_recurrence(delay: int) -> None:
    assert limit_of_delay(0) == 2.0
    limit = largest_stable_rate(torch.eye(1, dtype=torch.float64), torch.tensor([delay]), 1e-6)
    assert limit == pytest.approx(limit_of_delay(delay), rel=1e-5)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_the_limit_of_an_even_mode_is_that_of_its_recurrence(stages: int) -> None:
    # All modes but one are flat: a little curvature keeps them from the unit circle.
    hessian = torch.full((stages, stages), 1 / stages, dtype=torch.float64) + 1e-6 * torch.eye(stages)
    delays = torch.arange(stages).flip(0)
    below, above = (spectral_radius(hessian, delays, factor * limit_of_spread(stages)) for factor in (0.99, 1.01))
    assert below < 1 < above - 1e-4


def test_plain_gradient_descent_shrinks_each_mode_by_itself() -> None:
    hessian = torch.diag(torch.tensor([1.0, 0.25], dtype=torch.float64))
    assert spectral_radius(hessian, torch.tensor([0, 0]), 1.5) == pytest.approx(0.625)


@pytest.mark.parametrize("stages", [1, 4])
def test_training_finds_the_limit_that_the_spectral_radius_has(stages: int) -> None:
    problem = make_problem()
    exact = largest_stable_rate(problem.hessian, delays_of_weights(stages))
    rates = [exact * factor for factor in (0.9, 0.96, 1.04, 1.1)]
    assert measured_limit(problem, stages, rates) == rates[1]


def test_the_picture_is_drawn_and_the_limits_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A tenth of the work: what it shows is tested above.
    monkeypatch.setattr(least_squares, "STEPS", 150)
    monkeypatch.setattr(least_squares, "STAGES", (1, 2, 4, 8))
    path = tmp_path / "pictures" / "least_squares.svg"
    least_squares.main(["--picture", str(path)])
    printed = capsys.readouterr().out
    assert printed.startswith("largest stable learning rate, times L\n K  delay K-1  exact  trained  even mode\n")
    assert " 4      0.445  0.936  " in printed
    assert path.read_text().startswith("<?xml")
