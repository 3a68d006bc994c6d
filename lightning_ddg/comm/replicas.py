"""Several pipelines that train together: what a pipeline sees of the ranks, and what a stage says to its likes.

With D = 2 pipelines, the replicas, of K = 3 stages, a rank talks along two axes::

    rank          0        1        2            stage 3  <->  stage 2  <->  stage 1      replica 0
                                                    ^             ^             ^
                                                    |   mean of   | gradients   |
                                                    v             v             v
    rank          3        4        5            stage 3  <->  stage 2  <->  stage 1      replica 1

All go over one mailbox, so that a failure of any rank reaches every other, wherever that waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_ddg.core.execution import Channel, Mailbox, Observers

DUE = Channel("due", varied=True)
MEAN = Channel("mean")
REPLICA = Channel("replica", varied=True)

_BUCKET_BYTES = 32 << 20
#: What is smaller goes to all at once: dividing it would save less than the second message takes.
_SMALL_BYTES = 64 << 10
_T = TypeVar("_T")


class SendingMailbox(Mailbox, Protocol):
    """A mailbox that can also send shapes without values."""

    def send(
        self, to: int | Iterable[int], channel: Channel, value: Any, *, snapshot: bool = False, payload: bool = True
    ) -> None:
        """Send as :class:`~lightning_ddg.core.execution.Mailbox` does; with ``payload=False``, zeros arrive."""
        ...


class PipelineMailbox:
    """The mailbox of all ranks as one pipeline sees it: with its own ranks, counted from 0.

    Args:
        world: Connects the ranks of all pipelines.
        first: The rank of this pipeline's last stage, there.
        size: How many ranks the pipeline has.
        observers: Are told of every wait for a message of the pipeline.
    """

    def __init__(self, world: SendingMailbox, first: int, size: int, observers: Observers) -> None:
        self.rank, self.size = world.rank - first, size
        self._world, self._first, self._observers = world, first, observers

    def send(
        self, to: int | Iterable[int], channel: Channel, value: Any, *, snapshot: bool = False, payload: bool = True
    ) -> None:
        """Send to ranks of the pipeline."""
        ranks = [self._first + rank for rank in ((to,) if isinstance(to, int) else to)]
        self._world.send(ranks, channel, value, snapshot=snapshot, payload=payload)

    def take(self, source: int, channel: Channel) -> Any:
        """Wait for a message from a rank of the pipeline."""
        self._observers.before_take(source, channel)
        value = self._world.take(self._first + source, channel)
        self._observers.after_take(source, channel)
        return value

    def has(self, source: int, channel: Channel) -> bool:
        """Return whether a message is there from a rank of the pipeline."""
        return self._world.has(self._first + source, channel)


class Replicas:
    """The ranks that have the same stage, one in each replica. They call each method together, in the same order.

    Args:
        mailbox: Connects the ranks of all replicas.
        ranks: The ranks with this stage, by replica.
        number: This rank's replica.
        swap: Used for :meth:`reduce` and :meth:`gather` instead of the mailbox, when its conversation has ended; until
            then it returns ``None``.

    Attributes:
        number: As given.
        size: How many replicas there are: D.
    """

    def __init__(
        self,
        mailbox: SendingMailbox,
        ranks: Sequence[int],
        number: int,
        swap: Callable[[Any], list[Any] | None] | None = None,
    ) -> None:
        self.number, self.size = number, len(ranks)
        self._mailbox, self._ranks, self._swap = mailbox, ranks, swap
        self._others = [rank for replica, rank in enumerate(ranks) if replica != number]

    def exchange(self, value: _T, channel: Channel = REPLICA) -> list[_T]:
        """Return what each replica has given, by replica; tensors in it must not be changed before they have left.

        Raises:
            PeerError: If a rank has failed.
        """
        self._mailbox.send(self._others, channel, value)
        return [
            value if replica == self.number else self._mailbox.take(rank, channel)
            for replica, rank in enumerate(self._ranks)
        ]

    @torch.no_grad()
    def mean_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give each parameter the mean of its gradients over the replicas; a gradient that one does not have is zero.

        The mean is the same on all replicas to the last bit. What no replica has stays ``None``.

        Raises:
            PeerError: If a rank has failed.
        """
        if self.size == 1:
            return
        there = self.exchange([parameter.grad is not None for parameter in parameters], DUE)
        wanted = [parameter for parameter, has in zip(parameters, zip(*there, strict=True), strict=True) if any(has)]
        for bucket in _buckets(wanted):
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([part.detach().reshape(-1) for part in parts])
            means = torch.split(self._mean(flat), [part.numel() for part in parts])
            for parameter, mean in zip(bucket, means, strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(mean.view_as(parameter))

    def _mean(self, flat: Tensor) -> Tensor:
        if self.size == 2 or flat.numel() * flat.element_size() <= _SMALL_BYTES:
            return _sum(self.exchange(flat, MEAN)) / self.size
        # Each adds up one piece: as much is sent as in a ring, in two messages instead of 2 (D - 1).
        pieces = list(flat.tensor_split(self.size))
        for replica, rank in enumerate(self._ranks):
            if replica != self.number:
                self._mailbox.send(rank, MEAN, pieces[replica])
        own = [
            pieces[replica] if replica == self.number else self._mailbox.take(rank, MEAN)
            for replica, rank in enumerate(self._ranks)
        ]
        return torch.cat(self.exchange(_sum(own) / self.size, MEAN))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all replicas, by replica, where this rank's own is; shapes may differ."""
        if self.size == 1:
            return [tensor]
        own = tensor.detach().clone()
        gathered = None if self._swap is None else self._swap(own)
        return [one.to(own.device) for one in (self.exchange(own) if gathered is None else gathered)]

    def reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """Return the ``"sum"``, ``"mean"``, ``"min"``, ``"max"`` or ``"product"`` over the replicas.

        As in Lightning's strategies, the mean of integers is rounded towards zero.
        """
        values = self.gather(tensor)
        if operation in ("sum", "mean"):
            total = _sum(values)
            return (total / self.size).to(total.dtype) if operation == "mean" else total
        functions = {"min": torch.minimum, "max": torch.maximum, "product": torch.mul}
        return reduce(functions[operation], values)


def _sum(values: Sequence[Tensor]) -> Tensor:
    """The sum in the order of the replicas, which is the same on all."""
    return reduce(torch.add, values)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type that can be sent together, in their order."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        kind, bytes_ = (parameter.dtype, parameter.device), parameter.numel() * parameter.element_size()
        if bucket and (size + bytes_ > _BUCKET_BYTES or kind != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += bytes_
    if bucket:
        yield bucket
