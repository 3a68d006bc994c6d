"""Where an optimizer takes weights in its next steps, by its own recursion, if gradients were zero: pure formulas.

A step of momentum goes on for a while by itself; of the gradients to come nothing is known, and they count as zero, so
that what is known decays as the optimizer lets it. That is the form of FTPipe (Eliad et al., USENIX ATC 2021,
``pipe/pipeline/weight_prediction``), for SGD with momentum ``w - lr (m + ... + m^n) v``, and for Adam::

    w - sum_{s=1..n} lr_s [b1^s m / (1 - b1^(t+s))] / (sqrt(v) / sqrt(1 - b2^(t+s)) + eps)

whose second moment is held: it averages over many more steps than lie ahead. NAdam is the same with its own factors.
Weight decay goes on, as it depends on weights alone.

Options and state are an optimizer's: the ``param_groups`` and the ``state`` of torch's, read as plain dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

Options = Mapping[str, Any]


def sgd_ahead(weight: Tensor, state: Mapping[str, Any], steps: Sequence[Options]) -> Tensor | None:
    """Return the weight after steps of SGD with zero gradients, each with its options.

    ``None`` says that there is no momentum to go on with.
    """
    if state.get("momentum_buffer") is None:
        return None
    ahead: Tensor = weight.clone()
    velocity: Tensor = state["momentum_buffer"].clone()
    for one in steps:
        lr, momentum, decay = float(one["lr"]), one["momentum"], one["weight_decay"]
        velocity.mul_(momentum).add_(ahead, alpha=(1 - one["dampening"]) * decay)
        if one["nesterov"]:
            ahead.mul_(1 - lr * decay).sub_(velocity, alpha=lr * momentum)
        else:
            ahead.sub_(velocity, alpha=lr)
    return ahead


def adam_ahead(
    weight: Tensor, state: Mapping[str, Any], steps: Sequence[Options], decoupled: bool = False
) -> Tensor | None:
    """Return the weight after steps of Adam with zero gradients, each with its options; AdamW's are ``decoupled``."""
    if "exp_avg" not in state:
        return None
    ahead: Tensor = weight.clone()
    mean: Tensor = state["exp_avg"].clone()
    root, done = _root(state, steps[0]), float(state["step"])
    for number, one in enumerate(steps, start=1):
        lr, (beta1, beta2) = float(one["lr"]), one["betas"]
        _decay(ahead, mean, lr, one, decoupled or one.get("decoupled_weight_decay", False))
        size = root / (1 - beta2 ** (done + number)) ** 0.5 + one["eps"]
        ahead.addcdiv_(mean, size, value=-lr / (1 - beta1 ** (done + number)))
    return ahead


def nadam_ahead(weight: Tensor, state: Mapping[str, Any], steps: Sequence[Options]) -> Tensor | None:
    """Return the weight after steps of NAdam with zero gradients, each with its options."""
    if "exp_avg" not in state:
        return None
    ahead: Tensor = weight.clone()
    mean: Tensor = state["exp_avg"].clone()
    root, done = _root(state, steps[0]), float(state["step"])
    # With its own rounding: it is kept in single precision.
    rounded = state["mu_product"].clone()
    for number, one in enumerate(steps, start=1):
        lr, (beta1, beta2), at = float(one["lr"]), one["betas"], done + number
        mu, after = (beta1 * (1 - 0.5 * 0.96 ** (step * one["momentum_decay"])) for step in (at, at + 1))
        product = float(rounded.mul_(mu))
        size = root / (1 - beta2**at) ** 0.5 + one["eps"]
        decoupled = one.get("decoupled_weight_decay", False)
        before = None if decoupled or not one["weight_decay"] else ahead * one["weight_decay"]
        _decay(ahead, mean, lr, one, decoupled)
        if before is not None:
            ahead.addcdiv_(before, size, value=-lr * (1 - mu) / (1 - product))
        ahead.addcdiv_(mean, size, value=-lr * after / (1 - product * after))
    return ahead


def _root(state: Mapping[str, Any], options: Options) -> Tensor:
    squares: Tensor = state["max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"]
    return squares.sqrt()


def _decay(weight: Tensor, mean: Tensor, lr: float, options: Options, decoupled: bool) -> None:
    """Decay the weight by itself, or let the mean of the gradients know of it, which is one step older then."""
    beta1, decay = options["betas"][0], options["weight_decay"]
    mean.mul_(beta1)
    if decoupled:
        weight.mul_(1 - lr * decay)
    elif decay:
        mean.add_(weight, alpha=(1 - beta1) * decay)


_FORMULAS: dict[type[Optimizer], Callable[[Tensor, Mapping[str, Any], Sequence[Options]], Tensor | None]] = {
    SGD: sgd_ahead,
    Adam: adam_ahead,
    AdamW: partial(adam_ahead, decoupled=True),
    NAdam: nadam_ahead,
}


def spike(before: Tensor | None, after: Tensor, options: Options, delay: float) -> Tensor:
    """Return what spike compensation adds to a weight after a step of SGD with momentum ``m``.

    A gradient that comes ``D`` steps late has missed ``D`` of its steps through the momentum. It makes them up for at
    once (SC_D, Kosson et al., MLSys 2021, arXiv 2003.11666)::

        v <- m v + g,    w <- w - lr (m^D v + (1 - m^D) / (1 - m) g)

    ``D = 1`` is Nesterov's momentum, so that with ``nesterov`` it is ``D + 1``. ``g`` is what the step has added to
    ``v``: the gradient, clipped, with weight decay and dampening.

    Args:
        before: ``v`` before the step; ``None`` before the first.
        after: ``v`` after it.
        options: The step's.
        delay: ``D``, in steps.
    """
    lr, momentum = float(options["lr"]), options["momentum"]
    added = after if before is None else after - momentum * before
    power = momentum ** (delay + (1 if options["nesterov"] else 0))
    wanted = power * after + (1 - power) / (1 - momentum) * added
    done = momentum * after + added if options["nesterov"] else after
    change: Tensor = lr * (done - wanted)
    return change


def held(groups: Sequence[Options], count: int) -> list[Sequence[Options]]:
    """Return the options of the next steps where nobody knows better: those of today."""
    return [groups] * count


class Outlook:
    """What is known of the next steps of an optimizer.

    Args:
        optimizer: Trains the weights; its groups and state are read only.
        options: Given the groups and a number of steps, returns the groups' options in each of these.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        options: Callable[[Sequence[Options], int], Sequence[Sequence[Options]]] = held,
    ) -> None:
        self.optimizer, self._options = optimizer, options
        self._formula = _FORMULAS.get(type(optimizer))

    def knows(self, parameter: nn.Parameter) -> bool:
        """Return whether there is a formula for a parameter."""
        return self._formula is not None and not parameter.is_complex()

    @torch.no_grad()
    def ahead(
        self, parameters: Sequence[nn.Parameter], steps: float, factor: Callable[[int], float], skipped: int = 0
    ) -> dict[nn.Parameter, Tensor]:
        """Return how far parameters move in the next steps if gradients are zero, those of which that is known.

        Args:
            parameters: The parameters.
            steps: How many steps; of a broken number's last one a part is made.
            factor: What the update of the n-th step from now on is multiplied by.
            skipped: As many steps come before them that change nothing.
        """
        if self._formula is None or steps <= 0:
            return {}
        groups, moves = self.optimizer.param_groups, {}
        options = self._options(groups, skipped + ceil(steps))[skipped:]
        shares = [factor(skipped + number) * min(1.0, steps - number) for number in range(len(options))]
        wanted = {parameter for parameter in parameters if parameter.requires_grad and self.knows(parameter)}
        for index, group in enumerate(groups):
            own = [
                {**one[index], "lr": float(one[index]["lr"]) * share}
                for one, share in zip(options, shares, strict=True)
            ]
            found = [parameter for parameter in group["params"] if parameter in wanted]
            for parameter, state in zip(found, self._states(found), strict=True):
                there = self._formula(parameter.detach(), state, own)
                if there is not None:
                    moves[parameter] = there - parameter
        return moves

    def _states(self, parameters: Sequence[nn.Parameter]) -> list[Mapping[str, Any]]:
        """The states, with the steps as numbers: fused optimizers count on the device, which is waited for once."""
        states = [self.optimizer.state.get(parameter, {}) for parameter in parameters]
        counted = [state["step"] for state in states if "step" in state]
        if not counted or not all(isinstance(step, Tensor) and step.device.type != "cpu" for step in counted):
            return states
        steps = iter(torch.stack([step.to(counted[0].device) for step in counted]).tolist())
        return [{**state, "step": next(steps)} if "step" in state else state for state in states]

    def velocity(self, parameter: nn.Parameter) -> Tensor | None:
        """Return SGD's momentum of a parameter; ``None`` before its first step."""
        found: Tensor | None = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
        return found

    def options_of(self, parameter: nn.Parameter) -> Options:
        """Return today's options of a parameter."""
        return next(group for group in self.optimizer.param_groups if any(parameter is p for p in group["params"]))
