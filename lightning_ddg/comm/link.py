"""How long a message takes from one stage to the next: measured between two ranks, or a figure to plan with.

Only the measuring lives here; how messages travel is the business of :mod:`~lightning_ddg.comm.mailbox`.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from lightning_ddg.comm.mailbox import GroupMailbox
from lightning_ddg.core.execution import Channel

PROBE = Channel("probe")
_BYTES = 4 << 20
_ROUNDS = 5


def measure_link(transport: GroupMailbox, peer: int, device: torch.device, *, first: bool) -> float:
    """Send a tensor of 4 MiB to a peer and back, a few times; both ranks call it at the same time.

    Args:
        transport: Connects the ranks.
        peer: The other rank.
        device: Where this rank's tensors are.
        first: Whether this rank sends first.

    Returns:
        Seconds per byte, one way: half the median round, without the first one.
    """
    message = torch.zeros(_BYTES, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(1 + _ROUNDS):
        start = time.perf_counter()
        if first:
            transport.send(peer, PROBE, message)
        transport.take(peer, PROBE)
        if not first:
            transport.send(peer, PROBE, message)
        # What has been taken may still be on its way to the device.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:]) / 2 / _BYTES
