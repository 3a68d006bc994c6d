"""Tests of ``recipes/experiments/prediction.py``: the command runs, and its formulas are those of known methods."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recipes.experiments.prediction import MOMENTUM, Weights, least_squares, main, train


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--steps", "9", "--seeds", "1"])
    assert "least squares" in capsys.readouterr().out


def trained(method: str, lr: float = 0.01) -> float:
    weights, loss, samples = least_squares(2, torch.Generator().manual_seed(0))
    return train(method, weights, loss, [torch.arange(samples)] * 40, lr)


def test_without_a_delay_it_is_sgd_and_with_a_delay_of_one_compensation_is_nesterov() -> None:
    def loss_after(nesterov: list[bool], late: bool) -> float:
        start, loss, _ = least_squares(2, torch.Generator().manual_seed(0))
        weights: Weights = [w.requires_grad_() for w in start]
        options = [torch.optim.SGD([w], 0.01, MOMENTUM, nesterov=n) for w, n in zip(weights, nesterov, strict=True)]
        before: Tensor | None = None
        for _ in range(40):
            first, second = torch.autograd.grad(loss(weights, None), weights)
            weights[0].grad, weights[1].grad, before = before if late else first, second, first
            for optimizer in options:
                optimizer.step()
        return float(loss(weights, None).detach())

    assert trained("no delay") == pytest.approx(loss_after([False, False], late=False), rel=1e-12)
    assert trained("plain") == pytest.approx(loss_after([False, False], late=True), rel=1e-12)
    assert trained("compensate") == pytest.approx(loss_after([True, False], late=True), rel=1e-12)


def test_what_has_no_limit_is_infinite() -> None:
    assert trained("plain", lr=10.0) == float("inf")
