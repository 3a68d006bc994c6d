"""Tests of ``stash.py``, ``recompute.py`` and ``staleness.py``: what batches in flight keep, and what they see."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg.core.stage import Stage
from lightning_ddg.core.staleness import Staleness, Updates, slow_start_factor

RULES = [Staleness(), Staleness(stash=False), Staleness(extrapolate=True)]


class Kept:
    """Weak references to what autograd saves for a backward, of all graphs made inside."""

    def __init__(self) -> None:
        self._found: list[weakref.ref[Tensor]] = []

    def save(self, tensor: Tensor) -> Tensor:
        # A tensor of its own: what is saved may have other owners.
        own = tensor.detach().clone()
        self._found.append(weakref.ref(own))
        return own

    @property
    def alive(self) -> int:
        return sum(found() is not None for found in self._found)


@pytest.mark.parametrize("rule", RULES)
def test_no_activations_are_kept_of_batches_in_flight(rule: Staleness) -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh())
    counts: dict[bool, list[int]] = {}
    for recompute in (False, True):
        stage, kept = Stage(module, 2, rule, recompute), Kept()
        for _ in range(6):
            with torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor):
                output = stage.forward(torch.ones(2, 3).requires_grad_(), received=True)
            assert output.requires_grad
            del output
            counts.setdefault(recompute, []).append(kept.alive)
            if len(stage) > 2:
                with torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor):
                    stage.backward([torch.ones(2, 3)])
            stage.before_step()
            stage.after_step()
    a_batch = counts[False][0]
    assert a_batch > 0
    assert counts[False] == [a_batch, 2 * a_batch, *[3 * a_batch] * 4]
    assert counts[True] == [0] * 6


class Everything(nn.Module):
    """Reads all that may differ between two runs: buffers, written and replaced, draws, the mode, its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("none", None)
        self.seen: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul_(2.0)
        noise = torch.rand(4) + random.random()
        y = x * self.weight + self.mean + self.count + noise + float(self.training)
        with torch.no_grad():
            self.mean.add_(y.mean(0))
            self.count = self.count + 1
        self.seen.append([*y.detach().flatten().tolist(), float(torch.is_autocast_enabled("cpu"))])
        return y * y


def test_a_second_forward_sees_what_the_first_has_seen_and_leaves_no_trace() -> None:
    module = Everything()
    stage = Stage(module, 1, Staleness(), recompute=True)
    given = [torch.randn(2, 4) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        stage.forward(given[0].clone().requires_grad_(), received=True)
    module.eval()
    stage.forward(given[1].clone().requires_grad_(), received=True)
    module.mean.fill_(7.0)
    before = {name: value.clone() for name, value in module.named_buffers()}
    torch.manual_seed(5)
    random.seed(5)
    draws = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    for _ in range(2):
        (by_input,) = stage.backward([torch.ones(2, 4)])
        assert by_input is not None
    assert module.seen[2:] == module.seen[:2]
    assert {name: value.tolist() for name, value in module.named_buffers()} == {
        name: value.tolist() for name, value in before.items()
    }
    assert not module.training
    assert not torch.is_autocast_enabled("cpu")
    assert (torch.rand(1), random.random()) == draws


def test_large_constant_buffers_are_copied_once() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(1 << 15))
            self.register_buffer("table", torch.zeros(1 << 15))
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count.data.add_(1)
            self.table.data[7] += 1
            return x * self.mask[:4]

    stage = Stage(Masked(), 2, Staleness(), recompute=True)
    for _ in range(3):
        stage.forward(torch.ones(4).requires_grad_(), received=True)
    copies = [
        {name: value for (_, name), value in kept._buffers} for batch in stage._in_flight if (kept := batch.again)
    ]
    assert len({copy["mask"].data_ptr() for copy in copies if copy["mask"] is not None}) == 1
    assert [copy["count"].item() for copy in copies if copy["count"] is not None] == [0.0, 1.0, 2.0]
    assert [copy["table"][7].item() for copy in copies if copy["table"] is not None] == [0.0, 1.0, 2.0]


def test_batch_norm_may_be_frozen_while_training() -> None:
    """It writes its statistics without a trace, and the first batch in eval mode reads them."""

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
        stage = Stage(module, 1, recompute=recompute)
        found = []
        for batch in range(8):
            if batch == 4:
                module[1].eval()
            output = stage.forward(torch.randn(8, 3, dtype=torch.float64) * 3 + 5, received=False)
            if batch:
                module.zero_grad()
                stage.backward([torch.ones_like(output)])
                found += [parameter.grad.clone() for parameter in module.parameters()]  # type: ignore[union-attr]
        return found

    for kept, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(kept, again)


def test_parameters_that_are_trained_from_now_on_get_no_gradient_of_batches_before() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    stage = Stage(module, 1, Staleness(), recompute=True)
    stage.forward(torch.ones(1, 2).requires_grad_(), received=True)
    module[0].requires_grad_(True)
    stage.backward([torch.ones(1, 2)])
    assert [parameter.grad is None for parameter in module.parameters()] == [True, True, False, False]


def scaled(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(10.0)


def replaced(p: nn.Parameter) -> None:
    p.data = p.data * 10.0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("change", [scaled, replaced])
def test_todays_weights_are_seen_by_a_backward_however_they_were_changed(
    change: Callable[[nn.Parameter], None], recompute: bool
) -> None:
    module = nn.Linear(1, 1, bias=False)
    start = module.weight.item()
    stage = Stage(module, 1, Staleness(stash=False), recompute)
    for factor in (1.0, 10.0, 100.0):
        stage.forward(torch.ones(1, 1).requires_grad_(), received=True)
        if factor > 1:
            (grad,) = stage.backward([torch.ones(1, 1)])
            assert grad is not None
            assert grad.item() == pytest.approx(factor * start)
        stage.before_step()
        change(module.weight)
        stage.after_step()
        assert not stage._stash._spare, "nothing is copied"


def test_extrapolation_runs_ahead_of_weights_that_it_does_not_touch() -> None:
    module = nn.Linear(1, 1, bias=False)
    stage = Stage(module, 2, Staleness(extrapolate=True), recompute=False)
    stage.begin(0)
    seen = []
    for step in range(4):
        with torch.no_grad():
            seen.append(stage.forward(torch.ones(1, 1), received=False).item())
        stage.before_step()
        with torch.no_grad():
            module.weight.fill_(float(step))
        stage.after_step(drained=step == 2)
        assert module.weight.item() == step
    assert seen[2] == 1.0 + 2 * (1.0 - 0.0)
    assert seen[3] == 2.0, "after a drain there is nothing to go on from"


def test_skipped_batches_are_forgotten() -> None:
    stage = Stage(nn.Linear(2, 2), 2, Staleness(), recompute=True)
    for _ in range(2):
        stage.forward(torch.ones(1, 2), received=False)
    stage.skip()
    assert len(stage) == 1
    stage.clear()
    assert len(stage) == 0


def test_slow_start_factor() -> None:
    assert [slow_start_factor(4, step, 2) for step in range(4)] == pytest.approx([1 / 4, 1 / 2, 1.0, 1.0])
    assert [slow_start_factor(delay, 0, 2) for delay in range(4)] == pytest.approx([1.0, 1.0, 1 / 2, 1 / 3])
    assert slow_start_factor(4, 0, 0) == 1.0


def test_drained_steps_are_slowed_but_not_counted() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    updates = Updates(Staleness(slow_start=2), 4)
    changes = []
    for drained in (False, True, True, False, False):
        updates.before([weight])
        before = weight.item()
        weight.data.add_(1.0)
        updates.after(drained)
        changes.append(weight.item() - before)
    assert changes == pytest.approx([1 / 4, 1 / 2, 1 / 2, 1 / 2, 1.0])
