"""Tests of ``staged.py``: what K processes compute, in one; and of ``Observers``, who are told of it."""

from __future__ import annotations

from collections import defaultdict, deque
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.core.delay_line import DelayLine
from lightning_ddg.core.execution import Execution, Observer, Observers
from lightning_ddg.core.pipeline import Pipeline
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.schedule import delay, rank_of_stage
from lightning_ddg.core.stage import Stage
from lightning_ddg.core.staged import LocalMailbox, Staged
from lightning_ddg.core.staleness import Staleness

STAGES = 4
PAPER_LIKE = [Staleness(), Staleness(shrink=0.5), Staleness(slow_start=5), Staleness(extrapolate=True)]
# Numbers of batches and slacks; with the last, the pipeline is never full.
RUNS = [(2, 0), (7, 0), (13, 2), (7, 2)]
RULES = [*PAPER_LIKE, Staleness(stash=False), Staleness(shrink=0.5, slow_start=5, extrapolate=True)]


def segments() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2), nn.Tanh()).double() for _ in range(STAGES)]


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)) for _ in range(count)]


def step(executions: list[Execution], optimizers: list[torch.optim.Optimizer]) -> None:
    for execution in executions:
        execution.before_step()
    for optimizer in optimizers:
        optimizer.step()
    for execution in executions:
        execution.after_step()
    for optimizer in optimizers:
        optimizer.zero_grad()


def train(executions: list[Execution], modules: list[nn.Module], *, count: int) -> list[list[float]]:
    """Train two epochs, the executions side by side, and return the weights after every step, those of drains too."""
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1) for module in modules
    ]
    seen: list[list[float]] = []

    def now() -> list[float]:
        return torch.cat([p.detach().flatten() for module in modules for p in module.parameters()]).tolist()

    def loss(output: Tensor, y: Tensor) -> None:
        nn.functional.mse_loss(output, y).backward()

    for epoch in range(2):
        for execution in executions:
            execution.begin(epoch * count)
        for number, (x, y) in enumerate(batches(count)):
            output: Any = None
            for execution in executions:
                output = execution.train(Batch(number, seed=epoch), (x,), {})
            for execution in executions:
                execution.backward(partial(loss, output, y))
            step(executions, optimizers)
            seen.append(now())
        # From the output side, as a local mailbox cannot wait for what is not there yet.
        while True in [execution.drain() for execution in reversed(executions)]:
            step(executions, optimizers)
            seen.append(now())
        assert not any(execution.waiting for execution in executions)
    return seen


def pipelines(modules: list[nn.Module], rule: Staleness, recompute: bool, slack: int) -> list[Execution]:
    queues: Any = defaultdict(deque)
    return [
        Pipeline(
            Stage(module, delay(number, STAGES, slack), rule, recompute),
            number,
            STAGES,
            LocalMailbox(rank_of_stage(number, STAGES), STAGES, queues),
            rule.shrink,
        )
        for number, module in enumerate(modules, start=1)
    ]


@pytest.mark.parametrize(("count", "slack"), RUNS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rule", PAPER_LIKE)
def test_it_gives_the_weights_of_the_delay_line(rule: Staleness, recompute: bool, count: int, slack: int) -> None:
    ours, theirs = segments(), segments()
    found = train([Staged(ours, rule, recompute, slack=slack)], ours, count=count)
    expected = train([DelayLine(theirs, (), rule, slack=slack)], theirs, count=count)
    assert len(found) == len(expected) == 2 * (count + min(count, delay(1, STAGES, slack)))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("count", "slack"), RUNS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_it_trains_and_drains_as_stages_with_a_mailbox_each(
    rule: Staleness, recompute: bool, count: int, slack: int
) -> None:
    ours, theirs = segments(), segments()
    found = train([Staged(ours, rule, recompute, slack=slack)], ours, count=count)
    assert found == train(pipelines(theirs, rule, recompute, slack), theirs, count=count)
    assert found[0] != found[-1]


def test_the_rules_differ() -> None:
    """Else the comparisons above would not tell the rules apart."""
    ends = []
    for rule in RULES:
        modules = segments()
        ends.append(tuple(train([Staged(modules, rule, recompute=False)], modules, count=7)[-1]))
    assert len(set(ends)) == len(RULES)


class Diary(Observer):
    def __init__(self, name: str, entries: list[tuple[str, str]]) -> None:
        self.name, self.entries = name, entries

    def before_forward(self, stage: int) -> None:
        self.entries.append((self.name, f"forward of {stage}"))

    def before_drain(self) -> None:
        self.entries.append((self.name, "drain"))


def test_observers_are_told_in_the_order_in_which_they_came_until_they_leave() -> None:
    observers, entries = Observers(), list[tuple[str, str]]()
    leave = observers.subscribe(Diary("first", entries))
    observers.subscribe(Diary("second", entries))
    execution = Staged(segments(), Staleness(), False, observers)
    execution.train(Batch(0), (batches(1)[0][0],), {})
    assert entries == [("first", "forward of 1"), ("second", "forward of 1")]
    execution.skip()
    leave()
    leave()
    execution.drain()
    assert entries[2:] == [("second", "drain")]
