"""CUDA's part in messages: tensors that go from device to device over NCCL, or through pinned host memory over gloo.

No thread that trains waits for a copy. What goes through the host is sent, once its copy is there, by a thread of its
own, and whoever takes a message lets its stream wait for the copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ddg.comm.host_lane import HostLane
from lightning_ddg.comm.wire import as_bytes
from lightning_ddg.core.pytree import tensors_of
from lightning_ddg.core.tensors import TensorSpec, allocate


class DeviceLane(HostLane):
    """Tensors may be on a CUDA device, here and there.

    Args:
        group: A gloo group over the ranks, used by nothing else.
        device: This rank's device.
        lost: Called with a rank and an error when the connection to that rank breaks.
        failed: Called with what this rank could not do, and the error.
        edges: With NCCL, a group of its own for each directed pair ``(source, destination)`` whose tensors go from
            device to device. Tensors of all other pairs go through the host.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        lost: Callable[[int, Exception], None],
        failed: Callable[[str, Exception], None],
        edges: Mapping[tuple[int, int], dist.ProcessGroup],
    ) -> None:
        super().__init__(group, device, lost)
        self.threads.append(threading.Thread(target=self._send_staged, name="ddg-send", daemon=True))
        self._rank = dist.get_rank(group)
        self._failed = failed
        self._edges = edges
        self._staged: SimpleQueue[Any] = SimpleQueue()
        self._streams: dict[int, Any] = {}

    # ---- sending

    def send(self, peer: int, parts: list[Tensor], payload: list[Tensor], *, on_host: bool) -> None:
        edge = None if on_host else self._edges.get((self._rank, peer))
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

    def mark(self) -> threading.Event:
        left = threading.Event()
        self._staged.put(left)
        return left

    def _enter_thread(self) -> None:
        # The current CUDA device belongs to a thread, and a new thread's is the first.
        torch.cuda.set_device(self._device)

    def _send_staged(self) -> None:
        self._enter_thread()
        while (item := self._staged.get()) is not None:
            if isinstance(item, threading.Event):
                self._hand_over(item)
                continue
            copied, peer, parts = item
            try:
                if copied is not None:
                    copied.synchronize()
            except RuntimeError as error:
                self._failed("could not copy what it sends from its device", error)
            else:
                self._isend(peer, parts)

    def _see_off(self) -> None:
        self._enter_thread()
        # NCCL lets the current stream wait, which must not be the one that computes.
        with torch.cuda.stream(torch.cuda.Stream(self._device)):  # type: ignore[no-untyped-call]
            super()._see_off()

    def _wait_until_gone(self, work: Any, data: Tensor) -> None:
        super()._wait_until_gone(work, data)
        if data.is_cuda:
            torch.cuda.current_stream(self._device).synchronize()

    # ---- receiving

    def open(self, peer: int) -> None:
        self._enter_thread()
        self._streams[peer] = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def receive(self, peer: int, specs: Sequence[TensorSpec], *, on_host: bool) -> tuple[list[Tensor], Any]:
        edge, stream = None if on_host else self._edges.get((peer, self._rank)), self._streams[peer]
        tensors, ready = [], None
        with torch.cuda.stream(stream):
            for spec in specs:
                tensor = allocate(spec, "cpu" if spec.on_cpu or on_host else self._device)
                tensors.append(tensor)
                if not tensor.numel():
                    continue
                if not tensor.is_cuda:
                    self.receive_bytes(as_bytes(tensor), peer)
                elif edge is None:
                    host = allocate(spec, pin_memory=True)
                    self.receive_bytes(as_bytes(host), peer)
                    tensor.copy_(host, non_blocking=True)
                else:
                    work = dist.irecv(as_bytes(tensor), dist.get_global_rank(self._group, peer), group=edge)
                    if work is not None:
                        work.wait()
            if any(tensor.is_cuda for tensor in tensors):
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record(stream)
        return tensors, ready

    def arrive(self, value: Any, ready: Any) -> None:
        if ready is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(ready)
        for tensor in tensors_of(value):
            if tensor.is_cuda:
                tensor.record_stream(stream)

    # ---- ending

    def abort(self) -> None:
        # What NCCL has begun with a rank that is gone would keep the device busy until a watchdog ends the process.
        for group in self._edges.values():
            with suppress(AttributeError, RuntimeError):
                cast(Any, group)._get_backend(self._device).abort()

    def close(self) -> None:
        super().close()
        self._staged.put(None)

    def release(self) -> None:
        super().release()
        for group in self._edges.values():
            dist.destroy_process_group(group)
