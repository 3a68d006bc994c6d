"""Tests of ``pipeline.py``: one rank's rules, with a recorded conversation in the place of the other ranks.

Several real ranks are in ``tests/comm`` and in ``integration``.
"""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_ddg.core.evaluator import Piece, Verdict
from lightning_ddg.core.execution import ACTIVATION, GRADIENT, OUTPUT, Channel, Mailbox, Sent
from lightning_ddg.core.pipeline import Pipeline
from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.stage import Stage


class Script(Mailbox):
    """A mailbox that gives what the test has laid ready, and records what is sent."""

    def __init__(self) -> None:
        self.ready: dict[tuple[int, Channel], deque[Any]] = {}
        self.sent: list[tuple[int, Channel, Any]] = []

    def lay(self, peer: int, channel: Channel, *values: Any) -> None:
        self.ready.setdefault((peer, channel), deque()).extend(values)

    def take(self, source: int, channel: Channel) -> Any:
        return self.ready[source, channel].popleft()

    def has(self, source: int, channel: Channel) -> bool:
        return bool(self.ready.get((source, channel)))

    def send(self, to: Any, channel: Channel, value: Any, *, snapshot: bool = False) -> None:
        for peer in [to] if isinstance(to, int) else to:
            self.sent.append((peer, channel, map_tensors(Tensor.clone, value) if snapshot else value))


def pipeline(module: nn.Module, number: int, num_stages: int) -> tuple[Pipeline, Script]:
    script = Script()
    return Pipeline(Stage(module, num_stages - number), number, num_stages, script), script


def received(*values: float) -> Tensor:
    return torch.tensor([list(values)]).requires_grad_()


def not_to_be_run() -> None:
    raise AssertionError("only the last stage runs the loss's backward")


def test_the_first_stage_sends_its_output_and_waits_for_no_gradient_while_it_warms_up() -> None:
    module = nn.Linear(2, 2, bias=False)
    line, script = pipeline(module, 1, 3)
    module.weight.grad = torch.zeros(2, 2)
    for batch in range(2):
        assert isinstance(line.train(Batch(0), (torch.full((1, 2), float(batch)),), {}), Sent)
        line.backward(not_to_be_run)
        assert module.weight.grad is None, "a zero gradient would decay the weights"
        line.before_step()
        line.after_step()
    assert [(peer, channel) for peer, channel, _ in script.sent] == [(1, ACTIVATION)] * 2
    assert isinstance(line.train(Batch(0), (torch.full((1, 2), 2.0),), {}), Sent)
    script.lay(1, GRADIENT, [torch.ones(1, 2)])
    line.backward(not_to_be_run)
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]], "that of batch 0, whose input was 0"
    assert len(script.sent) == 3
    assert line.waiting


def test_a_gradient_that_accumulates_survives_a_batch_that_has_none_due() -> None:
    module = nn.Linear(2, 2, bias=False)
    line, script = pipeline(module, 1, 2)
    for value in (1.0, 2.0):
        assert isinstance(line.train(Batch(0), (torch.full((1, 2), value),), {}), Sent)
    script.lay(0, GRADIENT, [torch.ones(1, 2)], [torch.ones(1, 2)])
    line.backward(not_to_be_run)
    assert line.drain()
    assert not line.drain()
    # Nothing is in flight, but what has been added is not applied yet.
    line.backward(not_to_be_run)
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    line.before_step()
    line.after_step()
    line.backward(not_to_be_run)
    assert module.weight.grad is None


def test_a_middle_stage_passes_on_in_both_directions() -> None:
    line, script = pipeline(nn.Linear(2, 2, bias=False), 2, 3)
    script.lay(2, ACTIVATION, received(1.0, 2.0), received(3.0, 4.0))
    for _ in range(2):
        assert isinstance(line.train(Batch(0), (), {}), Sent)
    script.lay(0, GRADIENT, [torch.tensor([[1.0, 0.0]])])
    line.backward(not_to_be_run)
    assert [(peer, channel) for peer, channel, _ in script.sent] == [(0, ACTIVATION)] * 2 + [(2, GRADIENT)]
    (grad,) = script.sent[-1][2]
    assert torch.equal(grad[0], cast(Tensor, line.stage.module.weight)[0].detach())


def test_the_last_stage_runs_the_backward_of_the_loss_at_once() -> None:
    line, script = pipeline(nn.Linear(2, 1, bias=False), 2, 2)
    script.lay(1, ACTIVATION, received(1.0, 2.0))
    output = line.train(Batch(0), (), {})
    line.backward(output.sum().backward)
    ((peer, channel, (grad,)),) = script.sent
    assert (peer, channel) == (1, GRADIENT)
    assert torch.equal(grad, cast(Tensor, line.stage.module.weight).detach())
    assert not line.waiting
    assert not line.drain()


def test_evaluation_gives_the_output_to_every_rank() -> None:
    last, script = pipeline(nn.Identity(), 3, 3)
    value = torch.ones(2)
    script.lay(1, ACTIVATION, Piece(value))
    output = last.evaluate(Batch(0), (), {})
    assert sorted((peer, channel) for peer, channel, _ in script.sent) == [(1, OUTPUT), (2, OUTPUT)]
    output.zero_()
    assert all(torch.equal(sent, torch.ones(2)) for _, _, (sent, _) in script.sent), (
        "the step may write into its output"
    )

    first, script = pipeline(nn.Linear(2, 2), 1, 3)
    script.lay(0, OUTPUT, ("the network's output", Verdict.DONE))
    assert first.evaluate(Batch(0), (torch.ones(1, 2),), {}) == "the network's output"
    ((peer, channel, piece),) = script.sent
    assert (peer, channel) == (1, ACTIVATION)
    sent = piece.value
    assert not sent.requires_grad
    assert not first.waiting


def test_clear_forgets_what_is_in_flight_here_and_on_the_way() -> None:
    """Of two batches in flight, stage 1's gradients are those that stage 2 has sent and those it now forgets too."""
    line, script = pipeline(nn.Linear(2, 2), 1, 3)
    for _ in range(2):
        assert isinstance(line.train(Batch(0), (torch.ones(1, 2),), {}), Sent)
    script.lay(1, GRADIENT, [torch.ones(1, 2)], [])
    line.clear()
    assert not line.waiting
    assert not script.has(1, GRADIENT)

    line, script = pipeline(nn.Linear(2, 2), 2, 3)
    script.lay(2, ACTIVATION, received(1.0, 2.0))
    assert isinstance(line.train(Batch(0), (), {}), Sent)
    script.lay(0, GRADIENT, [torch.ones(1, 2)])
    line.clear()
    assert not line.waiting
    assert script.sent[-1] == (2, GRADIENT, [])


def test_a_batch_without_a_backward_is_forgotten() -> None:
    line, _ = pipeline(nn.Linear(2, 2), 1, 3)
    assert isinstance(line.train(Batch(0), (torch.ones(1, 2),), {}), Sent)
    line.skip()
    assert not line.waiting
