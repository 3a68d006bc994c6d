"""Tests of ``extrapolation.py``: each formula against torch's own optimizers on copies, or against a sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop

from lightning_ddg.core.extrapolation import Outlook, adam_ahead, sgd_ahead, spike
from lightning_ddg.core.staleness import Staleness, Updates
from tests.core import extrapolation_reference as reference

Make = Callable[[Any], Optimizer]
KNOWN: dict[str, Make] = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    "maximize": lambda p: SGD(p, lr=0.1, momentum=0.8, maximize=True, weight_decay=0.1),
    "foreach": lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True, foreach=True),
    "tensor rate": lambda p: Adam(p, lr=torch.tensor(0.1)),
    "adam": lambda p: Adam(p, lr=0.1, betas=(0.8, 0.9)),
    "adam, decay": lambda p: Adam(p, lr=0.1, weight_decay=0.3),
    "amsgrad": lambda p: Adam(p, lr=0.1, betas=(0.8, 0.5), amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.5),
    "fused": lambda p: AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "nadam": lambda p: NAdam(p, lr=0.1, momentum_decay=0.1),
    "nadam, decay": lambda p: NAdam(p, lr=0.1, betas=(0.99, 0.9), weight_decay=0.3),
    "nadam, decoupled": lambda p: NAdam(p, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
}


def trained(make: Make, steps: int = 5) -> tuple[list[nn.Parameter], Optimizer]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64)) for size in (3, 2)]
    optimizer = make(weights)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return weights, optimizer


def rates_of(count: int) -> list[float]:
    return [0.1 * 0.7**number for number in range(count)]


def scheduled(groups: Any, count: int) -> list[Any]:
    return [[{**group, "lr": rate} for group in groups] for rate in rates_of(count)]


@pytest.mark.parametrize("steps", [1.0, 2.5, 7.0])
@pytest.mark.parametrize("name", KNOWN)
def test_weights_go_on_as_torch_takes_them_with_zero_gradients(name: str, steps: float) -> None:
    weights, optimizer = trained(KNOWN[name])
    before = [weight.detach().clone() for weight in weights]
    state = {key: value.clone() for weight in weights for key, value in optimizer.state[weight].items()}
    outlook = Outlook(optimizer, scheduled)
    moves = outlook.ahead(weights, steps, lambda step: 1.0 / (step + 1))
    shares = reference.shares(steps)
    rates = [rate * share / (at + 1) for at, (rate, share) in enumerate(zip(rates_of(9), shares, strict=False))]
    for weight, old, wanted in zip(weights, before, reference.ahead(optimizer, rates), strict=True):
        assert (wanted - old).abs().min() > 1e-6
        torch.testing.assert_close(moves[weight] + old, wanted, rtol=0, atol=1e-13)
        assert torch.equal(weight, old)
    assert all(torch.equal(value, optimizer.state[weights[-1]][key]) for key, value in state.items())


def test_steps_that_change_nothing_are_passed_over() -> None:
    weights, optimizer = trained(KNOWN["adamw"])
    moves = Outlook(optimizer, scheduled).ahead(weights, 2.0, lambda step: 10.0**-step, skipped=3)
    rates = [rate * 10.0**-step for step, rate in enumerate(rates_of(5))][3:]
    for weight, wanted in zip(weights, reference.ahead(optimizer, rates), strict=True):
        torch.testing.assert_close(weight + moves[weight], wanted, rtol=0, atol=1e-13)


def test_the_closed_forms() -> None:
    # As FTPipe has them.
    weights, optimizer = trained(KNOWN["momentum"])
    velocity = optimizer.state[weights[0]]["momentum_buffer"]
    got = sgd_ahead(weights[0].detach(), {"momentum_buffer": velocity}, optimizer.param_groups * 4)
    torch.testing.assert_close(got, weights[0] - 0.1 * (0.9 - 0.9**5) / (1 - 0.9) * velocity)
    weights, optimizer = trained(KNOWN["adam"])
    state = optimizer.state[weights[0]]
    total: Tensor = sum(  # type: ignore[assignment]
        0.8**s * state["exp_avg"] / (1 - 0.8 ** (5 + s)) / ((state["exp_avg_sq"] / (1 - 0.9 ** (5 + s))).sqrt() + 1e-8)
        for s in range(1, 5)
    )
    got = adam_ahead(weights[0].detach(), state, optimizer.param_groups * 4)
    torch.testing.assert_close(got, weights[0] - 0.1 * total)


@pytest.mark.parametrize(
    "make", [lambda p: SGD(p, lr=0.1, weight_decay=0.1), KNOWN["momentum"], KNOWN["adam"], KNOWN["nadam"]]
)
def test_without_momentum_weights_stay(make: Make) -> None:
    weights, optimizer = trained(make, 0)
    assert Outlook(optimizer).ahead(weights, 3.0, lambda step: 1.0) == {}


def test_what_is_not_known_is_left_out() -> None:
    weights, optimizer = trained(lambda p: RMSprop(p, momentum=0.9))
    outlook = Outlook(optimizer)
    assert not outlook.knows(weights[0])
    assert outlook.ahead(weights, 3.0, lambda step: 1.0) == {}

    class Own(SGD):
        """Its steps may be any."""

    weights, optimizer = trained(lambda p: Own(p, lr=0.1, momentum=0.9))
    assert not Outlook(optimizer).knows(weights[0])
    weights, optimizer = trained(KNOWN["adam"])
    assert not Outlook(optimizer).knows(nn.Parameter(torch.ones(1, dtype=torch.complex64)))
    assert Outlook(optimizer).ahead([nn.Parameter(torch.ones(1))], 3.0, lambda step: 1.0) == {}
    weights[0].requires_grad_(False)
    assert list(Outlook(optimizer).ahead(weights, 3.0, lambda step: 1.0)) == [weights[1]]
    assert Outlook(optimizer).ahead(weights, 0.0, lambda step: 1.0) == {}


# ---- spike compensation


@pytest.mark.parametrize("delay", [1.0, 2.5, 7.0])
@pytest.mark.parametrize("name", ["momentum", "dampening", "nesterov", "foreach"])
def test_a_compensated_step_is_the_formula(name: str, delay: float) -> None:
    weights, optimizer = trained(KNOWN[name], 0)
    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    wanted = reference.Compensated(copies, optimizer)
    wanted.delay = delay
    outlook, generator = Outlook(optimizer), torch.Generator().manual_seed(1)
    updates = Updates(Staleness(compensate=True), 5, outlook)
    for _ in range(4):
        for weight, copied in zip(weights, copies, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            copied.grad = weight.grad.clone()
        # So many batches a step: the delay counts steps.
        updates._per_step = 5 / delay
        updates.before(weights)
        optimizer.step()
        updates.after()
        wanted.step()
        for weight, copied in zip(weights, copies, strict=True):
            torch.testing.assert_close(weight, nn.Parameter(copied), rtol=0, atol=1e-13)


def test_a_compensation_of_one_step_is_nesterovs_momentum() -> None:
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": False}
    before, gradient = torch.tensor(2.0), torch.tensor(3.0)
    after = 0.9 * before + gradient
    step = -0.1 * after + spike(before, after, options, 1.0)
    torch.testing.assert_close(step, -0.1 * (gradient + 0.9 * after))
    assert spike(before, after, options, 0.0) == 0


def test_a_gradients_whole_effect_is_not_changed() -> None:
    # What it does at once, and what is left in the momentum, is lr g / (1 - m) as without a delay.
    gradient, after = torch.tensor(3.0), torch.tensor(3.0)
    at_once = 0.1 * after - spike(None, after, {"lr": 0.1, "momentum": 0.9, "nesterov": False}, 4.0)
    left = 0.9**4 * 0.1 * 0.9 / (1 - 0.9) * after
    torch.testing.assert_close(at_once + left, 0.1 * gradient / (1 - 0.9))


def test_a_weight_without_a_gradient_is_not_compensated() -> None:
    weights, optimizer = trained(KNOWN["momentum"])
    updates = Updates(Staleness(compensate=True), 3, Outlook(optimizer))
    weights[0].grad = None
    before = weights[0].detach().clone()
    updates.before(weights)
    optimizer.step()
    updates.after()
    assert torch.equal(weights[0], before)


def test_a_compensation_without_an_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compensate=True pays with the momentum of SGD. Give the execution"):
        Updates(Staleness(compensate=True), 1)


def test_the_former_name_still_works() -> None:
    with pytest.warns(DeprecationWarning, match="predict is now called extrapolate"):
        assert Staleness(predict=True) == Staleness(extrapolate=True)
