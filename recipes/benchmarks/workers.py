"""Processes that are started once and then told what to run live here; what they run is none of this file's business.

The processes are connected by ``torch.distributed`` and found by Lightning as ranks that something else has
started. Every wait has a limit, and no process outlives the one that started it.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recipes.ports import held_port

#: What a message between processes may take; a contender that waits longer has failed.
TIMEOUT = timedelta(seconds=60)

# Forked from a server that has imported everything once, a process starts in milliseconds.
_context: Any = mp.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    _context.set_forkserver_preload(["lightning.pytorch", "lightning_ddg", "torch.distributed.pipelining"])


class WorkerError(RuntimeError):
    """A process failed, ended, or did not answer within the limit; the message says which and how."""


class Workers:
    """A set of connected processes; a context manager that leaves none behind.

    Args:
        size: How many.
        backend: Of ``torch.distributed``.

    Raises:
        ValueError: If ``size`` is below 1.
    """

    def __init__(self, size: int, backend: str = "gloo") -> None:
        if size < 1:
            raise ValueError(f"size={size}: there is nothing to run without processes; give 1 or more.")
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._held = contextlib.ExitStack()
        port = self._held.enter_context(held_port())
        for rank in range(size):
            ours, theirs = _context.Pipe()
            arguments = (theirs, rank, size, backend, port, str(self._log(rank)))
            process = _context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether they can still be asked."""
        return bool(self._processes)

    def ask(self, limit_s: float, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Runs a function in all processes at the same time.

        Args:
            limit_s: Seconds after which they are stopped.
            function: A module's function.
            *args: Its arguments, the same for each process.

        Returns:
            What it returned, by rank.

        Raises:
            WorkerError: If one fails, or at the limit; then all processes are stopped.
        """
        try:
            for connection in self._connections:
                connection.send((function, args))
            return self._answers(limit_s)
        except (WorkerError, OSError) as error:
            self.close()
            raise error if isinstance(error, WorkerError) else WorkerError(f"A process has ended: {error}") from error

    def _answers(self, limit_s: float) -> list[Any]:
        deadline = time.monotonic() + limit_s
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            missing: dict[Any, int] = {self._connections[r]: r for r in range(self.size) if r not in answers}
            ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkerError(
                    f"Worker {min(missing.values())} of {self.size} did not answer within {limit_s:g} s (a hang, or a"
                    f" machine too busy to measure on); all were stopped. Its last lines:\n"
                    f"{self._tail(min(missing.values()))}"
                )
            connection: Any
            for connection in ready:
                rank = missing[connection]
                try:
                    failed, answers[rank] = connection.recv()
                except EOFError:
                    self._processes[rank].join(5)
                    failed = f"ended with exit code {self._processes[rank].exitcode}"
                    answers[rank] = self._tail(rank)
                if failed:
                    raise WorkerError(
                        f"Worker {rank} of {self.size} {failed}; all were stopped. Set right what its last lines say:\n"
                        f"{answers[rank]}"
                    )
        return [answers[rank] for rank in range(self.size)]

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name, f"rank-{rank}.log")

    def _tail(self, rank: int) -> str:
        log = self._log(rank)
        return "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.exists() else ""

    def close(self) -> None:
        """Stops all processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        self._held.close()
        self._folder.cleanup()


class Crew:
    """Processes that are replaced after a failure; a context manager that leaves none behind.

    Args:
        size: How many.
        backend: Of ``torch.distributed``.
    """

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size, self.backend = size, backend
        self._workers = Workers(size, backend)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self._workers.close()

    def ask(self, limit_s: float, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As :meth:`Workers.ask`; after a failure new processes are asked."""
        if not self._workers.alive:
            self._workers = Workers(self.size, self.backend)
        return self._workers.ask(limit_s, function, *args)


def _serve(connection: Connection, rank: int, size: int, backend: str, port: int, log: str) -> None:
    """Runs in a worker: does what it is asked until nobody asks any more."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE=str(size),
    )
    torch.set_num_threads(1)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("", function(*args)))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the one who asked must know
            traceback.print_exc()
            connection.send(("failed", _explain(error)))


def _explain(error: BaseException) -> str:
    """The end of an exception's traceback, and in the last line what caused it."""
    lines = "".join(traceback.format_exception(error)).strip().splitlines()[-20:]
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    message = " ".join(str(cause).split())
    return "\n".join([*lines, f"{type(cause).__name__}: {message}"])


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
