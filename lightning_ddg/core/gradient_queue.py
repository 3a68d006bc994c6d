"""The gradients of one stage that have been computed and are not due yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_ddg.core.execution import InFlight
from lightning_ddg.core.extrapolation import Outlook
from lightning_ddg.core.staleness import Staleness, Updates, shrunk
from lightning_ddg.core.tensors import add_gradient

Gradients = list[Tensor | None]


class GradientQueue(InFlight):
    """The gradients of one stage on their way to ``p.grad``.

    Attributes:
        lag: As many batches' gradients wait for it, before the last ones are flushed.
        delay: How many of them see a step: all, or none once it is synchronous.
        queue: For each batch in flight, the gradient w.r.t. each parameter, the oldest first.
        pending: Whether a gradient has been added to ``p.grad`` since the last step.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        delay: int,
        shrink: float,
        rule: Staleness,
        outlook: Outlook | None = None,
    ) -> None:
        self._parameters = parameters
        self.lag = self.delay = delay
        self._shrink = shrink
        self.updates = Updates(rule, delay, outlook)
        self.queue: deque[Gradients] = deque()
        self.pending = False

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        return self._parameters

    def begin(self, step: int) -> None:
        """Called when a run begins, with the number of its first optimizer step."""
        self.delay = self.lag
        self.updates.begin(step)

    def synchronize(self) -> None:
        """Called when nothing is in flight: from here on no step comes between a gradient and its use."""
        self.delay = 0
        self.updates.forget()
        self.take()

    def take(self) -> Gradients:
        """Return ``p.grad`` of all parameters, and leave ``None`` behind."""
        grads = [parameter.grad for parameter in self.parameters]
        self.put([None] * len(grads))
        return grads

    def put(self, grads: Gradients) -> None:
        """Set ``p.grad`` of all parameters."""
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad

    def append(self, grads: Gradients) -> None:
        """Add a batch's gradient, shrunk as by all boundaries that it would cross."""
        self.queue.append(shrunk(grads, self._shrink if self.delay else 1.0))

    def apply_oldest(self) -> None:
        """Add the oldest gradient to ``p.grad``."""
        for parameter, grad in zip(self.parameters, self.queue.popleft(), strict=True):
            if grad is not None:
                add_gradient(parameter, grad)
        self.pending = True

    def __len__(self) -> int:
        return len(self.queue) if self.delay else 1

    def before_step(self) -> None:
        """Called before weights change."""
        if self.delay:
            self.updates.before(self.parameters)

    def after_step(self, drained: bool) -> None:
        """Called when an optimizer has stepped; ``drained`` says whether its gradient was drained."""
        self.pending = False
        if self.delay:
            self.updates.after(drained)

    def oldest_gradient(self) -> Gradients | None:
        return self.queue[0] if self.queue else None

    def newest_gradient(self) -> Gradients | None:
        return self.queue[-1] if self.queue else None
