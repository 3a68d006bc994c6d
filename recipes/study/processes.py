"""Runs are shared out among processes here, some side by side; nothing is known here of what a run is.

A process does one run after the other, because starting one takes longer than a short epoch. It ends when the study
does, however that ends: then nobody is left at the other end of its pipe.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

Job = TypeVar("Job")


class RunError(RuntimeError):
    """A run has failed; the message has its process's traceback."""


def share_out(
    function: Callable[[Job], Any], jobs: Iterable[Job], processes: int, log: Path
) -> Iterator[tuple[Job, Any]]:
    """Calls a function with each job, in new processes.

    Args:
        function: Found by its name in the other process.
        jobs: Begun in this order; the next is asked for when a process is free.
        processes: How many run side by side.
        log: A file to which the processes write what they would print.

    Yields:
        A job and what the function returned, as soon as it has.

    Raises:
        RunError: If a run has failed, or its process has ended; those that ran beside it are given up too.
    """
    # Forked from one process that has imported what they need, which takes longer than a short run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    left = iter(jobs)
    doing: dict[Connection, Job] = {}
    crew: list[Any] = []
    try:
        for job in islice(left, processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function, str(log)))
            process.start()
            theirs.close()
            crew.append(process)
            doing[ours] = job
            ours.send(job)
        while doing:
            for connection in wait(list(doing)):
                assert isinstance(connection, Connection)
                job = doing.pop(connection)
                try:
                    value, error = connection.recv()
                except EOFError:
                    value, error = None, f"Its process has ended; {log} may say why."
                if error:
                    raise RunError(error)
                following = next(left, None)
                if following is None:
                    connection.close()
                else:
                    doing[connection] = following
                    connection.send(following)
                yield job, value
    finally:
        for process in crew:
            process.kill()
            process.join()


def _work(connection: Connection, function: Callable[[Any], Any], log: str) -> None:
    # What Lightning says of every fit would drown what the study says.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    jobs: SimpleQueue[Any] = SimpleQueue()

    def receive() -> None:
        while True:
            try:
                jobs.put(connection.recv())
            except (EOFError, OSError):
                os._exit(0)

    # In a thread of its own, so that an end of the study is noticed in the middle of a run.
    threading.Thread(target=receive, daemon=True).start()
    while True:
        job = jobs.get()
        try:
            answer = (function(job), None)
        except Exception:
            answer = (None, traceback.format_exc())
        connection.send(answer)
