"""Tests of ``step.py``: the states of a training step, and what is refused. Whole steps are in ``integration``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ddg.plugin.step import State, TrainingStep


def step(automatic: bool = True) -> TrainingStep:
    module: Any = SimpleNamespace(automatic_optimization=automatic)
    network: Any = SimpleNamespace(target_name="net")
    made = TrainingStep(module, network)
    made.begin(0, [])
    return made


def test_a_step_goes_through_its_states() -> None:
    made, seen = step(automatic=False), []
    for happens in (lambda: None, lambda: made.called([]), made.answered, made.backward):
        happens()
        seen.append(made.state)
    assert seen == [State.IDLE, State.CALLED, State.ANSWERED, State.BACKWARD]
    made.end(None)
    made.begin(1, [])
    assert made.state is State.IDLE


def test_in_automatic_optimization_the_backward_comes_after_the_step() -> None:
    made = step()
    made.called([])
    made.answered()
    made.end(torch.zeros(()))
    made.backward()
    assert made.state is State.ANSWERED


def test_a_second_call_of_the_network_is_refused() -> None:
    made = step()
    made.called([])
    with pytest.raises(RuntimeError, match=r"`self.net`\) was called 2 times in one training step.*Concatenate"):
        made.called([])


def test_a_backward_before_the_call_of_the_network_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"called before the network \(`self.net`\).*Call the network first"):
        step(automatic=False).backward()


def test_a_second_backward_is_refused() -> None:
    made = step(automatic=False)
    made.called([])
    made.answered()
    made.backward()
    with pytest.raises(RuntimeError, match="called more than once in a training step. Add the losses up"):
        made.backward()


def test_a_second_step_for_the_same_batch_is_refused_until_training_begins_anew() -> None:
    made = step()
    with pytest.raises(RuntimeError, match=r"SGD runs the training step a second time .*\(number 0\)"):
        made.begin(0, [torch.optim.SGD(nn.Linear(1, 1).parameters())])
    made.forget()
    made.begin(0, [])
