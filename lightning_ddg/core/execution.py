"""What trains stages, what carries messages between them, and what looks on: the three interfaces of the algorithm.

A training loop calls an :class:`Execution` six times a batch::

    output = execution.train(batch, args, kwargs)     # forward of batch t; on the last stage, the network's output
    execution.backward(loss.backward)                 # backward of batch t - d, its gradient added to p.grad
    execution.before_step()                           # the weights may change from here on
    optimizer.step()
    execution.after_step()                            # the weights have changed
    optimizer.zero_grad()

There are three: :class:`~lightning_ddg.core.pipeline.Pipeline` (one stage among K processes),
:class:`~lightning_ddg.core.delay_line.DelayLine` and :class:`~lightning_ddg.core.staged.Staged` (all stages in one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from lightning_ddg.core.rng import Batch


@dataclass(frozen=True)
class Channel:
    """What a message is for. Messages of one channel from one rank arrive in the order in which they were sent.

    Attributes:
        name: At most 15 ASCII characters, the same on both sides; no two channels have the same.
        on_host: Whether tensors arrive on the host, wherever they were: one rank may get more than its device holds.
        varied: Whether hardly any two messages have the same form, so that forms are not worth remembering.
        ends: Whether a message says that its sender has ended what the name says, and sends nothing else before
            the next.
    """

    name: str
    on_host: bool = False
    varied: bool = False
    ends: bool = False


ACTIVATION = Channel("activation")
GRADIENT = Channel("gradient")
OUTPUT = Channel("output")


class Mailbox(Protocol):
    """Carries messages between ranks. Sends never wait; takes wait for the message.

    Attributes:
        rank: This rank, ``0..size - 1``.
        size: How many ranks there are.
    """

    rank: int
    size: int

    def send(self, to: int | Iterable[int], channel: Channel, value: Any, *, snapshot: bool = False) -> None:
        """Send a pytree of tensors and Python values to one rank, or to several.

        Its tensors must not be changed afterwards, unless ``snapshot`` asks for copies of them to be sent.
        """
        ...

    def take(self, source: int, channel: Channel) -> Any:
        """Wait for the next message of a channel from a rank, and return its value."""
        ...

    def has(self, source: int, channel: Channel) -> bool:
        """Return whether a message is there; what its sender sent before a message that was taken always is."""
        ...


class Nothing(Enum):
    """Sent in place of an activation where the training step has not called the network for a batch."""

    NOTHING = "nothing"


class Sent(NamedTuple):
    """Returned by :meth:`Execution.train` in place of the network's output where a later stage, elsewhere, has that.

    Attributes:
        activation: What this process has sent to it: a pytree, or :data:`Nothing.NOTHING`.
    """

    activation: Any


class Execution(Protocol):
    """Trains stages of a network with delayed gradients.

    Attributes:
        stages: The numbers of the stages that this process trains.
        synchronous: Whether no gradient is stale: see :meth:`synchronize`.
    """

    stages: Sequence[int]
    synchronous: bool = False

    def begin(self, step: int) -> None:
        """Called when a run begins, with the number of its first optimizer step; it is not synchronous."""
        return

    def synchronize(self) -> None:
        """Let no gradient be stale from here on, nor any rule for stale ones have an effect, until :meth:`begin`.

        Called when nothing is in flight or has been added to ``p.grad`` since the last step, on all ranks before the
        same batch. From then on :meth:`flush` has to be called before each step, so that this is backpropagation.
        """
        ...

    def train(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward of a training batch; the arguments are not looked at where the first stage is elsewhere.

        Returns:
            The network's output, attached to its graph; :class:`Sent` where the last stage is elsewhere.
        """
        ...

    def pass_over(self, batch: Batch) -> None:
        """Called in place of :meth:`train` where the training step has not called the network: it is in flight, empty.

        Where the first stage is elsewhere, that decides whether the batch has a forward.
        """
        ...

    def evaluate(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward with today's weights; return the network's output in every process."""
        ...

    def backward(self, loss: Callable[[], object] | None) -> None:
        """Run the backward of the batch that is due, if any, adding to what ``p.grad`` has accumulated.

        ``loss`` runs the backward of the loss; it is not called where the last stage is elsewhere. ``None`` says that
        the batch has no loss: no stage's backward of it, whenever that is due, adds anything. A stage to which
        nothing is due, and nothing was added since the last step, has ``p.grad = None`` afterwards, so that its
        optimizer leaves it alone: zeros would decay weights and count as a step.
        """
        ...

    def before_step(self) -> None:
        """Called before weights change, by an optimizer or otherwise: batches in flight keep those of their forward."""
        return

    def after_step(self) -> None:
        """Called when an optimizer has stepped."""
        return

    def drain(self) -> bool:
        """Run the oldest backward in flight of each stage, without a new forward; return whether there was any."""
        ...

    @property
    def waiting(self) -> bool:
        """Whether any batch's gradient has not been applied yet."""
        ...

    def flush(self) -> None:
        """Run all backwards in flight as part of the step that follows; only where it is synchronous."""
        while self.waiting:
            self.drain()

    def skip(self) -> None:
        """Forget the batch just trained: no backward will follow."""
        return

    def clear(self) -> None:
        """Forget all batches in flight; every process must call it."""
        return


class InFlight(Protocol):
    """What a stage has between forward and backward, to be looked at only.

    Attributes:
        delay: ``d(k)``, in batches: :func:`~lightning_ddg.core.schedule.delay`.
    """

    delay: int

    def __len__(self) -> int:
        """How many batches there are, the newest included."""
        ...

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The stage's parameters."""
        ...

    def oldest_weights(self) -> list[tuple[nn.Parameter, Tensor]] | None:
        """Return each trained parameter with its value in the oldest batch's forward; ``None`` if that is not kept."""
        return None

    def oldest_gradient(self) -> Sequence[Tensor | None] | None:
        """Return the oldest batch's gradient w.r.t. each parameter; ``None`` where it is not known yet."""
        return None

    def newest_gradient(self) -> Sequence[Tensor | None] | None:
        """Return the newest batch's own; ``None`` where it is not known yet."""
        return None


class Observer:
    """Looks on while stages are trained. Each method does nothing unless it is overridden; none may change anything."""

    def before_forward(self, stage: int) -> None:
        """Called before the forward of a training batch."""
        return

    def after_forward(self, stage: int) -> None:
        """Called after it."""
        return

    def before_backward(self, stage: int) -> None:
        """Called before the backward of the batch that is due."""
        return

    def after_backward(self, stage: int) -> None:
        """Called after it."""
        return

    def in_flight(self, stage: int, batches: InFlight) -> None:
        """Called for each stage of the process once a batch, before what is due of it is added to ``p.grad``."""
        return

    def before_take(self, source: int, channel: Channel) -> None:
        """Called before a message is waited for."""
        return

    def after_take(self, source: int, channel: Channel) -> None:
        """Called when it is there."""
        return

    def before_drain(self) -> None:
        """Called before a gradient in flight is applied without a new forward."""
        return


class Observers(Observer):
    """Passes everything on to those who have subscribed."""

    def __init__(self) -> None:
        self._all: list[Observer] = []

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Let an observer look on; return what ends it."""
        self._all.append(observer)
        return lambda: self._all.remove(observer) if observer in self._all else None

    def before_forward(self, stage: int) -> None:
        for observer in self._all:
            observer.before_forward(stage)

    def after_forward(self, stage: int) -> None:
        for observer in self._all:
            observer.after_forward(stage)

    def before_backward(self, stage: int) -> None:
        for observer in self._all:
            observer.before_backward(stage)

    def after_backward(self, stage: int) -> None:
        for observer in self._all:
            observer.after_backward(stage)

    def in_flight(self, stage: int, batches: InFlight) -> None:
        for observer in self._all:
            observer.in_flight(stage, batches)

    def before_take(self, source: int, channel: Channel) -> None:
        for observer in self._all:
            observer.before_take(source, channel)

    def after_take(self, source: int, channel: Channel) -> None:
        for observer in self._all:
            observer.after_take(source, channel)

    def before_drain(self) -> None:
        for observer in self._all:
            observer.before_drain()
