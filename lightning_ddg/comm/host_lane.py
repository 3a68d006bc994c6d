"""How bytes leave a rank and arrive at one, from host to host over gloo; what they mean is the mailbox's business.

A send returns at once, and a thread waits for what has been sent to have left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ddg.comm.wire import as_bytes
from lightning_ddg.core.tensors import TensorSpec, allocate

#: gloo's tags: frames come in their order, and so does what follows a frame that it does not fit in.
FRAME, REST = 0, 1

# What has been sent is kept until this much has gathered: waking a thread for every message would cost more than it.
_SENT_BYTES = 1 << 20
_SENT_MESSAGES = 32
# The limit of a wait is kept by the mailbox: between two epochs a peer may rightly be silent for long.
_FOREVER = timedelta(days=365)


class HostLane:
    """Tensors go from host to host.

    Args:
        group: A gloo group over the ranks, used by nothing else.
        device: Where tensors are put that were not on their sender's CPU.
        lost: Called with a rank and an error when the connection to that rank breaks.

    Attributes:
        threads: To be started by the owner, and joined after :meth:`close`.
        held_up_by: The rank that is receiving, or shall receive, the oldest message that has not left.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, lost: Callable[[int, Exception], None]) -> None:
        self.threads = [threading.Thread(target=self._see_off, name="ddg-see-off", daemon=True)]
        self.held_up_by: int | None = None
        self._group = group
        self._device = device
        self._lost = lost
        self._sent: list[tuple[int, Any, Tensor]] = []
        self._sent_bytes = 0
        self._leaving: SimpleQueue[Any] = SimpleQueue()

    # ---- sending

    def send(self, peer: int, parts: list[Tensor], payload: list[Tensor], *, on_host: bool) -> None:
        """Send a message without waiting for its receiver: ``parts`` on the CPU, then its tensors where they are.

        The first part is its frame. All are ``uint8``. With ``on_host`` the tensors arrive on the receiver's host,
        wherever they were.
        """
        self._isend(peer, parts + payload)

    def mark(self) -> threading.Event:
        """Return an event that is set when everything sent so far has left."""
        left = threading.Event()
        self._hand_over(left)
        return left

    def _isend(self, peer: int, parts: list[Tensor]) -> None:
        try:
            for number, part in enumerate(parts):
                work = dist.isend(part, group=self._group, group_dst=peer, tag=REST if number else FRAME)
                self._sent.append((peer, work, part))
                self._sent_bytes += part.numel()
        except RuntimeError as error:
            self._lost(peer, error)
        if self._sent_bytes > _SENT_BYTES or len(self._sent) > _SENT_MESSAGES:
            self._hand_over()

    def _hand_over(self, marker: threading.Event | None = None) -> None:
        sent, self._sent, self._sent_bytes = self._sent, [], 0
        self._leaving.put((sent, marker))

    def _see_off(self) -> None:
        # A gloo send is known to be complete only to somebody who waits for it; until then its tensor must live.
        while (item := self._leaving.get()) is not None:
            sent, marker = item
            for peer, work, data in sent:
                self.held_up_by = peer
                try:
                    self._wait_until_gone(work, data)
                except RuntimeError as error:
                    self._lost(peer, error)
            self.held_up_by = None
            if marker is not None:
                marker.set()
            sent = item = work = data = None

    def _wait_until_gone(self, work: Any, data: Tensor) -> None:
        if work is not None:
            work.wait(_FOREVER)

    # ---- receiving

    def open(self, peer: int) -> None:
        """Called first by the thread that receives from a rank."""

    def post(self, into: Tensor, peer: int, tag: int) -> Any:
        """Make room for what a rank sends next under a tag; ``into`` is ``uint8``, on the CPU. Returns the receive."""
        return dist.irecv(into, group=self._group, group_src=peer, tag=tag)

    def wait(self, receive: Any) -> None:
        """Wait until what was posted has arrived."""
        if receive is not None:
            receive.wait(_FOREVER)

    def receive_bytes(self, into: Tensor, peer: int) -> None:
        """Wait for what follows a frame; ``into`` is ``uint8``, on the CPU, as long as that is."""
        self.wait(self.post(into, peer, REST))

    def receive(self, peer: int, specs: Sequence[TensorSpec], *, on_host: bool) -> tuple[list[Tensor], Any]:
        """Wait for a message's tensors; return them, and what :meth:`arrive` must be given before they are used."""
        tensors = [allocate(spec, "cpu" if spec.on_cpu or on_host else self._device) for spec in specs]
        for tensor in tensors:
            if tensor.numel():
                self.receive_bytes(as_bytes(tensor), peer)
        return tensors, None

    def arrive(self, value: Any, ready: Any) -> None:
        """Let the calling thread use the tensors of a value that was received."""

    # ---- ending

    def abort(self) -> None:
        """Give up what is on its way, as another rank has failed."""

    def close(self) -> None:
        """Let the threads end."""
        self._leaving.put(None)

    def release(self) -> None:
        """Give the groups back, which hold sockets and threads."""
        dist.destroy_process_group(self._group)
