"""Tests of ``pipeline.py``: one rank's rules, with a recorded conversation in the place of the other ranks.

Several real ranks are in ``test_mailbox.py`` and in ``integration``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.core.execution import ACTIVATION, GRADIENT, OUTPUT, Channel, Mailbox
from lightning_ddg.core.pipeline import NOTICE, Pipeline, or_end_step, placeholder_maker
from lightning_ddg.core.stage import Stage
from lightning_ddg.core.tensors import map_tensors
from lightning_ddg.plugin.redirection import StepDone


class Script:
    """Stands for a mailbox: gives what the test has laid ready, and records what is sent."""

    def __init__(self) -> None:
        self.ready: dict[tuple[int, Channel], deque[Any]] = {}
        self.sent: list[tuple[int, Channel, Any]] = []

    def lay(self, peer: int, channel: Channel, *values: Any) -> None:
        self.ready.setdefault((peer, channel), deque()).extend(values)

    def take(self, peer: int, channel: Channel) -> Any:
        return self.ready[peer, channel].popleft()

    def has(self, peer: int, channel: Channel) -> bool:
        return bool(self.ready.get((peer, channel)))

    def send(self, to: Any, channel: Channel, value: Any, *, snapshot: bool = False) -> None:
        if snapshot:
            value = map_tensors(lambda tensor: tensor.detach().clone(), value)
        for peer in [to] if isinstance(to, int) else to:
            self.sent.append((peer, channel, value))


def unseeded(stage: int) -> AbstractContextManager[None]:
    return nullcontext()


def pipeline(
    module: nn.Module, number: int, num_stages: int, shape: Callable[[Any], Any] | None = None
) -> tuple[Pipeline, Script]:
    script = Script()
    stage = Stage(module, num_stages - number)
    return Pipeline(stage, number, num_stages, cast(Mailbox, script), unseeded, shape), script


def received(*values: float) -> Tensor:
    return torch.tensor([list(values)]).requires_grad_()


def not_to_be_run() -> None:
    raise AssertionError("only the last stage runs the loss's backward")


def test_the_first_stage_sends_its_output_and_waits_for_no_gradient_while_it_warms_up() -> None:
    module = nn.Linear(2, 2, bias=False)
    line, script = pipeline(module, 1, 3)
    module.weight.grad = torch.zeros(2, 2)
    for batch in range(2):
        with pytest.raises(StepDone):
            line.train((torch.full((1, 2), float(batch)),), {})
        line.backward(not_to_be_run)
        assert module.weight.grad is None, "a zero gradient would decay the weights"
        line.before_step()
        line.stepped()
    assert [(peer, channel) for peer, channel, _ in script.sent] == [(1, ACTIVATION)] * 2
    with pytest.raises(StepDone):
        line.train((torch.full((1, 2), 2.0),), {})
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
        with pytest.raises(StepDone):
            line.train((torch.full((1, 2), value),), {})
    script.lay(0, GRADIENT, [torch.ones(1, 2)], [torch.ones(1, 2)])
    line.backward(not_to_be_run)
    assert line.drain()
    assert not line.drain()
    # Nothing is in flight, but what has been added is not applied yet.
    line.backward(not_to_be_run)
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    line.before_step()
    line.stepped()
    line.backward(not_to_be_run)
    assert module.weight.grad is None


def test_a_middle_stage_passes_on_in_both_directions() -> None:
    line, script = pipeline(nn.Linear(2, 2, bias=False), 2, 3)
    script.lay(2, ACTIVATION, received(1.0, 2.0), received(3.0, 4.0))
    for _ in range(2):
        with pytest.raises(StepDone):
            line.train((), {})
    script.lay(0, GRADIENT, [torch.tensor([[1.0, 0.0]])])
    line.backward(not_to_be_run)
    assert [(peer, channel) for peer, channel, _ in script.sent] == [(0, ACTIVATION)] * 2 + [(2, GRADIENT)]
    (grad,) = script.sent[-1][2]
    assert torch.equal(grad[0], cast(Tensor, line.stage.module.weight)[0].detach())


def test_the_last_stage_runs_the_backward_of_the_loss_at_once() -> None:
    line, script = pipeline(nn.Linear(2, 1, bias=False), 2, 2)
    script.lay(1, ACTIVATION, received(1.0, 2.0))
    output = line.train((), {})
    line.backward(output.sum().backward)
    ((peer, channel, (grad,)),) = script.sent
    assert (peer, channel) == (1, GRADIENT)
    assert torch.equal(grad, cast(Tensor, line.stage.module.weight).detach())
    assert not line.waiting
    assert not line.drain()


def test_evaluation_gives_the_output_to_every_rank() -> None:
    last, script = pipeline(nn.Identity(), 3, 3)
    value = torch.ones(2)
    script.lay(1, ACTIVATION, value)
    output = last.evaluate((), {})
    assert sorted((peer, channel) for peer, channel, _ in script.sent) == [(1, OUTPUT), (2, OUTPUT)]
    output.zero_()
    assert all(torch.equal(sent, torch.ones(2)) for _, _, sent in script.sent), "the step may write into its output"

    first, script = pipeline(nn.Linear(2, 2), 1, 3)
    script.lay(0, OUTPUT, "the network's output")
    assert first.evaluate((torch.ones(1, 2),), {}) == "the network's output"
    ((peer, channel, sent),) = script.sent
    assert (peer, channel) == (1, ACTIVATION)
    assert not sent.requires_grad
    assert not first.waiting


def test_clear_forgets_what_is_in_flight_here_and_on_the_way() -> None:
    """Of two batches in flight, stage 1's gradients are those that stage 2 has sent and those it now forgets too."""
    line, script = pipeline(nn.Linear(2, 2), 1, 3)
    for _ in range(2):
        with pytest.raises(StepDone):
            line.train((torch.ones(1, 2),), {})
    script.lay(1, GRADIENT, [torch.ones(1, 2)], [])
    line.clear()
    assert not line.waiting
    assert not script.has(1, GRADIENT)

    line, script = pipeline(nn.Linear(2, 2), 2, 3)
    script.lay(2, ACTIVATION, received(1.0, 2.0))
    with pytest.raises(StepDone):
        line.train((), {})
    script.lay(0, GRADIENT, [torch.ones(1, 2)])
    line.clear()
    assert not line.waiting
    assert script.sent[-1] == (2, GRADIENT, [])


def test_a_batch_without_a_backward_is_forgotten() -> None:
    line, _ = pipeline(nn.Linear(2, 2), 1, 3)
    with pytest.raises(StepDone):
        line.train((torch.ones(1, 2),), {})
    line.skip()
    assert not line.waiting


def test_notices_travel_upstream_before_the_gradient_they_came_before() -> None:
    last, script = pipeline(nn.Identity(), 3, 3)
    last.announce("stop")
    assert script.sent == [(1, NOTICE, "stop")]

    middle, script = pipeline(nn.Linear(2, 2), 2, 3)
    script.lay(2, ACTIVATION, received(1.0, 2.0), received(1.0, 2.0))
    for _ in range(2):
        with pytest.raises(StepDone):
            middle.train((), {})
    script.lay(0, NOTICE, "stop")
    script.lay(0, GRADIENT, [torch.ones(1, 2)])
    middle.backward(not_to_be_run)
    assert middle.notices == ["stop"]
    assert [(peer, channel) for peer, channel, _ in script.sent[-2:]] == [(2, NOTICE), (2, GRADIENT)]

    first, script = pipeline(nn.Linear(2, 2), 1, 3)
    first.announce("stop")
    assert script.sent == []


# ---- placeholders


class Counting(nn.Module):
    calls: ClassVar[list[torch.Size]] = []

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls.append(x.shape)
        return {"logits": x, "argmax": x.argmax(dim=-1), "name": "a"}


def test_a_placeholder_is_shaped_as_the_output_and_found_once_per_shape() -> None:
    Counting.calls.clear()
    rest = nn.Sequential(nn.Linear(4, 3).double(), nn.BatchNorm1d(3).double(), nn.Dropout(), Counting())
    before = {name: tensor.clone() for name, tensor in rest.state_dict().items()}
    make = placeholder_maker(rest)
    state = torch.get_rng_state()
    for count in (5, 2, 5):
        got = make(torch.ones(count, 4, dtype=torch.float64))
        assert got["logits"].shape == (count, 3)
        assert got["logits"].dtype == torch.float64
        assert got["logits"].device.type == "cpu"
        assert got["logits"].requires_grad
        assert got["argmax"].shape == (count,)
        assert got["argmax"].dtype == torch.int64
        assert not got["argmax"].requires_grad
        assert got["name"] == "a"
        got["logits"].sum().backward()
    assert Counting.calls == [torch.Size([5, 3]), torch.Size([2, 3])]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in rest.state_dict().items())


def test_two_placeholders_share_nothing() -> None:
    make = placeholder_maker(nn.Identity())
    first, second = make(torch.ones(2)), make(torch.ones(2))
    with torch.no_grad():
        first.fill_(7.0)
    assert torch.equal(second, torch.zeros(2))


class NeedsValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.sum())]


MESSAGE = (
    "In manual optimization a rank without the loss needs the shape of the network's output.*"
    "Use automatic optimization, or layers whose output shape does not depend on the data"
)


def test_layers_whose_output_shape_depends_on_the_data_are_refused() -> None:
    make = placeholder_maker(NeedsValues())
    with pytest.raises(RuntimeError, match=MESSAGE):
        make(torch.ones(3))


def test_where_no_placeholder_can_be_made_the_step_may_end() -> None:
    make = or_end_step(placeholder_maker(NeedsValues()))
    with pytest.raises(StepDone):
        make(torch.ones(3))
    assert or_end_step(placeholder_maker(nn.Identity()))(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


class KeepsAResult(nn.Module):
    """Like layers with the old ``weight_norm``: it holds a tensor that was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.computed = self.weight * 2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.computed


def test_layers_that_cannot_be_copied_are_refused_in_the_same_words() -> None:
    with pytest.raises(RuntimeError, match=MESSAGE):
        placeholder_maker(KeepsAResult())(torch.ones(2))


class Owner(nn.Module):
    """Hooks a layer by one of its own methods, as modules do that watch their activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.cannot_be_copied = (number for number in range(3))
        self.seen: list[str] = []
        self.layer.register_forward_hook(self.watch)

    def watch(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output.device.type)


def test_hooks_on_the_layers_are_not_copied() -> None:
    owner = Owner()
    assert placeholder_maker(owner.layer)(torch.ones(3, 2)).shape == (3, 2)
    assert owner.seen == []
