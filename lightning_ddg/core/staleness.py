"""The update rules of the family of delayed gradients: their options and formulas, and what they make of weights.

:class:`Staleness` is what a user may choose; the defaults are the paper's algorithm. Which weights a forward runs on is
in :mod:`~lightning_ddg.core.stash`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Staleness:
    """How a stage uses a gradient that is ``d(k) = K - k`` batches old. The defaults change nothing.

    Attributes:
        stash: Whether a backward uses the weights of its forward. ``False``: what the forward has computed is used as
            it is, but with today's weights, as the DDG authors' released code does; with the strategy's
            ``recompute=True`` the forward is run again with today's weights (Features Replay, arXiv 1807.04511).
        shrink: Factor ``0 < beta <= 1`` of a gradient at each boundary it crosses, so that stage ``k`` gets its own
            times ``beta ** (K - k)`` (gradient shrinking, arXiv 1906.09108).
        slow_start: Number ``T`` of optimizer steps in which late stages learn more slowly: in step ``t`` the update of
            stage ``k`` is multiplied by ``d(k) ** -(1 - t / T)`` (PipeMare's T1, arXiv 1910.05124).
        predict: Whether a forward runs on the weights that are expected at its backward (linear extrapolation, in
            the weight-difference form, arXiv 2003.11666).
        finish: The last part of a fit, in 0..1, that is synchronous: from there on no gradient is stale, and none of
            the other rules has an effect. 0 is none.

    Raises:
        TypeError: If a value has another type.
        ValueError: If a value has no meaning; the message names it and the remedy.
    """

    stash: bool = True
    shrink: float = 1.0
    slow_start: int = 0
    predict: bool = False
    finish: float = 0.0

    def __post_init__(self) -> None:
        for name in ("stash", "predict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} is not a bool. Use True or False.")
        if isinstance(self.shrink, bool) or not isinstance(self.shrink, float | int):
            raise TypeError(f"shrink={self.shrink!r} is not a number. Use one above 0 and up to 1, such as 0.5.")
        if not 0 < self.shrink <= 1:
            raise ValueError(
                f"shrink={self.shrink!r} is not a factor that shrinks. Use one above 0 and up to 1; 1 leaves gradients"
                " as they are."
            )
        if isinstance(self.slow_start, bool) or not isinstance(self.slow_start, int):
            raise TypeError(f"slow_start={self.slow_start!r} is not a number of steps. Use an integer; 0 is none.")
        if self.slow_start < 0:
            raise ValueError(f"slow_start={self.slow_start!r} is not a number of steps. Use 0 (none) or more.")
        if isinstance(self.finish, bool) or not isinstance(self.finish, float | int):
            raise TypeError(f"finish={self.finish!r} is not a number. Use the last part of a fit, such as 0.1.")
        if not 0 <= self.finish <= 1:
            raise ValueError(
                f"finish={self.finish!r} is no part of a fit. Use one above 0 and up to 1, such as 0.1 for the last"
                " tenth; 0 is none."
            )
        if self.predict and not self.stash:
            raise ValueError(
                "predict=True extrapolates to the weights that a backward will use, but with stash=False it uses those"
                " there are then. Leave out one of the two."
            )


#: The paper's own rule.
PAPER = Staleness()


def shrunk(grads: Sequence[Tensor | None], factor: float) -> list[Tensor | None]:
    """Return gradients times a factor; ``None`` stays ``None``."""
    return list(grads) if factor == 1 else [None if grad is None else grad * factor for grad in grads]


def slow_start_factor(delay: int, step: int, slow_start: int) -> float:
    """Return what a stage's update is multiplied by: ``delay ** -(1 - step / slow_start)``, and 1 afterwards.

    PipeMare (arXiv 1910.05124), technique T1: a learning rate divided by the delay to the power of ``p``, with ``p``
    going from 1 to 0.

    Args:
        delay: ``d(k)`` in batches.
        step: Optimizer steps before this one, those of the warm-up included.
        slow_start: ``T``.
    """
    return 1.0 if delay < 2 or step >= slow_start else float(delay ** (step / slow_start - 1))


class Updates:
    """The optimizer steps of one stage under a rule: makes them smaller, and remembers where they lead.

    :meth:`before` and :meth:`after` enclose a step. What is added to a step by hooks before it counts as part of it.
    """

    def __init__(self, rule: Staleness, delay: int) -> None:
        self._rule, self._delay = rule, delay
        self._step = 0
        self._batches = 0
        self._old: dict[nn.Parameter, Tensor] = {}
        self._velocity: dict[nn.Parameter, Tensor] = {}
        self._horizon = 0.0

    def begin(self, step: int) -> None:
        """Called when a run begins, with the number of its first step."""
        self._step = step
        self.forget()

    def forget(self) -> None:
        """Forget where the last step led: what comes next does not go on from there."""
        self._batches = 0
        self._old, self._velocity = {}, {}

    def before(self, parameters: Sequence[nn.Parameter], old: Sequence[Tensor] | None = None) -> None:
        """Remember weights that a step may change.

        ``old`` is memory with their values that nobody writes to before :meth:`after`; by default, the values of those
        that are trained are copied.
        """
        if (self._rule.predict and self._delay > 0) or self._factor != 1:
            if old is None:
                parameters = [parameter for parameter in parameters if parameter.requires_grad]
                old = [parameter.detach().clone() for parameter in parameters]
            self._old = dict(zip(parameters, old, strict=True))

    @torch.no_grad()
    def after(self, drained: bool = False) -> None:
        """Apply the rule to what a step has changed.

        A step whose gradient was drained belongs to no iteration: it is not counted, and the batches that follow have
        as many batches before their first update as after a start.
        """
        old, self._old = self._old, {}
        factor = self._factor
        if factor != 1:
            for parameter, before in old.items():
                # w_step + (1 - s) (w_old - w_step) = w_old + s (w_step - w_old)
                parameter.lerp_(before, 1 - factor)
        self._velocity = {}
        if self._rule.predict and not drained and self._batches:
            self._velocity = {parameter: parameter - before for parameter, before in old.items()}
            self._horizon = self._delay / self._batches
        self._batches = 0
        self._step += not drained

    def count_batch(self) -> None:
        """Called when a batch's forward runs."""
        self._batches += 1

    def ahead(self, parameter: nn.Parameter) -> Tensor | None:
        """Return how far a parameter should move until the backward of the next forward; ``None`` if not at all.

        It is ``d(k) / n * v``, with ``v`` the change by the last step, which ``n`` batches went into: ``d(k)`` batches
        further on the line through the weights before and after it.
        """
        velocity = self._velocity.get(parameter)
        return None if velocity is None else velocity * self._horizon

    @property
    def _factor(self) -> float:
        return slow_start_factor(self._delay, self._step, self._rule.slow_start)
