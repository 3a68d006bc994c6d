"""One stage: the forward of batch t, the backward of batch t - d, and what lies between them.

At iteration t, with the delay d::

    activation of t  --> [ F(t), with the weights w(t)          ] --> activation of t
    gradient of t-d  <-- [ B(t-d), with the weights w(t-d)      ] <-- gradient of t-d
                         [ step: w(t+1) = w(t) - lr * g(t-d)    ]

Of each of the d batches in flight the stage keeps the weights (:mod:`~lightning_ddg.core.stash`) and the graph; where
activations are recomputed, the inputs instead of the graph (:mod:`~lightning_ddg.core.recompute`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ddg.core.execution import InFlight
from lightning_ddg.core.extrapolation import Outlook
from lightning_ddg.core.inlet import Inlet
from lightning_ddg.core.pytree import map_tensors, tensors_of
from lightning_ddg.core.recompute import BufferCopies, Circumstances
from lightning_ddg.core.staleness import PAPER, Staleness
from lightning_ddg.core.stash import Weights, make_stash
from lightning_ddg.core.tensors import carries_grad, parameters_replaced


class _Batch(NamedTuple):
    """Between forward and backward: the outputs with their graph, or, if there is none yet, how to run it again."""

    outputs: list[Tensor]
    inlet: Inlet | None
    weights: Weights | None
    again: Circumstances | None = None

    @property
    def grads(self) -> list[Tensor | None]:
        return [] if self.inlet is None else self.inlet.grads


class Stage(InFlight):
    """A module whose backward runs ``delay`` batches after its forward, with the weights of that forward.

    Attributes:
        lag: As many batches lie between a forward and its backward, before the last ones are flushed.
        delay: How many of them see a step: all, or none once it is synchronous.

    Args:
        module: The layers of this stage, called with what the previous stage returned.
        delay: Batches between a forward and its backward, ``d(k)``.
        rule: Which weights a backward uses, and how updates are applied; without a delay no rule changes anything.
        recompute: Whether to keep only the inputs of batches in flight, and to run the forward again in the backward.
            Both forwards build a graph, so that the same kernels run; never more than one batch's is kept.
        outlook: What is known of the optimizer's steps, for rules that ask for that.
    """

    def __init__(
        self,
        module: nn.Module,
        delay: int,
        rule: Staleness = PAPER,
        recompute: bool = False,
        outlook: Outlook | None = None,
    ) -> None:
        self.module = module
        self.lag = self.delay = delay
        self._in_flight: deque[_Batch] = deque()
        self._stash = make_stash(module, delay, rule, outlook)
        self._buffers = BufferCopies(module) if recompute and delay else None

    def begin(self, step: int) -> None:
        """Called when a run begins, with the number of its first optimizer step."""
        self.delay = self.lag
        self._stash.begin(step)

    def synchronize(self) -> None:
        """Called when nothing is in flight: from here on no step comes between a forward and its backward."""
        self.delay = 0
        self._stash.clear()

    def forward(self, *args: Any, received: bool, **kwargs: Any) -> Any:
        """Run the stage on one batch and keep what its backward will need.

        The arguments are the network's in the first stage; in all others there is one, which was ``received``, so that
        gradients w.r.t. it are wanted. What is returned is attached to its graph; with ``recompute`` there is none.

        Raises:
            RuntimeError: If weights were changed since the last forward without :meth:`before_step`.
        """
        again = None if self._buffers is None else Circumstances(self.module, args, kwargs, self._buffers)
        weights = self._stash.for_forward(len(self)) if self.delay else None
        output, batch = self._run(args, kwargs, received, weights)
        if again is not None:
            batch = _Batch([], batch.inlet, batch.weights, again)
            output = map_tensors(lambda tensor: tensor.detach().requires_grad_(carries_grad(tensor)), output)
        self._in_flight.append(batch)
        return output

    def pass_over(self) -> None:
        """Let a batch be in flight that has no forward: its backward adds nothing."""
        if self.delay:
            self._stash.pass_over()
        self._in_flight.append(_Batch([], None, None))

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Run the backward of the oldest batch in flight, adding to ``p.grad``.

        It takes the gradient w.r.t. each output tensor that carries one, ``None`` where nothing depends on it, and
        returns that w.r.t. each received tensor.
        """
        self._stash.before_backward()
        batch = self._in_flight.popleft()
        again, weights = batch.again, batch.weights
        if again is not None:
            unfrozen = [] if weights is None else self._stash.unfrozen_since(weights)
            with again.restored(), parameters_replaced(unfrozen):
                _, batch = self._run(again.args, again.kwargs, batch.inlet is not None, weights)
        pairs = [(output, grad) for output, grad in zip(batch.outputs, grads, strict=True) if grad is not None]
        if pairs:
            outputs, given = zip(*pairs, strict=True)
            # Activation checkpointing runs the forward again here, and must find the weights of that forward.
            with nullcontext() if weights is None else weights.in_place():
                torch.autograd.backward(outputs, given)
        if weights is not None:
            self._stash.release(weights, (other.weights for other in self._in_flight))
        return batch.grads

    def backward_done(self) -> list[Tensor | None]:
        """Drop the oldest batch, whose backward ran as part of the loss's; return the gradients w.r.t. its inputs."""
        return self._in_flight.popleft().grads

    def before_step(self) -> None:
        """Called before weights change."""
        if self.delay:
            self._stash.before_step()

    def after_step(self, drained: bool = False) -> None:
        """Called when an optimizer has stepped; ``drained`` says whether its gradient was drained."""
        if self.delay:
            self._stash.after_step(drained)

    def skip(self) -> None:
        """Forget the newest batch in flight."""
        self._in_flight.pop()

    def clear(self) -> None:
        """Forget all batches in flight."""
        self._in_flight.clear()
        self._stash.clear()

    def __len__(self) -> int:
        return len(self._in_flight)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def oldest_weights(self) -> list[tuple[nn.Parameter, Tensor]] | None:
        weights = self._in_flight[0].weights if self._in_flight and self._stash.exact else None
        return None if weights is None else list(zip(weights.parameters, weights.memory, strict=True))

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], received: bool, weights: Weights | None
    ) -> tuple[Any, _Batch]:
        inlet = Inlet() if received else None
        if inlet is not None:
            args = (inlet.enter(args[0]),)
        with nullcontext() if weights is None else weights.in_place():
            output = self.module(*args, **kwargs)
        outputs = [tensor for tensor in tensors_of(output) if carries_grad(tensor)]
        return output, _Batch(outputs, inlet, weights)
