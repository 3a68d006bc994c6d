"""Tests of ``delay_line.py``: gradients leave each stage's queue when they are due, and are added to what is there."""

from __future__ import annotations

from functools import partial
from typing import cast

import pytest
import torch
from torch import nn

from lightning_ddg.core.delay_line import DelayLine
from lightning_ddg.core.rng import Batch


def stages(count: int) -> list[nn.Linear]:
    return [nn.Linear(1, 1, bias=False) for _ in range(count)]


def weights(layers: list[nn.Linear]) -> list[nn.Parameter]:
    return [cast(nn.Parameter, layer.weight) for layer in layers]


def put(parameters: list[nn.Parameter], value: float) -> None:
    """A backward that adds ``value`` to every gradient."""
    for parameter in parameters:
        grad = torch.full_like(parameter, value)
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def grads(parameters: list[nn.Parameter]) -> list[float | None]:
    return [None if parameter.grad is None else float(parameter.grad.sum()) for parameter in parameters]


def test_each_stage_gets_the_gradient_of_the_batch_that_is_due() -> None:
    layers = stages(3)
    parameters = weights(layers)
    outside = nn.Parameter(torch.ones(1))
    line = DelayLine(layers, [outside])
    seen = []
    for batch in range(1, 6):
        for parameter in (*parameters, outside):
            parameter.grad = None
        line.backward(partial(put, [*parameters, outside], float(batch)))
        seen.append(grads([*parameters, outside]))
        line.after_step()
    assert seen == [
        [None, None, 1.0, 1.0], [None, 1.0, 2.0, 2.0], [1.0, 2.0, 3.0, 3.0], [2.0, 3.0, 4.0, 4.0], [3.0, 4.0, 5.0, 5.0]
    ]  # fmt: skip
    assert line.waiting
    drained = []
    while line.waiting:
        for parameter in (*parameters, outside):
            parameter.grad = None
        assert line.drain()
        drained.append(grads([*parameters, outside]))
        line.after_step()
    assert drained == [[4.0, 5.0, None, None], [5.0, None, None, None]]
    assert not line.drain()


def test_accumulated_gradients_stay() -> None:
    layers = stages(2)
    parameters = weights(layers)
    line = DelayLine(layers)
    for batch in (1.0, 10.0, 100.0):
        line.backward(partial(put, parameters, batch))
    assert grads(parameters) == [11.0, 111.0]
    line.after_step()
    for parameter in parameters:
        parameter.grad = None
    line.backward(partial(put, parameters, 1000.0))
    assert grads(parameters) == [100.0, 1000.0]


@pytest.mark.parametrize("left_over", [None, 0.0, 7.0])
def test_a_stage_without_a_due_gradient_is_left_alone_by_its_optimizer(left_over: float | None) -> None:
    """A zero gradient is not a missing one: with weight decay and momentum it would change the stage."""
    layers = stages(2)
    first = weights(layers)[0]
    before = first.detach().clone()
    optimizer = torch.optim.AdamW([first], lr=0.1, weight_decay=0.5)
    line = DelayLine(layers)
    first.grad = None if left_over is None else torch.full_like(first, left_over)
    line.backward(partial(put, weights(layers), 1.0))
    optimizer.step()
    assert first.grad is None
    assert torch.equal(first, before)
    assert not optimizer.state


def test_a_parameter_that_got_no_gradient_has_none_when_that_batch_is_due() -> None:
    layers = stages(2)
    parameters = weights(layers)
    line = DelayLine(layers)
    line.backward(partial(put, parameters[1:], 1.0))
    line.after_step()
    line.backward(partial(put, parameters, 2.0))
    assert grads(parameters)[0] is None


def test_clear_forgets_what_waits() -> None:
    layers = stages(3)
    line = DelayLine(layers)
    line.backward(partial(put, weights(layers), 1.0))
    line.clear()
    assert not line.waiting
    assert not line.drain()


def test_stages_run_one_after_the_other_each_with_its_own_seed() -> None:
    class Drawing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, torch.rand(1)])

    batch = Batch(7, seed=3)
    expected = []
    for stage in (1, 2, 3):
        with batch.draws(stage):
            expected.append(torch.rand(1).item())
    line = DelayLine([Drawing(), Drawing(), Drawing()])
    assert line.train(batch, (torch.ones(1),), {}).tolist() == [1.0, *expected]
    assert line.evaluate(batch, (torch.ones(0),), {}).tolist() == expected


def test_the_first_stage_takes_the_networks_arguments() -> None:
    class Keyword(nn.Module):
        def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
            return x * scale

    line = DelayLine([Keyword(), nn.ReLU(), nn.Flatten(0)])
    x = torch.tensor([[-1.0, 2.0]])
    assert line.train(Batch(0), (x,), {"scale": 3.0}).tolist() == [0.0, 6.0]
    assert line.evaluate(Batch(0), (x,), {"scale": -1.0}).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
def test_accumulation_divides_the_delay_counted_in_updates(accumulate: int) -> None:
    """The point of Accumulated Decoupled Learning, arXiv 2012.03747."""
    layers = stages(4)
    parameters = weights(layers)
    line = DelayLine(layers)
    for update in range(8):
        for parameter in parameters:
            parameter.grad = None
        for _ in range(accumulate):
            # The gradient says which update the weights of its forward come from.
            line.backward(partial(put, parameters, float(update)))
        line.after_step()
    late = [update - grad / accumulate for grad in grads(parameters) if grad is not None]
    assert late == pytest.approx([delay / accumulate for delay in (3, 2, 1, 0)])
