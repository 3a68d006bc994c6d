"""Runs a function on several real processes, as ranks that Lightning finds already started; every wait has a limit.

The processes are forked from a server that has imported Lightning once, so that a rank costs milliseconds instead of
seconds. Only what all tests of several processes need may be added here.
"""

from __future__ import annotations

import functools
import io
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from recipes.ports import held_port

ROOT = Path(__file__).parents[1]

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["tests", "lightning.pytorch", "lightning_ddg", "tests.networks"])


@dataclass
class RankResult:
    """How one rank ended: what it returned, or the text of its exception, and its exit code."""

    value: Any
    error: str | None
    exitcode: int | None


def environment(*folders: str | Path, **variables: Any) -> dict[str, str]:
    """What a Python that a test starts needs, if it runs no recipe: the checkout, one thread, :mod:`sitecustomize`."""
    path = os.pathsep.join(map(str, [ROOT / "tests" / "interpreter", ROOT, *folders]))
    known = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return {**known, **{name: str(value) for name, value in variables.items()}}


def _rank_main(pipe: Any, function: Callable[..., Any], rank: int, world_size: int, port: int, args: Any) -> None:
    torch.set_num_threads(1)
    # A child of the server has the server's start method: loaders' workers would import Lightning for seconds.
    mp.set_start_method("fork", force=True)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world_size)
    )
    try:
        value, error = function(*args), None
    except BaseException as caught:  # noqa: BLE001 - reported to the test, which decides
        value, error = None, "".join(traceback.format_exception(caught))
    # As bytes: a tensor sent through a pipe would live in memory that dies with this process.
    buffer = io.BytesIO()
    torch.save((value, error), buffer)
    pipe.send_bytes(buffer.getvalue())
    pipe.close()
    if error is not None:
        raise SystemExit(1)


@functools.cache
def _start_server() -> None:
    """Waits for the server's imports, so that they do not count as a test's time."""
    first = _context.Process(target=int)
    first.start()
    first.join(120.0)


def run_ranks_raw(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0
) -> list[RankResult]:
    """Runs ``function(*args)`` on ``world_size`` ranks; ``function`` must be importable and its value must pickle.

    Raises:
        TimeoutError: If a rank has not ended in time; all are killed first.
    """
    _start_server()
    with held_port() as port:
        return _run_ranks_at(port, function, world_size, args, timeout)


def _run_ranks_at(
    port: int, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], timeout: float
) -> list[RankResult]:
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank_main, args=(sender, function, rank, world_size, port, args))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    deadline = time.monotonic() + timeout
    results: dict[int, tuple[Any, str | None]] = {}
    waiting = dict(enumerate(pipes))
    while waiting and time.monotonic() < deadline:
        for ready in wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic())):
            rank = pipes.index(ready)
            try:
                results[rank] = torch.load(io.BytesIO(ready.recv_bytes()), weights_only=False)
            except EOFError:
                results[rank] = (None, "the process ended without a word")
            del waiting[rank]
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    if late or waiting:
        known = {rank: error for rank, (_, error) in results.items()}
        raise TimeoutError(f"ranks {late or sorted(waiting)} had not ended after {timeout} s; others: {known}")
    return [
        RankResult(*results[rank], exitcode=process.exitcode)  # type: ignore[misc]
        for rank, process in enumerate(processes)
    ]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Like :func:`run_ranks_raw`, but fails with the first rank's error and returns the values only."""
    results = run_ranks_raw(function, world_size, *args, timeout=timeout)
    for rank, result in enumerate(results):
        assert result.error is None, f"rank {rank} failed:\n{result.error}"
    return [result.value for result in results]
