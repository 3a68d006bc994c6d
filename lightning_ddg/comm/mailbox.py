"""Messages between ranks over ``torch.distributed``: sends never block, receives are posted ahead, failures spread.

One thread per peer receives whatever that peer sends and files it by channel; the training thread takes from those
queues.

A message is a header, then its description (only the first time it is seen on this connection), then the bytes of its
tensors; what is small travels in the header itself. gloo checks neither length nor dtype, and aborts the process on a
message that is too long, so a buffer is never allocated from anything but the sender's own description.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ddg.comm.wire import Description, Packed, as_bytes, describe, pack, unpack
from lightning_ddg.core.execution import Channel, Observers
from lightning_ddg.core.tensors import allocate, tensors_of

ERROR = Channel("error")
BYE = Channel("bye")

# The channel's name, number of the description, length of the description if it follows, flags.
_HEADER = struct.Struct("<16s3q")
_INLINE, _ON_HOST, _ENDS = 1, 2, 4
_HEADER_BYTES = 4096
_INLINE_BYTES = _HEADER_BYTES - _HEADER.size
_MAX_CACHED_BYTES = 1 << 14
_MAX_CACHED = 256
# What has been sent is kept until this much has gathered: waking a thread for every message would cost more than it.
_SENT_BYTES = 1 << 20
_SENT_MESSAGES = 32
_GRACE = 3.0
_FOREVER = timedelta(days=365)


class PeerError(RuntimeError):
    """Another rank failed; the message says which one and how."""


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
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        timeout: timedelta,
        names: Sequence[str],
        edges: dict[tuple[int, int], dist.ProcessGroup] | None = None,
        observers: Observers | None = None,
    ) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.failure: str | None = None
        self._group = group
        self._device = device
        self._timeout = timeout
        self._names = names
        self._edges = edges or {}
        self._observers = observers or Observers()
        self._peers = [rank for rank in range(self.size) if rank != self.rank]
        # By peer and the channel's name; `_ending` has those of channels that end something.
        self._arrived: defaultdict[tuple[int, str], deque[Any]] = defaultdict(deque)
        self._ending: set[tuple[int, str]] = set()
        self._news = threading.Condition()
        self._known: dict[tuple[int, bytes], int] = {}
        self._closing = False
        self._sent: list[tuple[int, Any, Tensor]] = []
        self._sent_bytes = 0
        self._leaving: SimpleQueue[Any] = SimpleQueue()
        self._staged: SimpleQueue[Any] | None = SimpleQueue() if device.type == "cuda" else None
        self._threads = [
            threading.Thread(target=self._receive_from, args=(peer,), name=f"ddg-receive-{peer}", daemon=True)
            for peer in self._peers
        ]
        self._threads.append(threading.Thread(target=self._see_off, name="ddg-see-off", daemon=True))
        if self._staged is not None:
            self._threads.append(threading.Thread(target=self._send_staged, name="ddg-send", daemon=True))
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
            value: The value. Its tensors must not be modified afterwards, unless :meth:`flush` was called in between.
            snapshot: Copy the tensors first, so that they may be modified while the message is on its way.
            payload: ``False`` sends shapes and dtypes only: the receiver gets zeros.

        Raises:
            PeerError: If a rank has already failed.
        """
        self.raise_failure()
        packed = pack(value, payload=payload, snapshot=snapshot)
        for peer in (to,) if isinstance(to, int) else to:
            self._post(peer, channel, packed)

    def _post(self, peer: int, channel: Channel, packed: Packed) -> None:
        meta = packed.meta
        key = (peer, meta)
        spec = self._known.get(key, 0)
        new = spec == 0
        if new and not channel.varied and len(meta) <= _MAX_CACHED_BYTES and len(self._known) < _MAX_CACHED:
            spec = self._known[key] = len(self._known) + 1
        header = bytearray(_HEADER_BYTES)
        payload = [as_bytes(tensor) for tensor in packed.payload if tensor.numel()]
        content = (len(meta) if new else 0) + sum(data.numel() for data in payload)
        name, flags = channel.name.encode("ascii"), _ON_HOST * channel.on_host | _ENDS * channel.ends
        if content <= _INLINE_BYTES and not any(data.is_cuda for data in payload):
            _HEADER.pack_into(header, 0, name, spec, len(meta) if new else 0, flags | _INLINE)
            end = _HEADER.size
            for piece in (meta if new else b"", *(data.numpy().tobytes() for data in payload)):
                header[end : end + len(piece)] = piece
                end += len(piece)
            parts, payload = [torch.frombuffer(header, dtype=torch.uint8)], []
        else:
            _HEADER.pack_into(header, 0, name, spec, len(meta) if new else 0, flags)
            parts = [torch.frombuffer(header, dtype=torch.uint8)]
            if new:
                parts.append(torch.frombuffer(bytearray(meta), dtype=torch.uint8))
        if self._staged is None:
            self._isend(peer, parts + payload)
        else:
            self._isend_from_device(peer, parts, payload, self._edge(self.rank, peer, channel.on_host))

    def _isend(self, peer: int, parts: list[Tensor]) -> None:
        try:
            for part in parts:
                work = dist.isend(part, group=self._group, group_dst=peer)
                self._sent.append((peer, work, part))
                self._sent_bytes += part.numel()
        except RuntimeError as error:
            self._fail(peer, error)
        if self._sent_bytes > _SENT_BYTES or len(self._sent) > _SENT_MESSAGES:
            self._hand_over()

    def _hand_over(self, marker: threading.Event | None = None) -> None:
        sent, self._sent, self._sent_bytes = self._sent, [], 0
        self._leaving.put((sent, marker))

    def _edge(self, source: int, destination: int, on_host: bool) -> dist.ProcessGroup | None:
        return None if on_host else self._edges.get((source, destination))

    def _isend_from_device(
        self, peer: int, parts: list[Tensor], payload: list[Tensor], edge: dist.ProcessGroup | None
    ) -> None:
        assert self._staged is not None
        copied = None
        by_edge = [data for data in payload if data.is_cuda and edge is not None]
        for data in payload:
            if data.is_cuda and edge is None:
                host = torch.empty_like(data, device="cpu", pin_memory=True)
                data = host.copy_(data, non_blocking=True)
                # A thread that waits for it shall sleep.
                copied = copied or torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            if not data.is_cuda:
                parts.append(data)
        if copied is not None:
            copied.record()
        self._staged.put((copied, peer, parts))
        for data in by_edge:
            work = dist.isend(data, dist.get_global_rank(self._group, peer), group=edge)
            self._leaving.put(([(peer, work, data)], None))

    def _enter_thread(self) -> None:
        # The current CUDA device belongs to a thread, and a new thread's is the first.
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _send_staged(self) -> None:
        self._enter_thread()
        assert self._staged is not None
        while (item := self._staged.get()) is not None:
            if isinstance(item, threading.Event):
                self._hand_over(item)
                continue
            copied, peer, parts = item
            try:
                if copied is not None:
                    copied.synchronize()
            except RuntimeError as error:
                self._fail_here("could not copy what it sends from its device", error)
            else:
                self._isend(peer, parts)

    def _see_off(self) -> None:
        # A gloo send is known to be complete only to somebody who waits for it; until then its tensor must live.
        self._enter_thread()
        # NCCL lets the current stream wait, which must not be the one that computes.
        aside = self._new_stream()
        with _using(aside):
            while (item := self._leaving.get()) is not None:
                sent, marker = item
                for peer, work, data in sent:
                    try:
                        if work is not None:
                            work.wait(_FOREVER)
                        if aside is not None and data.is_cuda:
                            aside.synchronize()
                    except RuntimeError as error:
                        self._fail(peer, error)
                if marker is not None:
                    marker.set()
                sent = item = work = data = None

    def _mark(self) -> threading.Event:
        left = threading.Event()
        if self._staged is None:
            self._hand_over(left)
        else:
            self._staged.put(left)
        return left

    def flush(self) -> None:
        """Waits until everything sent so far has left, so that the tensors may be modified.

        Raises:
            PeerError: If a rank has failed.
            TimeoutError: If it takes longer than the timeout.
        """
        left = self._mark()
        if not left.wait(self._timeout.total_seconds()):
            self.raise_failure()
            raise TimeoutError(
                f"{self._names[self.rank]} waited {self._timeout} for its messages to leave. If sending can really take"
                " that long, raise `timeout` of DDGStrategy."
            )
        self.raise_failure()

    # ---- receiving

    def take(self, source: int, channel: Channel) -> Any:
        """Wait for the next message of a channel from a rank, and return its value.

        Raises:
            PeerError: If a rank has failed, or ``source`` has already ended the epoch in which the message was due.
            TimeoutError: If nothing came within the timeout.
        """
        self._observers.before_take(source, channel)
        value, ready = self._wait_for(source, channel.name)
        if ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready)
            for tensor in _cuda_tensors(value):
                tensor.record_stream(stream)
        self._observers.after_take(source, channel)
        return value

    def _wait_for(self, source: int, name: str) -> Any:
        deadline = time.monotonic() + self._timeout.total_seconds()
        with self._news:
            queue = self._arrived[source, name]
            while not queue:
                self.raise_failure()
                waits = f"{self._names[self.rank]} waits for a message ({name}) from {self._names[source]}, which has"
                if ended := self._ended(source, name):
                    raise PeerError(
                        f"{waits} already ended the {ended}: the ranks count different numbers of batches. Make the"
                        " data loader's length, `limit_*_batches` and everything that stops an epoch the same on all"
                        " ranks."
                    )
                if self._arrived[source, BYE.name]:
                    raise PeerError(
                        f"{waits} finished: the ranks count different numbers of batches. Make the data loader yield"
                        " as many batches as its length says."
                    )
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(
                        f"{self._names[self.rank]} waited {self._timeout} for a message ({name}) from"
                        f" {self._names[source]}. If a batch can really take that long, raise `timeout` of DDGStrategy."
                    )
                self._news.wait(left)
            return queue.popleft()

    def _ended(self, source: int, awaited: str) -> str | None:
        """What the source has said to have ended, in a message that nobody has taken yet."""
        names = (name for peer, name in self._ending if peer == source and name != awaited)
        return next((name for name in names if self._arrived[source, name]), None)

    def has(self, source: int, channel: Channel) -> bool:
        """Return whether a message of a channel from a rank is there.

        What that rank sent before a message that was taken always is.
        """
        return bool(self._arrived.get((source, channel.name)))

    def _receive_from(self, peer: int) -> None:
        self._enter_thread()
        seen: dict[int, Description] = {}
        header = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
        stream = self._new_stream()
        try:
            while True:
                self._irecv(header, peer)
                head = header.numpy().data
                padded, spec, meta_length, flags = _HEADER.unpack_from(head)
                key, inline = (peer, padded.rstrip(b"\0").decode("ascii")), flags & _INLINE
                content = head[_HEADER.size :]
                if meta_length:
                    if not inline:
                        meta = torch.empty(meta_length, dtype=torch.uint8)
                        self._irecv(meta, peer)
                        content = meta.numpy().data
                    description = describe(content[:meta_length])
                    if spec:
                        seen[spec] = description
                else:
                    description = seen[spec]
                if inline:
                    value, ready = self._read_inline(content[meta_length:], description), None
                else:
                    value, ready = self._receive_tensors(peer, bool(flags & _ON_HOST), description, stream)
                with self._news:
                    if key[1] == ERROR.name and self.failure is None:
                        self.failure = value
                    if flags & _ENDS:
                        self._ending.add(key)
                    self._arrived[key].append((value, ready))
                    self._news.notify_all()
                if key[1] == BYE.name:
                    return
        except Exception as error:  # noqa: BLE001 - whatever ends this thread must reach the training thread
            self._fail(peer, error)

    def _read_inline(self, content: memoryview, description: Description) -> Any:
        if not description.payload:
            zeros = [allocate(spec, "cpu" if spec.on_cpu else self._device).zero_() for spec in description.specs]
            return unpack(description, zeros)
        # Of what is on a device only the empty is sent so.
        tensors = [allocate(spec, "cpu" if spec.on_cpu else self._device) for spec in description.specs]
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if size:
                as_bytes(tensor).numpy()[:] = content[:size]
                content = content[size:]
        return unpack(description, tensors)

    def _receive_tensors(self, peer: int, on_host: bool, description: Description, stream: Any) -> tuple[Any, Any]:
        if not description.payload:
            return self._read_inline(memoryview(b""), description), None
        edge = self._edge(peer, self.rank, on_host)
        tensors, ready = [], None
        with _using(stream):
            for spec in description.specs:
                stays = spec.on_cpu or on_host
                tensor = allocate(spec, "cpu" if stays else self._device)
                tensors.append(tensor)
                if not tensor.numel():
                    continue
                if not tensor.is_cuda:
                    self._irecv(as_bytes(tensor), peer)
                elif edge is None:
                    host = allocate(spec, pin_memory=True)
                    self._irecv(as_bytes(host), peer)
                    tensor.copy_(host, non_blocking=True)
                else:
                    work = dist.irecv(as_bytes(tensor), dist.get_global_rank(self._group, peer), group=edge)
                    if work is not None:
                        work.wait()
            if any(tensor.is_cuda for tensor in tensors):
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record(stream)
        return unpack(description, tensors), ready

    def _irecv(self, tensor: Tensor, peer: int) -> None:
        work = dist.irecv(tensor, group=self._group, group_src=peer)
        if work is not None:
            # The limit of a wait is kept by `take`: between two epochs a peer may rightly be silent for long.
            work.wait(_FOREVER)

    # ---- failing and ending

    def raise_failure(self) -> None:
        """Raises :class:`PeerError` if another rank has failed."""
        if self.failure is not None:
            raise PeerError(self.failure)

    def _new_stream(self) -> Any:
        return torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _fail_here(self, what: str, error: Exception) -> None:
        with self._news:
            if not self._closing and self.failure is None:
                self.failure = f"{self._names[self.rank]} {what}: {type(error).__name__}: {error}"
            self._news.notify_all()

    def _fail(self, peer: int, error: Exception) -> None:
        with self._news:
            if not self._closing and self.failure is None:
                self.failure = (
                    f"{self._names[peer]} is gone: its process ended or the connection to it broke ({error}). Its own"
                    " output, above or in its log, says why."
                )
            self._news.notify_all()

    def abort(self, reason: str) -> str:
        """Tells every other rank that this one failed, waiting a few seconds at most for the message to leave.

        Returns:
            The first failure known: another rank's, if that is why this one fails, else ``reason``.
        """
        with self._news:
            text = self.failure or reason
            if self.failure is None:
                self.failure = f"This rank has failed: {reason}"
            self._closing = True
        for peer in self._peers:
            self._post(peer, ERROR, pack(text))
            self._post(peer, BYE, pack(None))
        self._mark().wait(_GRACE)
        return text

    def close(self) -> None:
        """Ends the conversation: says goodbye and waits until all others have, so that nothing is lost in transit.

        When a rank has failed it only waits, shortly, for its own threads: a process that ends under them is aborted.
        """
        if self.failure is None:
            for peer in self._peers:
                self._post(peer, BYE, pack(None))
        deadline = time.monotonic() + self._timeout.total_seconds()
        with self._news:
            while self.failure is None and not all(self._arrived[peer, BYE.name] for peer in self._peers):
                if not self._news.wait(max(0.0, deadline - time.monotonic())):
                    break
            self._closing = True
        if self.failure is None:
            self.flush()
        else:
            self._abort_edges()
        self._leaving.put(None)
        if self._staged is not None:
            self._staged.put(None)
        deadline = time.monotonic() + _GRACE
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def disconnect(self) -> None:
        """Closes, and gives the groups back, which hold sockets and threads; after a failure they are left alone."""
        self.close()
        if self.failure is None:
            for group in (self._group, *self._edges.values()):
                dist.destroy_process_group(group)

    def _abort_edges(self) -> None:
        # What NCCL has begun with a rank that is gone would keep the device busy until a watchdog ends the process.
        for group in self._edges.values():
            with suppress(AttributeError, RuntimeError):
                cast(Any, group)._get_backend(self._device).abort()


def _using(stream: Any) -> AbstractContextManager[Any]:
    # Without a stream torch would look for a device.
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _cuda_tensors(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(value) if tensor.is_cuda]
