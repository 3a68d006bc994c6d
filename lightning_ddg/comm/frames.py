"""Frames: a message, or the beginning of a larger one, sent in one go into room that its receiver has made ahead.

gloo sends nothing before its receiver has said where to put it. Whoever posts a receive only when a header has said
what comes pays the way of that word for the header and again for what follows::

    posted when needed       ready -->          ready -->                 five latencies a message
                                   <-- header         <-- tensors
    posted ahead                   <-- header, tensors                    one

So the receives of the next few frames are always posted, each as large as the largest message so far, which both sides
have counted: no word is needed of how much room there is. What does not fit follows its frame, as much later as above.
"""

from __future__ import annotations

import sys
from collections import deque

import torch
from torch import Tensor

from lightning_ddg.comm.host_lane import FRAME, HostLane

#: How many receives are posted ahead: a stage sends a few messages a batch to a neighbour, and is two batches ahead.
AHEAD = 8
#: Room of the first frames, and by how much it grows, in bytes.
LEAST = 4096
#: Room is made for messages up to this size, in bytes; copying more would cost as much as it saves between near hosts.
MOST = 1 << 20
#: The same where stages have a slack: hosts are far apart then, and what does not fit holds up all that follows it.
MOST_FAR = 1 << 24

# What gloo uses elsewhere waits for as many bytes as there is room for.
_EXACT = sys.platform == "linux"


def receives_ahead(slack: int) -> int:
    """Return how many receives are posted ahead where a stage may be ``2 + slack`` batches ahead of the next."""
    return AHEAD // 2 * (2 + slack)


class Room:
    """The room that a receiver has made for the next frames of a sender, as each of the two counts it.

    The receive of frame i is posted when frame i - :func:`receives_ahead` has arrived: it is known then how large the
    messages up to that one were. The slack is the same on both sides.
    """

    def __init__(self, slack: int = 0) -> None:
        self._made = deque([LEAST] * receives_ahead(slack))
        self._most = MOST_FAR if slack else MOST

    @property
    def next(self) -> int:
        """Return the room for the next frame, in bytes."""
        return self._made[0]

    def count(self, size: int) -> int:
        """Count a message, of a size in bytes; return how much room is made in place of its frame's."""
        self._made.popleft()
        rounded = -(-size // LEAST) * LEAST if size <= self._most else LEAST
        self._made.append(max(self._made[-1], rounded))
        return self._made[-1]

    def frame(self, size: int) -> Tensor:
        """Return memory for the next frame of a size that there is room for: shape ``(size,)``, ``uint8``."""
        return torch.empty(size if _EXACT else self.next, dtype=torch.uint8)


class Arriving:
    """The frames that come from a rank, in their order."""

    def __init__(self, lane: HostLane, peer: int, slack: int) -> None:
        self._lane, self._peer, self._room = lane, peer, Room(slack)
        self._refused: RuntimeError | None = None
        self._posted = deque(self._post(torch.empty(LEAST, dtype=torch.uint8)) for _ in range(receives_ahead(slack)))

    def wait(self) -> Tensor:
        """Wait for the next frame; its memory is good until :meth:`count`.

        Raises:
            RuntimeError: If the connection has broken, and all that came before has been waited for.
        """
        if not self._posted and self._refused is not None:
            raise self._refused
        work, into = self._posted[0]
        self._lane.wait(work)
        return into

    def count(self, size: int) -> None:
        """Count the message of the frame that was waited for, and post the next receive."""
        _, into = self._posted.popleft()
        room = self._room.count(size)
        if self._refused is not None:
            return
        try:
            self._posted.append(self._post(into if into.numel() == room else torch.empty(room, dtype=torch.uint8)))
        except RuntimeError as error:
            # A rank that has said goodbye may have ended; its last words lie where receives were posted before.
            self._refused = error

    def _post(self, into: Tensor) -> tuple[object, Tensor]:
        return self._lane.post(into, self._peer, FRAME), into
