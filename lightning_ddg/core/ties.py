"""A parameter that several stages use, as the embedding and the head of a language model do: the first one owns it.

Its gradient is the sum of what each of these stages computes, and it is applied when the owner's is due. The owner's
rank alone has its optimizer's state; at iteration t, with owner i and another stage j > i that uses it::

    stage i   -- weights w(t), if a step has changed them, before the activation of t -->                 stage j
              <-- its part of the gradient of t - d(j), which stage i adds to its own at t - d(j) + d(i) --

Both are sent before anybody needs them: the weights of t are ready before the activation of t, and the backward of a
batch comes by stage j before it comes to stage i. So nobody waits for more than without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_ddg.core.execution import Channel, Mailbox
from lightning_ddg.core.schedule import rank_of_stage
from lightning_ddg.core.tensors import add_gradient

TIED_WEIGHTS = Channel("tied weights")
TIED_GRADIENT = Channel("tied gradient")


class Tie(NamedTuple):
    """A parameter of several stages.

    Attributes:
        parameter: As this process has it.
        stages: The stages that use it, the owner first.
    """

    parameter: nn.Parameter
    stages: tuple[int, ...]


class Ties:
    """What one stage does for the parameters that it shares with others; nothing, if it shares none.

    Args:
        ties: The parameters that stages share; those of which this is none do not matter.
        number: The stage.
        num_stages: ``K``.
        mailbox: Reaches the other stages.
        shrink: What gradients are multiplied by at each boundary.

    Attributes:
        shrink: As given; 1 in a synchronous finish.
    """

    def __init__(self, ties: Sequence[Tie], number: int, num_stages: int, mailbox: Mailbox, shrink: float) -> None:
        self._mailbox, self._number, self.shrink = mailbox, number, shrink
        self._owned = [tie for tie in ties if tie.stages[0] == number]
        self._used = [tie for tie in ties if number in tie.stages[1:]]
        self._ranks = {stage: rank_of_stage(stage, num_stages) for tie in ties for stage in tie.stages}
        # What is there when training begins may differ: not every rank need have drawn the same.
        self._stepped = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Called before each forward: send the weights if they have changed, and take those of others."""
        for tie in self._owned:
            changed = tie.parameter.detach() if self._stepped else None
            self._mailbox.send([self._ranks[stage] for stage in tie.stages[1:]], TIED_WEIGHTS, changed, snapshot=True)
        for tie in self._used:
            changed = self._mailbox.take(self._ranks[tie.stages[0]], TIED_WEIGHTS)
            if changed is not None:
                tie.parameter.copy_(changed)
        self._stepped = False

    def before_step(self) -> None:
        """Called before weights change."""
        self._stepped = True

    def backward(self, run: Callable[[], object]) -> None:
        """Run the backward of one batch: send what it adds to others' parameters, and add what they have sent."""
        run()
        for tie in self._used:
            self._mailbox.send(self._ranks[tie.stages[0]], TIED_GRADIENT, tie.parameter.grad)
            tie.parameter.grad = None
        for tie in self._owned:
            for stage in tie.stages[1:]:
                grad: Tensor | None = self._mailbox.take(self._ranks[stage], TIED_GRADIENT)
                if grad is not None:
                    add_gradient(tie.parameter, grad * self.shrink ** (stage - self._number))

    def nothing(self) -> None:
        """Called for a batch that has no backward here."""
        self.backward(lambda: None)

    def discard(self) -> None:
        """Called for a batch whose backward is given up by all stages."""
        before = [tie.parameter.grad for tie in self._owned]
        self.nothing()
        for tie, grad in zip(self._owned, before, strict=True):
            tie.parameter.grad = grad
