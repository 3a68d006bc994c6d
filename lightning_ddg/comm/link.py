"""How long a message takes between two ranks, measured by sending some there and back."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from lightning_ddg.core.execution import Channel, Mailbox

PROBE = Channel("probe")

_BYTES = 4 << 20
# Nobody has made room for as much: word of it goes there, its receiver's answer back, and then it comes.
_LATENCIES = 3
_ROUNDS = 5


class Link(NamedTuple):
    """How long a message takes between two stages.

    Attributes:
        latency: Seconds one way, however small it is; 0 where that was not measured.
        seconds_per_byte: Seconds that each of its bytes takes besides.
    """

    latency: float
    seconds_per_byte: float


def measured(mailbox: Mailbox, peer: int, device: torch.device, *, first: bool) -> Link:
    """Measure the link to a rank that does the same at the same time; one of the two is the first to send."""
    messages = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (1, _BYTES))
    latency, whole = (_one_way(mailbox, peer, message, first) for message in messages)
    return Link(latency, max(0.0, whole - _LATENCIES * latency) / _BYTES)


def _one_way(mailbox: Mailbox, peer: int, message: torch.Tensor, first: bool) -> float:
    """Half the least time of a message to a peer and back: others may keep the processors busy at times."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        start = time.perf_counter()
        if first:
            mailbox.send(peer, PROBE, message)
        mailbox.take(peer, PROBE)
        if not first:
            mailbox.send(peer, PROBE, message)
        # What has been taken may still be on its way to the device.
        if message.device.type == "cuda":
            torch.cuda.synchronize(message.device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / 2
