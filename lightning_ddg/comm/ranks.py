"""The processes that train, as one of them sees them: itself with all stages, or one stage among several.

Whoever holds a :class:`Ranks` need not ask which of the two it is. What is here happens outside iterations, before
training, for checkpoints and at the end; unless it says otherwise, every rank must call it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_ddg.comm.link import Link, measured
from lightning_ddg.comm.mailbox import GroupMailbox, PeerError
from lightning_ddg.comm.replicas import PipelineMailbox, Replicas
from lightning_ddg.comm.weights import adopt, given
from lightning_ddg.core.execution import Channel, Observers
from lightning_ddg.core.schedule import rank_of_stage, stage_of_rank

STATE = Channel("state", on_host=True)
BARRIER = Channel("barrier")
BROADCAST = Channel("broadcast", on_host=True, varied=True)
VOTE = Channel("vote")

_GROUP = "lightning_ddg"
#: The least time that ranks which are all there are given to connect.
_CONNECTING = timedelta(seconds=30)
_T = TypeVar("_T")


class Ranks(Protocol):
    """The processes that train together: one pipeline, or several alike, which are replicas of each other.

    Ranks are those within this process's pipeline, but for :attr:`world` and what says so.

    Attributes:
        rank: This process's rank.
        size: How many processes the pipeline has.
        num_stages: ``K``.
        stage: Number ``1..K`` of this process's stage; ``None`` if it has all of them.
        reading_rank: The rank that reads data: that of stage 1. In the first pipeline the world counts it so too.
        mailbox: Connects the ranks; ``world`` those of all pipelines, which have other ranks there.
        replicas: The processes with the same stage.
        observers: Are told of every wait for a message of the pipeline.
    """

    rank: int
    size: int
    num_stages: int
    stage: int | None
    reading_rank: int
    mailbox: GroupMailbox | PipelineMailbox | EmptyMailbox
    world: GroupMailbox | EmptyMailbox
    replicas: Replicas
    observers: Observers

    @property
    def others(self) -> list[int]:
        """The other ranks."""
        return [rank for rank in range(self.size) if rank != self.rank]

    @property
    def all_others(self) -> list[int]:
        """The other ranks of all pipelines, as :attr:`world` counts them."""
        return [rank for rank in range(self.world.size) if rank != self.world.rank]

    @property
    def reads(self) -> bool:
        """Whether this rank reads data."""
        return self.rank == self.reading_rank

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is its pipeline's rank 0, that of the last stage."""
        return self.rank == 0

    @property
    def decides(self) -> bool:
        """Whether this is rank 0 of all, which decides, logs and saves."""
        return self.world.rank == 0

    @property
    def name(self) -> str:
        """This process's name in messages."""
        return "Rank 0"

    @property
    def mesh(self) -> DeviceMesh:
        """The processes as a mesh with the axes ``("data", "stage")``.

        Raises:
            RuntimeError: In one process.
        """
        raise RuntimeError("There is no device mesh in one process, nor before the Trainer has connected several.")

    def barrier(self) -> None:
        """Wait until every rank of all pipelines has come here."""
        return

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        """Return the object of rank ``src`` of the world on every rank of all pipelines."""
        return obj

    def agree(self, decision: bool, all: bool = True) -> bool:
        """Return whether all ranks of all pipelines say yes, or any of them."""
        return decision

    def gather(self, own: dict[Any, Any]) -> list[dict[Any, Any]]:
        """Return on rank 0 of all what the other ranks of its pipeline have, in order; an empty list on all others.

        Ranks that have disconnected are connected for the moment.

        Raises:
            PeerError: If a rank has failed.
        """
        return []

    def exchange(self, value: _T) -> list[_T]:
        """Return what each rank of all pipelines has given, in order; values are pytrees of tensors and Python values.

        Raises:
            PeerError: If a rank has failed.
        """
        return [value]

    def share(self, module: nn.Module, names: Collection[str], sources: Collection[int]) -> None:
        """Give every rank of the pipeline the parameters and buffers of a module that others have, by their names.

        A buffer that a rank does not have yet, or of another shape, as its owner's forward has made it, is made there.

        Of the ranks, ``sources`` give; this one gives those in ``names``, if it is among them.
        """
        return

    def share_first(self, module: nn.Module, names: Collection[str], take: Callable[..., None] = adopt) -> None:
        """Give the parameters and buffers of the first replica's process of this stage to the others, to ``take``."""
        return

    def link(self, default: Link) -> Link:
        """Return what is measured between stages 1 and 2; ``default`` where there are no messages."""
        return default

    def abort(self, reason: str) -> str:
        """Tell the other ranks that this one has failed; they need not call it.

        Return the first failure known: another rank's, if that is why this one fails, else ``reason``.
        """
        return reason

    def disconnect(self) -> None:
        """End the conversation between the ranks, without losing what is on its way."""
        return


class EmptyMailbox:
    """The mailbox of a process that is alone: a :class:`~lightning_ddg.core.execution.Mailbox` without peers."""

    rank = 0
    size = 1

    def send(
        self, to: int | Iterable[int], channel: Channel, value: Any, *, snapshot: bool = False, payload: bool = True
    ) -> None:
        """Raise ``RuntimeError`` if there is a receiver."""
        for peer in (to,) if isinstance(to, int) else to:
            raise self._nobody(peer, channel)

    def take(self, source: int, channel: Channel) -> Any:
        """Raise ``RuntimeError``, as nobody has sent anything."""
        raise self._nobody(source, channel)

    def has(self, source: int, channel: Channel) -> bool:
        """Return ``False``."""
        return False

    def _nobody(self, peer: int, channel: Channel) -> RuntimeError:
        return RuntimeError(
            f"There is no rank {peer} to exchange a message ({channel.name}) with: this process trains all stages."
        )


class LocalRanks(Ranks):
    """One process with all stages: it agrees with itself, and there is nobody to send to."""

    def __init__(self, num_stages: int) -> None:
        self.rank, self.size = 0, 1
        self.num_stages = num_stages
        self.stage = None
        self.reading_rank = 0
        self.mailbox = self.world = EmptyMailbox()
        self.replicas = Replicas(self.world, [0], 0)
        self.observers = Observers()


class PipelineRanks(Ranks):
    """One pipeline or several, each of as many processes as stages; the default process group must exist.

    Rank ``r`` of the world has the stage ``K - r % K`` of the replica ``r // K``.

    Args:
        num_stages: ``K``. The default group has as many ranks, or a multiple.
        device: This rank's device.
        timeout: The longest a rank waits for one message.
        backend: Backend of the default group. With NCCL, tensors go from device to device.
        slack: ``s`` of the stages' delays: so many batches more may be under way. The greatest of all ranks' counts.
    """

    world: GroupMailbox

    def __init__(self, num_stages: int, device: torch.device, timeout: timedelta, backend: str, slack: int = 0) -> None:
        world = dist.get_rank()
        self.num_stages = self.size = num_stages
        self.rank, self._first = world % num_stages, world - world % num_stages
        self.stage = stage_of_rank(world, num_stages)
        self.reading_rank = rank_of_stage(1, num_stages)
        self.observers = Observers()
        self._device = device
        self._timeout = timeout
        self._backend = backend
        self._failure: str | None = None
        self._slack = _greatest(slack, device)
        self._mesh = _mesh_of(dist.group.WORLD, device.type, num_stages)
        self._alone = dist.get_world_size() == num_stages
        self.world = self._open(self.observers if self._alone else None)
        self.mailbox = self._view(self.world)
        alike = range(self.rank, self.world.size, num_stages)
        self.replicas = Replicas(self.world, alike, world // num_stages, self._swap_alike)
        self._connected = True

    @classmethod
    def connect(
        cls, num_stages: int, device: torch.device, timeout: timedelta, backend: str, slack: int = 0
    ) -> PipelineRanks:
        """Wait for all ranks, then connect them; the arguments are those of the class.

        Raises:
            RuntimeError: If a rank has not come within the timeout.
        """
        # Making groups waits for every rank without noticing that one is gone; a barrier notices, gloo's says who.
        if backend == "gloo":
            dist.monitored_barrier(timeout=timeout, wait_all_ranks=True)
        else:
            _barrier(device)
        return cls(num_stages, device, timeout, backend, slack)

    @property
    def name(self) -> str:
        return name_of_rank(self.world.rank, self.num_stages, self.world.size)

    def _view(self, world: GroupMailbox) -> GroupMailbox | PipelineMailbox:
        return world if self._alone else PipelineMailbox(world, self._first, self.size, self.observers)

    def _open(self, observers: Observers | None = None) -> GroupMailbox:
        def connect(those: list[int], backend: str) -> dist.ProcessGroup:
            # The mailbox keeps the limit of a message; NCCL's own, which would end the process, must not be shorter.
            timeout = max(self._timeout, timedelta(minutes=30) if backend == "nccl" else _CONNECTING)
            return cast(dist.ProcessGroup, dist.new_group(those, timeout=timeout, backend=backend, group_desc=_GROUP))

        ranks = list(range(dist.get_world_size()))
        group = connect(ranks, "gloo")
        edges: dict[tuple[int, int], dist.ProcessGroup] = {}
        for first in range(0, len(ranks), self.size) if "nccl" in self._backend else ():
            own = ranks[first : first + self.size]
            neighbours = [(rank, rank - 1) for rank in own[1:]] + [(rank - 1, rank) for rank in own[1:]]
            for edge in dict.fromkeys([*neighbours, (own[-1], own[0])]):
                edges[edge] = connect(sorted(edge), "nccl")
        names = [name_of_rank(rank, self.num_stages, len(ranks)) for rank in ranks]
        return GroupMailbox(group, self._device, self._timeout, names, edges, observers, self._slack)

    @property
    def mesh(self) -> DeviceMesh:
        return self._mesh

    def barrier(self) -> None:
        # What is done while a failure is on its way up, such as taking files away, has nobody to wait for.
        if self._failure is not None:
            return
        if self._talks():
            _swap(self.world, BARRIER, None)
        elif dist.is_initialized():
            _barrier(self._device)

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        if self._talks():
            if self.world.rank != src:
                return cast(_T, self.world.take(src, BROADCAST))
            self.world.send(self.all_others, BROADCAST, obj)
            self.world.flush()
            return obj
        box = [obj]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src)
        return box[0]

    def agree(self, decision: bool, all: bool = True) -> bool:
        if self._talks():
            votes = sum(_swap(self.world, VOTE, bool(decision)))
        elif dist.is_initialized():
            counted = torch.tensor(int(decision), device=_device_of_group(self._device))
            dist.all_reduce(counted)
            votes = int(counted)
        else:
            return decision
        return votes == self.world.size if all else votes > 0

    def _talks(self) -> bool:
        """Whether the mailbox carries what ranks decide together: it knows who fails, and how long to wait.

        Raises:
            PeerError: If a rank has failed.
        """
        if self._failure is not None:
            raise PeerError(self._failure)
        return self._connected

    def gather(self, own: dict[Any, Any]) -> list[dict[Any, Any]]:
        with self._conversation() as world:
            return [] if self.replicas.number else _gather(world, self.size, own)

    @contextmanager
    def _conversation(self) -> Iterator[GroupMailbox]:
        if self._failure is not None:
            raise PeerError(f"No checkpoint can be assembled, as other stages are out of reach. {self._failure}")
        if self._connected:
            yield self.world
            return
        # After a fit, `trainer.save_checkpoint` finds the ranks no longer connected.
        world = self._open()
        try:
            yield world
        finally:
            world.disconnect()

    def exchange(self, value: _T) -> list[_T]:
        with self._conversation() as world:
            values = _swap(world, STATE, value)
            world.flush()
            return values

    def share(self, module: nn.Module, names: Collection[str], sources: Collection[int]) -> None:
        with self._conversation() as world:
            mailbox = self._view(world)
            if self.rank in sources:
                mailbox.send(self.others, STATE, given(module, names))
                world.flush()
            for rank in self.others:
                if rank in sources:
                    adopt(module, *mailbox.take(rank, STATE))

    def share_first(self, module: nn.Module, names: Collection[str], take: Callable[..., None] = adopt) -> None:
        if self._alone:
            return
        with self._conversation() as world:
            if self.replicas.number:
                take(module, *world.take(self.rank, STATE))
            else:
                alike = range(self.rank + self.size, world.size, self.size)
                world.send(alike, STATE, given(module, names))
                world.flush()

    def _swap_alike(self, value: Any) -> list[Any] | None:
        """What the processes of this stage have given, once the conversation has ended; ``None`` before."""
        if self._talks():
            return None
        values = [value] * self.replicas.size
        dist.all_gather_object(values, value, group=self._mesh.get_group("data"))
        return values

    def link(self, default: Link) -> Link:
        found, second = default, rank_of_stage(2, self.num_stages)
        if self.rank in (self.reading_rank, second):
            peer = second if self.reads else self.reading_rank
            found = measured(self.mailbox, peer, self._device, first=self.reads)
        return self.broadcast(found, src=self.reading_rank)

    def abort(self, reason: str) -> str:
        if self._failure is None:
            self._failure = self.world.abort(reason) if self._connected else self.world.failure or reason
        return self._failure

    def disconnect(self) -> None:
        if self._connected:
            self._connected = False
            self.world.disconnect()


def name_of_rank(rank: int, num_stages: int, size: int) -> str:
    """Return the name of a rank of the world, which has a size, in messages."""
    replica = f"replica {rank // num_stages}, " if size > num_stages else ""
    return f"Rank {rank} ({replica}stage {stage_of_rank(rank, num_stages)})"


def is_own_group(group: dist.ProcessGroup | None) -> bool:
    """Return whether a process group carries the messages of a mailbox."""
    return group is not None and group.group_desc == _GROUP


# One mesh for all fits with a default group, as a mesh's groups hold sockets and threads.
@lru_cache(maxsize=1)
def _mesh_of(world: dist.ProcessGroup, device_type: str, num_stages: int) -> DeviceMesh:
    shape = (dist.get_world_size(world) // num_stages, num_stages)
    return init_device_mesh(device_type, shape, mesh_dim_names=("data", "stage"))


def _device_of_group(own: torch.device) -> torch.device:
    """Where the default group's collectives take tensors of a rank with that device."""
    return own if dist.get_backend() == "nccl" else torch.device("cpu")


def _greatest(number: int, device: torch.device) -> int:
    """The greatest of all ranks' numbers: what differs is refused later, by name, over messages that must work."""
    counted = torch.tensor(number, device=_device_of_group(device))
    dist.all_reduce(counted, dist.ReduceOp.MAX)
    return int(counted)


def _barrier(device: torch.device) -> None:
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[device.index])
    else:
        dist.barrier()


def _swap(mailbox: GroupMailbox, channel: Channel, value: _T) -> list[_T]:
    others = [rank for rank in range(mailbox.size) if rank != mailbox.rank]
    mailbox.send(others, channel, value)
    values = {rank: mailbox.take(rank, channel) for rank in others}
    return [values.get(rank, value) for rank in range(mailbox.size)]


def _gather(mailbox: GroupMailbox, size: int, own: dict[Any, Any]) -> list[dict[Any, Any]]:
    if mailbox.rank == 0:
        return [mailbox.take(rank, STATE) for rank in range(1, size)]
    mailbox.send(0, STATE, own)
    mailbox.flush()
    return []
