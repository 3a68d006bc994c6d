"""Lightning's launchers, so that no process that one of them has started outlives a run that has failed or was stopped.

A process that hangs or is frozen cannot be told anything. Who has started it waits for it until the others have ended,
and kills it then. The process that has started the others as scripts may be frozen itself: they kill it when they end.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import ProcessExitedException
from typing_extensions import override

from lightning_ddg.plugin import compat, first_error

#: How long a process may go on after the run has failed in the one that has started it, in seconds.
GRACE = 10.0

#: How long a process whose failure is another's lets that one end first, in seconds.
GIVING_WAY = 5.0

STOPPED_BY_SIGTERM = 128 + signal.SIGTERM


class ScriptLauncher(compat.SubprocessScriptLauncher):  # type: ignore[misc]
    """Starts the other processes of this host as scripts; after a failure none of them is left behind.

    They are killed when the script ends, not before, as it may go on after an error, with all of its processes.
    """

    @override
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return super().launch(function, *args, **kwargs)
        except BaseException:
            if self.procs:
                atexit.register(kill_those_left, list(self.procs))
                # Lightning's watch over this list would kill this process too, before it has said why it ends.
                self.procs.clear()
            raise


class ForkLauncher(compat.MultiProcessingLauncher):  # type: ignore[misc]
    """Starts all processes by spawning or forking; SIGTERM, sent to the process that waits for them, reaches them.

    Attributes:
        failed: Whether a run has failed, in which case the process that waits has none of the weights.
    """

    failed = False

    @override
    def _wrapping_function(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._wrapping_function(*args, **kwargs)
        except BaseException as exception:
            # Lightning tells the strategy of what happens in the process that waits, not of what happens here.
            self._strategy.on_exception(exception)
            first_error.say_waited(exception)
            if first_error.is_told(exception):
                # The first process that ends decides which error is raised in the one that waits, which ends this one.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                threading.Event().wait(GIVING_WAY)
            raise

    @override
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._handing_on() as handed_on:
            try:
                return super().launch(function, *args, **kwargs)
            except Exception as exception:
                self.failed = True
                if handed_on:
                    raise SystemExit(STOPPED_BY_SIGTERM) from None
                if isinstance(exception, ProcessExitedException):
                    first_error.sign_exit(exception, self._strategy.num_stages, self._strategy.world_size)
                raise

    @contextmanager
    def _handing_on(self) -> Iterator[list[int]]:
        """Hand SIGTERM on to the processes, and note it, unless the program has a handler of its own."""
        noted: list[int] = []
        before = signal.getsignal(signal.SIGTERM)
        if before != signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
            yield noted
            return

        def hand_on(number: int, frame: object) -> None:
            noted.append(number)
            for process in self.procs:
                process.terminate()

        signal.signal(signal.SIGTERM, hand_on)
        try:
            yield noted
        finally:
            signal.signal(signal.SIGTERM, before)


def kill_if_stopped(process: int) -> None:
    """Give a process that has been stopped :data:`GRACE` seconds to go on or end, then kill it, saying so."""
    deadline = time.monotonic() + GRACE
    while _is_stopped(process):
        if time.monotonic() > deadline:
            _say(f"the process of local rank 0 (PID {process}) is stopped, and is killed.")
            os.kill(process, signal.SIGKILL)
            return
        time.sleep(0.1)


def _is_stopped(process: int) -> bool:
    """Return whether a process is stopped, as by SIGSTOP; not where the system does not say so."""
    try:
        # After the name of the program, in parentheses, comes the state.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _say(text: str) -> None:
    print(f"lightning_ddg: {text}", file=sys.stderr, flush=True)


def kill_those_left(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Give processes :data:`GRACE` seconds in all to end, then kill those that have not, saying so."""
    deadline = time.monotonic() + GRACE
    for rank, process in enumerate(processes, start=1):
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _say(
                f"the process of local rank {rank} (PID {process.pid}) has not ended within {GRACE:.0f} seconds after"
                " the failure of local rank 0, and is killed."
            )
            process.kill()
            process.wait()
