"""Two hosts on one machine: two network namespaces joined by a cable, with one process of the program in each.

::

    namespace A: program, NODE_RANK=0                namespace B: program, NODE_RANK=1
    ddg0 10.77.0.1 <---------- a veth pair ----------> ddg1 10.77.0.2

``python -m recipes.faults.hosts`` is started in a user namespace, where it may make them, by :func:`start`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from recipes.faults.cases import Case

_PORT = 29501
#: The longest that making a namespace, or an address in it, may take, in seconds.
_LIMIT = 20.0
#: What may happen to a process of two hosts: who has started a program by hand on each of them kills nobody.
FAULTS = ("raise", "kill", "exit", "cut")


def cases(first: int) -> Iterator[Case]:
    """All cases of two hosts, numbered from a number on."""
    for number, (fault, stage) in enumerate(((fault, stage) for fault in FAULTS for stage in (1, 2)), first):
        yield Case(number, "hosts", 2, fault, "on_train_batch_start", stage)


def start(*command: str) -> list[str]:
    """A command line that runs another where it may make namespaces."""
    return ["unshare", "--user", "--map-root-user", "--net", *command]


def why_not() -> str | None:
    """Why this machine does not allow it; ``None`` if it does."""
    try:
        with_cable = start("ip", "link", "add", "name", "ddg0", "type", "veth", "peer", "name", "ddg1")
        done = subprocess.run(with_cable, capture_output=True, text=True, timeout=_LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() if done.returncode else None


def cut() -> None:
    """Pulls the cable out, at this end, whichever it is."""
    for name in ("ddg0", "ddg1"):
        subprocess.run(["ip", "link", "set", name, "down"], capture_output=True, timeout=_LIMIT)


@contextmanager
def cable() -> Iterator[list[str]]:
    """Joins this namespace with a new one; gives the words before a command that let it run in that."""
    inside = subprocess.Popen(["unshare", "--net", "sleep", "3600"])
    try:
        there = ["nsenter", "--target", str(inside.pid), "--net"]
        deadline = time.monotonic() + _LIMIT
        while os.readlink(f"/proc/{inside.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no namespace within {_LIMIT} s")
            time.sleep(0.05)
        _ip("link add name ddg0 type veth peer name ddg1 netns", str(inside.pid))
        for words, name, address in (([], "ddg0", "10.77.0.1/24"), (there, "ddg1", "10.77.0.2/24")):
            _ip("addr add", address, "dev", name, before=words)
            _ip("link set", name, "up", before=words)
            _ip("link set lo up", before=words)
        yield there
    finally:
        inside.kill()
        inside.wait()


def _ip(words: str, *more: str, before: list[str] | None = None) -> None:
    subprocess.run([*(before or []), "ip", *words.split(), *more], check=True, timeout=_LIMIT)


def main() -> int:
    """Runs the program on both hosts; returns the exit code of the first that failed."""
    with cable() as there:
        programs = []
        for rank, words in enumerate(([], there)):
            node = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(_PORT), "NODE_RANK": str(rank)}
            command = [*words, sys.executable, "-m", "recipes.faults.program"]
            programs.append(subprocess.Popen(command, env={**os.environ, **node}))
        codes = [program.wait() for program in programs]
    return next((abs(code) for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
