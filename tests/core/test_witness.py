"""Tests of ``witness.py``: what a stage's first backward adds is told once, however it comes to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.core.delay_line import DelayLine
from lightning_ddg.core.execution import Execution
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.staged import Staged
from lightning_ddg.core.staleness import PAPER, Staleness
from lightning_ddg.core.witness import Witness


def segments() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(3, 3).double() for _ in range(3)]


def inputs(batch: int) -> Tensor:
    return torch.full((2, 3), float(batch + 1), dtype=torch.float64)


def executions(layers: list[nn.Module], slack: int) -> dict[str, Execution]:
    staged = Staged(layers, Staleness(stash=False), False, slack=slack)
    return {"delay line": DelayLine(layers, slack=slack), "staged": staged}


@pytest.mark.parametrize("kind", ["delay line", "staged"])
@pytest.mark.parametrize(("batches", "slack"), [(1, 0), (2, 0), (3, 0), (5, 0), (2, 1), (7, 1), (9, 2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_stage_is_told_of_once_with_the_first_batch(kind: str, batches: int, slack: int, accumulate: int) -> None:
    layers = segments()
    nn.Sequential(*layers)(inputs(0)).square().sum().backward()
    expected = [layer.weight.grad.clone() for layer in layers]  # type: ignore[union-attr, operator]
    for layer in layers:
        layer.zero_grad()
    told: dict[int, Tensor | None] = {}

    def tell(stage: int, grads: list[Tensor | None]) -> None:
        assert stage not in told
        told[stage] = grads[0].clone() if grads[0] is not None else None

    chosen = executions(layers, slack)[kind]
    witness = Witness(chosen, 3, lambda stage: list(layers[stage - 1].parameters()), tell, slack)
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)
    for number in range(batches):
        loss = witness.train(Batch(number), (inputs(number),), {}).square().sum()
        witness.backward(loss.backward)
        assert set(told) == {3 - late for late in range(3) if late * (1 + slack) <= number}
        if number % accumulate == accumulate - 1:
            witness.before_step()
            optimizer.step()
            witness.after_step()
            optimizer.zero_grad(set_to_none=number % 4 == 3)
    while witness.waiting:
        assert witness.drain()
    assert set(told) == {1, 2, 3}
    for stage, gradient in enumerate(expected, start=1):
        assert gradient.equal(told[stage]) or torch.allclose(gradient, told[stage], rtol=1e-15)  # type: ignore[arg-type]


def test_what_was_there_before_is_not_counted() -> None:
    layers = segments()[:1]
    told: list[Tensor | None] = []
    execution = DelayLine(layers, rule=PAPER)
    witness = Witness(execution, 1, lambda stage: list(layers[0].parameters()), lambda stage, grads: told.extend(grads))
    layers[0].weight.grad = torch.ones_like(layers[0].weight)  # type: ignore[arg-type, assignment]
    witness.backward(witness.train(Batch(0), (inputs(0),), {}).sum().backward)
    assert told[0] is not None
    assert told[0].tolist() == [[2.0] * 3] * 3
    assert layers[0].weight.grad.tolist() == [[3.0] * 3] * 3  # type: ignore[union-attr, operator]


def test_after_a_clear_nothing_is_told() -> None:
    layers = segments()
    told: list[int] = []
    witness = Witness(DelayLine(layers), 3, lambda stage: [], lambda stage, grads: told.append(stage))
    witness.backward(witness.train(Batch(0), (inputs(0),), {}).sum().backward)
    witness.clear()
    assert not witness.waiting
    witness.drain()
    witness.backward(witness.train(Batch(1), (inputs(1),), {}).sum().backward)
    assert told == [3]
