"""Lightning's launchers, so that no process that one of them has started outlives a run that has failed or was stopped.

A process that hangs or is frozen cannot be told anything. Who has started it waits for it until the others have ended,
and kills it then.
"""

from __future__ import annotations

import atexit
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

from lightning_ddg.plugin import compat

#: How long a process may go on after the run has failed in the one that has started it, in seconds.
GRACE = 10.0

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
                atexit.register(kill_those_left, self.procs)
            raise


class ForkLauncher(compat.MultiProcessingLauncher):  # type: ignore[misc]
    """Starts all processes by spawning or forking; SIGTERM, sent to the process that waits for them, reaches them.

    Attributes:
        failed: Whether a run has failed, in which case the process that waits has none of the weights.
    """

    failed = False

    @override
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._handing_on() as handed_on:
            try:
                return super().launch(function, *args, **kwargs)
            except Exception:
                self.failed = True
                if handed_on:
                    raise SystemExit(STOPPED_BY_SIGTERM) from None
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


def kill_those_left(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Give processes :data:`GRACE` seconds in all to end, then kill those that have not, saying so."""
    deadline = time.monotonic() + GRACE
    for rank, process in enumerate(processes, start=1):
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(
                f"lightning_ddg: the process of local rank {rank} (PID {process.pid}) has not ended within {GRACE:.0f}"
                " seconds after the failure of local rank 0, and is killed.",
                file=sys.stderr,
                flush=True,
            )
            process.kill()
            process.wait()
