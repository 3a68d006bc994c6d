"""The update rules of the family of delayed gradients: their options and formulas, and what they make of weights.

:class:`Staleness` is what a user may choose; the defaults are the paper's algorithm. Which weights a forward runs on is
in :mod:`~lightning_ddg.core.stash`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor, nn

from lightning_ddg.core.extrapolation import Outlook, spike


@dataclass(frozen=True)
class Staleness:
    """How a stage uses a gradient that is ``d(k)`` batches old. The defaults change nothing.

    Attributes:
        stash: Whether a backward uses the weights of its forward. ``False``: what the forward has computed is used as
            it is, but with today's weights, as the DDG authors' released code does; with the strategy's
            ``recompute=True`` the forward is run again with today's weights (Features Replay, arXiv 1807.04511).
        shrink: Factor ``0 < beta <= 1`` of a gradient at each boundary it crosses, so that stage ``k`` gets its own
            times ``beta ** (K - k)`` (gradient shrinking, arXiv 1906.09108).
        slow_start: Number ``T`` of optimizer steps in which late stages learn more slowly: in step ``t`` the update of
            stage ``k`` is multiplied by ``d(k) ** -(1 - t / T)`` (PipeMare's T1, arXiv 1910.05124).
        extrapolate: Whether a forward runs on the weights that are expected at its backward: where SGD with momentum,
            Adam, AdamW or NAdam will have taken them, at the scheduler's next learning rates, if the gradients to come
            are zero (FTPipe's form, USENIX ATC 2021); with any other optimizer, further on the line of the last step
            (arXiv 2003.11666).
        finish: The last part of a fit, in 0..1, that is synchronous: from there on no gradient is stale, and none of
            the other rules has an effect. 0 is none.
        compensate: Whether a late gradient makes up at once for the steps through SGD's momentum ``m`` that it has
            missed: ``w -= lr (m^D v + (1 - m^D) / (1 - m) g)``, ``D = d(k)`` (spike compensation, arXiv 2003.11666).
        predict: The former name of ``extrapolate``.

    Raises:
        TypeError: If a value has another type.
        ValueError: If a value has no meaning; the message names it and the remedy.
    """

    stash: bool = True
    shrink: float = 1.0
    slow_start: int = 0
    extrapolate: bool = False
    finish: float = 0.0
    compensate: bool = False
    predict: InitVar[bool | None] = None

    def __post_init__(self, predict: bool | None) -> None:
        if predict is not None:
            warnings.warn("Staleness: predict is now called extrapolate.", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "extrapolate", predict)
        for name in ("stash", "extrapolate", "compensate"):
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
        if self.extrapolate and not self.stash:
            raise ValueError(
                "extrapolate=True goes ahead to the weights that a backward will use, but with stash=False it uses"
                " those there are then. Leave out one of the two."
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
    """The optimizer steps of one stage under a rule: corrects them, and tells where they lead.

    :meth:`before` and :meth:`after` enclose a step. What is added to a step by hooks before it counts as part of it.

    Args:
        rule: The rule.
        delay: The stage's, in batches.
        outlook: What is known of the optimizer, if anything is.

    Raises:
        ValueError: If the rule needs to know the optimizer.
    """

    def __init__(self, rule: Staleness, delay: int, outlook: Outlook | None = None) -> None:
        if rule.compensate and outlook is None:
            raise ValueError("compensate=True pays with the momentum of SGD. Give the execution its `Outlook`.")
        self._rule, self._delay, self._outlook = rule, delay, outlook
        self._step = 0
        # Those since the last step, and those that the last one had.
        self._batches, self._per_step = 0, 1
        self._old: dict[nn.Parameter, Tensor] = {}
        self._momenta: dict[nn.Parameter, Tensor | None] = {}
        self._velocity: dict[nn.Parameter, Tensor] = {}

    def begin(self, step: int) -> None:
        """Called when a run begins, with the number of its first step."""
        self._step = step
        self.forget()

    def forget(self) -> None:
        """Forget where the last step led: what comes next does not go on from there."""
        self._batches = 0
        self._old, self._momenta, self._velocity = {}, {}, {}

    def before(self, parameters: Sequence[nn.Parameter], old: Sequence[Tensor] | None = None) -> None:
        """Remember weights that a step may change.

        ``old`` is memory with their values that nobody writes to before :meth:`after`; by default, the values of those
        that are trained are copied.
        """
        if not self._delay:
            return
        if old is None:
            parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if self._factor(0) != 1 or (self._rule.extrapolate and not all(map(self._foreseen, parameters))):
            old = [parameter.detach().clone() for parameter in parameters] if old is None else old
            self._old = dict(zip(parameters, old, strict=True))
        if self._rule.compensate and self._outlook is not None:
            momenta = {parameter: self._outlook.velocity(parameter) for parameter in parameters}
            self._momenta = {p: None if momentum is None else momentum.clone() for p, momentum in momenta.items()}

    @torch.no_grad()
    def after(self, drained: bool = False) -> None:
        """Apply the rule to what a step has changed.

        A step whose gradient was drained belongs to no iteration: it is not counted, and the batches that follow have
        as many batches before their first update as after a start.
        """
        old, self._old = self._old, {}
        self._per_step = self._batches or self._per_step
        self._compensate()
        factor = self._factor(0)
        if factor != 1:
            for parameter, before in old.items():
                # w_step + (1 - s) (w_old - w_step) = w_old + s (w_step - w_old)
                parameter.lerp_(before, 1 - factor)
        self._velocity = {}
        if self._rule.extrapolate and not drained and self._batches:
            self._velocity = {p: p - before for p, before in old.items() if not self._foreseen(p)}
        self._batches = 0
        self._step += not drained

    def count_batch(self) -> None:
        """Called when a batch's forward runs."""
        self._batches += 1

    def ahead(self, parameters: Sequence[nn.Parameter], in_flight: int) -> dict[nn.Parameter, Tensor]:
        """Return how far parameters should move until the backward of the next forward; those that should move.

        Where the optimizer's formula is known, they go on by it for as many steps as the batches ``in_flight`` will
        make before that backward: ``d(k) / n`` of ``n`` batches each, and fewer while the pipeline fills. Else it is
        ``d(k) / n * v``, with ``v`` the change by the last step: further on the line through the weights before and
        after it.
        """
        if not self._rule.extrapolate:
            return {}
        horizon = self._delay / self._per_step
        moves = {parameter: by * horizon for parameter, by in self._velocity.items()}
        if self._outlook is not None:
            # While the pipeline fills, nothing is due in the next steps.
            idle = int((self._delay - in_flight) / self._per_step)
            moves |= self._outlook.ahead(parameters, in_flight / self._per_step, self._factor, idle)
        return moves

    def _compensate(self) -> None:
        momenta, self._momenta = self._momenta, {}
        for parameter, before in momenta.items():
            after = None if self._outlook is None else self._outlook.velocity(parameter)
            if self._outlook is not None and after is not None and parameter.grad is not None:
                options = self._outlook.options_of(parameter)
                parameter.add_(spike(before, after, options, self._delay / self._per_step))

    def _foreseen(self, parameter: nn.Parameter) -> bool:
        return self._outlook is not None and self._outlook.knows(parameter)

    def _factor(self, later: int) -> float:
        return slow_start_factor(self._delay, self._step + later, self._rule.slow_start)
