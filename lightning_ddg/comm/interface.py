"""Which network interface gloo listens on, where it would choose one that no other host can reach.

gloo asks what address the host's own name has. On Debian and others that is a loopback address, so that ranks of two
hosts never find each other. The interface by which the host reaches the master is reached by the others as well.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def choose_interface(master: str) -> None:
    """Set ``GLOO_SOCKET_IFNAME`` if it is not set and gloo would listen on a loopback address, though others need not.

    Args:
        master: The host name or address of the process of rank 0.

    Raises:
        RuntimeError: The interface cannot be found; the message names the variable.
    """
    if os.environ.get(VARIABLE) or _is_loopback(master) or not _is_loopback(socket.gethostname()):
        return
    name = interface_to(master)
    if name is None:
        raise RuntimeError(
            f"This host's name, {socket.gethostname()!r}, has a loopback address, which the host of rank 0,"
            f" {master!r}, cannot reach, and no interface of this host was found that leads there. Set the environment"
            f" variable {VARIABLE} to the interface that does (`ip address` lists them) on every host."
        )
    os.environ[VARIABLE] = name


def interface_to(address: str) -> str | None:
    """Return the name of the interface by which this host reaches another one, or itself; ``None`` if it is unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: the system only chooses the way.
            probe.connect((address, 9))
            own = probe.getsockname()[0]
        except OSError:
            return None
        return next((name for _, name in socket.if_nameindex() if _address_of(name, probe) == own), None)


def _address_of(name: str, probe: socket.socket) -> str | None:
    if not sys.platform.startswith("linux"):
        return None
    from fcntl import ioctl

    try:
        answer = ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return None
    return socket.inet_ntoa(answer[20:24])


def _is_loopback(host: str) -> bool:
    """Whether a host has no address but loopback ones; one that is unknown has none."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return True
    return all(address.startswith("127.") or address == "::1" for address in found)
