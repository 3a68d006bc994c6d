"""A port of this machine that stays ours until somebody listens on it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Holds a free port, so that nobody else is given it before the ranks listen there.

    A port that was merely free a moment ago can be another process's by the time it is listened on. Here the socket
    stays bound and does not listen: the kernel hands a bound port to nobody who asks for any port, and lets
    who asks for this one by number listen, as ``torch.distributed`` does (it sets ``SO_REUSEADDR`` too).

    Yields:
        The port's number.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield int(holder.getsockname()[1])
