"""Messages between ranks over ``torch.distributed``: sends never block, receives are posted ahead, failures spread.

One thread per peer receives whatever that peer sends and files it by channel; the training thread takes from those
queues. How bytes travel from a host, or from a CUDA device, is the business of the lane.

A message is a header, then its description (only the first time it is seen on this connection), then the bytes of its
tensors: all in one frame, if the receiver has made room for that. gloo checks neither length nor dtype, and aborts the
process on a message that is too long, so a buffer is never allocated from anything but the sender's own description.
"""

from __future__ import annotations

import logging
import pickle
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_ddg.comm.device_lane import DeviceLane
from lightning_ddg.comm.frames import Arriving, Room
from lightning_ddg.comm.host_lane import HostLane
from lightning_ddg.comm.wire import Description, Packed, as_bytes, describe, pack, unpack
from lightning_ddg.core.execution import Channel, Observers
from lightning_ddg.core.tensors import allocate

_log = logging.getLogger("lightning_ddg.comm")

ERROR = Channel("error")
BYE = Channel("bye")
WAITS = Channel("waits", varied=True)

# The channel's name, number of the description, length of the description if it follows, bytes of the message, flags.
_HEADER = struct.Struct("<16s4q")
_INLINE, _ON_HOST, _ENDS = 1, 2, 4
_MAX_CACHED_BYTES = 1 << 14
_MAX_CACHED = 256
_GRACE = 3.0
#: After so many seconds a rank tells all others whom it waits for: two who wait for each other know it then, and who
#: gives up waiting can say who has not been waiting for anybody.
_PATIENCE = 2.0


class PeerError(RuntimeError):
    """Another rank failed; the message says which one and how."""


class UnmatchedError(PeerError):
    """This rank waits for a message that no rank will send."""


class GroupMailbox:
    """Messages between the ranks of one pipeline: a :class:`~lightning_ddg.core.execution.Mailbox` over a group.

    Args:
        group: A gloo group over the ranks, used by nothing else.
        device: Device of this rank. Tensors that are on their sender's device arrive on it, unless they are states, of
            which one rank may receive more than its device holds; what is on the CPU stays there.
        timeout: The longest a rank waits for one message.
        names: A readable name of each rank, for error messages.
        edges: With CUDA and NCCL, a group of its own for each directed pair ``(source, destination)`` whose tensors go
            from device to device. Tensors of all other pairs go through the host.
        observers: Are told of every wait for a message.
        slack: ``s`` of the stages' delays, by which they may be further ahead; the same on all ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout: timedelta,
        names: Sequence[str],
        edges: dict[tuple[int, int], dist.ProcessGroup] | None = None,
        observers: Observers | None = None,
        slack: int = 0,
    ) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.failure: str | None = None
        self._device = device
        self._timeout = timeout
        self._names = names
        self._observers = observers or Observers()
        self._peers = [rank for rank in range(self.size) if rank != self.rank]
        # By peer and the channel's name; `_ending` has those of channels that end something.
        self._arrived: defaultdict[tuple[int, str], deque[Any]] = defaultdict(deque)
        self._ending: set[tuple[int, str]] = set()
        self._news = threading.Condition()
        # How many messages have gone to a peer and come from it, and what it has said that it waits for: from whom,
        # on which channel, and how many of that rank's messages it has got.
        self._posted: defaultdict[int, int] = defaultdict(int)
        self._received: defaultdict[int, int] = defaultdict(int)
        self._waits: dict[int, tuple[int, str, int]] = {}
        self._known: dict[tuple[int, bytes], int] = {}
        self._room = {peer: Room(slack) for peer in self._peers}
        self._slack = slack
        self._logged: set[tuple[str, str, int]] = set()
        # Whether this rank ends because of the failure, or of its own: who closes afterwards need not be told again.
        self._told = self._closing = False
        self._lane = (
            DeviceLane(group, device, self._lost, self._failed, edges or {})
            if device.type == "cuda"
            else HostLane(group, device, self._lost)
        )
        _log.debug("%s is connected as one of %s, on %s", names[self.rank], self.size, device)
        self._threads = [
            threading.Thread(target=self._receive_from, args=(peer,), name=f"ddg-receive-{peer}", daemon=True)
            for peer in self._peers
        ]
        self._threads += self._lane.threads
        for thread in self._threads:
            thread.start()

    # ---- sending

    def send(
        self, to: int | Iterable[int], channel: Channel, value: Any, *, snapshot: bool = False, payload: bool = True
    ) -> None:
        """Send a pytree of tensors and Python values without waiting for the receivers.

        Args:
            to: The receiver, or several.
            channel: What it is for.
            value: Its tensors must not be modified before they have left, as :meth:`flush` makes sure.
            snapshot: Copy the tensors first, so that they may be modified at once.
            payload: ``False`` sends shapes and dtypes only: the receiver gets zeros.

        Raises:
            PeerError: If a rank has already failed.
        """
        self.raise_failure()
        packed = pack(value, payload=payload, snapshot=snapshot)
        for peer in (to,) if isinstance(to, int) else to:
            self._post(peer, channel, packed)

    def _post(self, peer: int, channel: Channel, packed: Packed) -> None:
        self._log_first("sends", channel.name, peer)
        if channel is not WAITS:
            self._posted[peer] += 1
        key = (peer, packed.meta)
        spec = self._known.get(key, 0)
        meta = b"" if spec else packed.meta
        if meta and not channel.varied and len(meta) <= _MAX_CACHED_BYTES and len(self._known) < _MAX_CACHED:
            spec = self._known[key] = len(self._known) + 1
        payload = [as_bytes(tensor) for tensor in packed.payload if tensor.numel()]
        size = _HEADER.size + len(meta) + sum(data.numel() for data in payload)
        room = self._room[peer]
        inline = size <= room.next and all(data.is_cpu for data in payload)
        flags = _INLINE * inline | _ON_HOST * channel.on_host | _ENDS * channel.ends
        parts = [torch.frombuffer(bytearray(meta), dtype=torch.uint8)] if meta else []
        frame = room.frame(size if inline else _HEADER.size)
        _HEADER.pack_into(frame.numpy().data, 0, channel.name.encode("ascii"), spec, len(meta), size, flags)
        room.count(size)
        if inline and size > _HEADER.size:
            torch.cat([*parts, *payload], out=frame[_HEADER.size : size])
        if inline:
            parts, payload = [], []
        self._lane.send(peer, [frame, *parts], payload, on_host=channel.on_host)

    def _log_first(self, does: str, channel: str, peer: int) -> None:
        if (does, channel, peer) not in self._logged:
            self._logged.add((does, channel, peer))
            _log.debug("%s %s a first message (%s): %s", self._names[self.rank], does, channel, self._names[peer])

    def flush(self) -> None:
        """Wait until everything sent so far has left, so that the tensors may be modified.

        Raises:
            PeerError: If a rank has failed.
            TimeoutError: If it takes longer than the timeout.
        """
        left, limit = self._lane.mark(), self._timeout.total_seconds()
        patience = min(_PATIENCE, limit)
        if not left.wait(patience):
            peer = self._lane.held_up_by
            if peer is not None:
                self._say_waiting((peer, "receipt", -1))
            if not left.wait(limit - patience):
                self.raise_failure()
                to = "leave" if peer is None else f"be received by {self._names[peer]}{self._waits_itself(peer)}"
                raise TimeoutError(
                    f"{self._names[self.rank]} waited {self._timeout} for its messages to {to}. If sending can really"
                    " take that long, raise `timeout` of DDGStrategy."
                )
            if peer is not None:
                self._say_waiting(None)
        self.raise_failure()

    # ---- receiving

    def take(self, source: int, channel: Channel) -> Any:
        """Wait for the next message of a channel from a rank, and return its value.

        Raises:
            PeerError: If a rank has failed.
            UnmatchedError: If ``source`` has ended the epoch in which the message was due, or waits for this rank.
            TimeoutError: If nothing came within the timeout.
        """
        self._observers.before_take(source, channel)
        value, ready = self._wait_for(source, channel.name)
        self._lane.arrive(value, ready)
        self._observers.after_take(source, channel)
        return value

    def _wait_for(self, source: int, name: str) -> Any:
        start = time.monotonic()
        deadline, told = start + self._timeout.total_seconds(), -1
        with self._news:
            queue = self._arrived[source, name]
            while not queue:
                self.raise_failure()
                self._raise_if_in_vain(source, name)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(
                        f"{self._names[self.rank]} waited {self._timeout} for a message ({name}) from"
                        f" {self._names[source]}{self._waits_itself(source)}. If a batch can really take that long,"
                        " raise `timeout` of DDGStrategy."
                    )
                patience = start + _PATIENCE - time.monotonic()
                if patience <= 0 and told != self._received[source]:
                    told = self._received[source]
                    self._say_waiting((source, name, told))
                self._news.wait(min(left, patience) if patience > 0 else left)
            if told >= 0:
                self._say_waiting(None)
            return queue.popleft()

    def _say_waiting(self, what: tuple[int, str, int] | None) -> None:
        packed = pack(what)
        for peer in self._peers:
            self._post(peer, WAITS, packed)

    def _waits_itself(self, source: int) -> str:
        """Return what a rank that is waited for waits for itself, as it has said, and so on: the last is to blame."""
        text, seen = "", {self.rank}
        while source not in seen and source in self._waits:
            seen.add(source)
            source, name, _ = self._waits[source]
            text += f", which itself waits for one ({name}) from {self._names[source]}"
        return text

    def _raise_if_in_vain(self, source: int, name: str) -> None:
        """Raise :class:`UnmatchedError` if a message that is waited for cannot come."""
        waits = f"{self._names[self.rank]} waits for a message ({name}) from {self._names[source]}, which has"
        if ended := self._ended(source, name):
            raise UnmatchedError(
                f"{waits} already ended the {ended}: the ranks count different numbers of batches. Make the"
                " data loader's length, `limit_*_batches` and everything that stops an epoch the same on all"
                " ranks."
            )
        if self._arrived[source, BYE.name]:
            raise UnmatchedError(
                f"{waits} finished: the ranks count different numbers of batches. Make the data loader yield"
                " as many batches as its length says."
            )
        if (awaited := self._awaited_in_vain(source)) is not None:
            raise UnmatchedError(
                f"{waits} sent none and waits for one ({awaited}) from {self._names[self.rank]}: each waits for"
                " the other. Do on all ranks what one of them does here, or on none: `trainer.save_checkpoint`,"
                " `trainer.validate` and all that Lightning does on all ranks, not only `if"
                " trainer.is_global_zero`."
            )

    def _awaited_in_vain(self, source: int) -> str | None:
        """What a rank that is waited for waits for itself, if it has got everything that was sent to it."""
        whom, awaited, received = self._waits.get(source, (None, "", -1))
        return awaited if (whom, received) == (self.rank, self._posted[source]) else None

    def _ended(self, source: int, awaited: str) -> str | None:
        """What the source has said to have ended, in a message that nobody has taken yet."""
        names = (name for peer, name in self._ending if peer == source and name != awaited)
        return next((name for name in names if self._arrived[source, name]), None)

    def has(self, source: int, channel: Channel) -> bool:
        """Return whether a message is there; what its sender sent before a message that was taken always is."""
        return bool(self._arrived.get((source, channel.name)))

    def _receive_from(self, peer: int) -> None:
        self._lane.open(peer)
        seen: dict[int, Description] = {}
        name = ""
        try:
            frames = Arriving(self._lane, peer, self._slack)
            while name != BYE.name:
                head = frames.wait().numpy().data
                padded, spec, meta_length, size, flags = _HEADER.unpack_from(head)
                name = padded.rstrip(b"\0").decode("ascii")
                try:
                    value, ready = self._read(peer, head[_HEADER.size :], spec, meta_length, flags, seen)
                except (pickle.UnpicklingError, AttributeError, ImportError) as error:
                    self._fail(f"A message ({name}) from {self._names[peer]} cannot be read: {error}")
                    return
                frames.count(size)
                self._log_first("receives", name, peer)
                with self._news:
                    if name == ERROR.name and self.failure is None:
                        self.failure = value
                    if flags & _ENDS:
                        self._ending.add((peer, name))
                    self._waits.pop(peer, None)
                    if name == WAITS.name:
                        if value is not None:
                            self._waits[peer] = value
                    else:
                        self._received[peer] += 1
                        self._arrived[peer, name].append((value, ready))
                    self._news.notify_all()
        except Exception as error:  # noqa: BLE001 - whatever ends this thread must reach the training thread
            self._lost(peer, error)

    def _read(
        self, peer: int, content: memoryview, spec: int, meta_length: int, flags: int, seen: dict[int, Description]
    ) -> tuple[Any, Any]:
        if meta_length:
            if not flags & _INLINE:
                meta = torch.empty(meta_length, dtype=torch.uint8)
                self._lane.receive_bytes(meta, peer)
                content = meta.numpy().data
            description = describe(content[:meta_length])
            if spec:
                seen[spec] = description
        else:
            description = seen[spec]
        if flags & _INLINE or not description.payload:
            return self._read_inline(content[meta_length:], description), None
        tensors, ready = self._lane.receive(peer, description.specs, on_host=bool(flags & _ON_HOST))
        return unpack(description, tensors), ready

    def _read_inline(self, content: memoryview, description: Description) -> Any:
        # Of what is on a device only the empty is sent so, and what is sent without its values.
        tensors = [allocate(spec, "cpu" if spec.on_cpu else self._device) for spec in description.specs]
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if not description.payload:
                tensor.zero_()
            elif size:
                as_bytes(tensor).numpy()[:] = content[:size]
                content = content[size:]
        return unpack(description, tensors)

    # ---- failing and ending

    def raise_failure(self) -> None:
        """Raise :class:`PeerError` if another rank has failed."""
        if self.failure is not None:
            self._told = True
            raise PeerError(self.failure)

    def _lost(self, peer: int, error: Exception) -> None:
        # What gloo says of a process that has ended is not what has happened.
        detail = "" if "by peer" in str(error) else f" ({error})"
        _log.debug("the connection to %s broke: %s", self._names[peer], error)
        self._fail(
            f"{self._names[peer]} is gone: its process ended or the connection to it broke{detail}. Its own output,"
            " above or in its log, says why."
        )

    def _failed(self, what: str, error: Exception) -> None:
        self._fail(f"{self._names[self.rank]} {what}: {type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        with self._news:
            if not self._closing and self.failure is None:
                _log.debug("%s fails: %s", self._names[self.rank], reason)
                self.failure = reason
            self._news.notify_all()

    def abort(self, reason: str) -> str:
        """Tell every other rank that this one failed, waiting a few seconds at most for the message to leave.

        Returns:
            The first failure known: another rank's, if that is why this one fails, else ``reason``.
        """
        _log.debug("%s tells the others that it has failed: %s", self._names[self.rank], reason)
        with self._news:
            text = self.failure or reason
            if self.failure is None:
                self.failure = f"This rank has failed: {reason}"
            self._told = self._closing = True
        for peer in self._peers:
            self._post(peer, ERROR, pack(text))
            self._post(peer, BYE, pack(None))
        self._lane.mark().wait(_GRACE)
        return text

    def close(self) -> None:
        """End the conversation: say goodbye and wait until all others have, so that nothing is lost in transit.

        When a rank has failed, only wait, shortly, for one's own threads: a process that ends under them is aborted.

        Raises:
            PeerError: If a rank fails meanwhile.
            TimeoutError: If a rank has not said goodbye within the timeout.
        """
        late = False
        if self.failure is None:
            for peer in self._peers:
                self._post(peer, BYE, pack(None))
        deadline = time.monotonic() + self._timeout.total_seconds()
        with self._news:
            while self.failure is None and not all(self._arrived[peer, BYE.name] for peer in self._peers):
                if not self._news.wait(max(0.0, deadline - time.monotonic())):
                    names = [self._names[peer] for peer in self._peers if not self._arrived[peer, BYE.name]]
                    late = True
                    self.failure = (
                        f"{self._names[self.rank]} waited {self._timeout} for {' and '.join(names)} to end the run too."
                        " If what is done after training can really take that long, raise `timeout` of DDGStrategy."
                    )
            self._closing = True
        if self.failure is None:
            self.flush()
        else:
            self._lane.abort()
        self._lane.close()
        deadline = time.monotonic() + _GRACE
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        if late:
            raise TimeoutError(self.failure)
        if not self._told:
            self.raise_failure()

    def disconnect(self) -> None:
        """Close, and give the groups back, which hold sockets and threads; after a failure they are left alone."""
        _log.debug("%s disconnects%s", self._names[self.rank], " after a failure" if self.failure else "")
        self.close()
        if self.failure is None:
            self._lane.release()
