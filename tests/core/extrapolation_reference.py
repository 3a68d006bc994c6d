"""The oracles of the correction: an optimizer's own steps with zero gradients, and spike compensation as an optimizer.

Where the package has formulas, here torch's own optimizers run on copies.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Compensated(torch.optim.Optimizer):
    """SGD with spike compensation as its formula is written: ``w -= lr (a v + b g)``."""

    def __init__(self, parameters: Any, like: torch.optim.Optimizer) -> None:
        defaults = {key: value for key, value in like.param_groups[0].items() if key != "params"}
        super().__init__(parameters, defaults)
        self.delay = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            m, lr, late = group["momentum"], group["lr"], self.delay + group["nesterov"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad + group["weight_decay"] * p
                v = self.state[p].get("momentum_buffer")
                added = g if v is None else (1 - group["dampening"]) * g
                v = self.state[p]["momentum_buffer"] = added.clone() if v is None else m * v + added
                p -= lr * (m**late * v + (1 - m**late) / (1 - m) * added)


def ahead(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> list[Tensor]:
    """The weights after as many steps with zero gradients, at these learning rates.

    The second moment, which would decay, is held by what is added to it before each step. A weight without momentum
    stays where it is.
    """
    kind: Any = torch.optim.SGD if isinstance(optimizer, Compensated) else type(optimizer)
    moved: list[Tensor] = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
        options = {key: value for key, value in options.items() if key in kind.__init__.__code__.co_varnames}
        for p in group["params"]:
            state = optimizer.state[p]
            copied = p.detach().clone().requires_grad_()
            if state.get("exp_avg") is not None or state.get("momentum_buffer") is not None:
                own = kind([copied], **options)
                own.state[copied] = copy.deepcopy(dict(state))
                for rate in rates:
                    _step(own, copied, rate)
            moved.append(copied.detach())
    return moved


def _step(optimizer: Any, weight: Tensor, rate: float) -> None:
    (group,) = optimizer.param_groups
    state = optimizer.state[weight]
    group["lr"] = rate
    weight.grad = torch.zeros_like(weight)
    if "exp_avg_sq" in state:
        decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        gradient = torch.zeros_like(weight) if decoupled else group["weight_decay"] * weight.detach()
        beta2, squares = group["betas"][1], state["exp_avg_sq"].clone()
        state["exp_avg_sq"] = (squares - (1 - beta2) * gradient**2) / beta2
        optimizer.step()
        state["exp_avg_sq"] = squares
    else:
        optimizer.step()


def shares(steps: float) -> list[float]:
    """One for each step, and what is left of a broken number for the last."""
    whole = [1.0] * int(steps)
    rest = steps - len(whole)
    return [*whole, rest] if rest > 0 else whole
