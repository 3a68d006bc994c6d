"""Runs a case in processes of its own and judges how they end: all, in time, with the first error, and no remains."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from recipes.faults import hosts
from recipes.faults.cases import Case
from recipes.faults.program import STRUCK, TIMEOUT, VARIABLE
from recipes.ports import held_port

#: After the timeout, in seconds, all ranks that can still end have ended.
MORE = 10.0
#: Who has started a process that is frozen or hangs waits so long before killing it: this package, and torch.
KILLING = {"popen": 10.0, "spawn": 35.0, "fork": 35.0, "torchrun": 35.0, "hosts": 0.0}
#: Faults that nobody is told of: the others wait until the timeout.
SLOW = ("hang", "freeze", "cut")
#: The longest that a program may take to start, in seconds.
STARTING = 180.0
#: Prefixes of the names of files in the memory that processes share, and of folders for temporary files, of ours.
_OURS = ("torch_", "ddg", "lightning_ddg")


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        case: The case.
        seconds: From the fault to the end of the last process; ``None`` if one had to be killed.
        code: The exit code of the program that was started; what a shell shows for one that was ended by a signal.
        told: Whether the output names the fault and the rank that it came to.
        ranks: Whether each of the other ranks has said why it ends.
        tracebacks: How many the output has.
        left: What is left: processes, and files of ours.
        output: All that was printed.
    """

    case: Case
    seconds: float | None
    code: int | None
    told: bool
    ranks: bool
    tracebacks: int
    left: tuple[str, ...]
    output: str

    @property
    def misses(self) -> list[str]:
        """What is not as it should be."""
        case, missed = self.case, []
        slow = case.fault in SLOW
        limit = MORE + (TIMEOUT + KILLING[case.launcher] if slow else 0)
        if self.seconds is None:
            missed.append("did not end")
        elif self.seconds > limit:
            missed.append(f"took {self.seconds:.0f} s, more than {limit:.0f}")
        # What gets a signal when its work is done may end as if nothing had happened, or by the signal, without a word.
        late = case.fault in ("sigterm", "sigint") and "\ntrained" in self.output
        # The process that was started has left by itself.
        left = case.fault == "exit" and case.launcher == "popen" and case.rank == 0
        if not self.code and not late and not left:
            missed.append(f"exit code {self.code}")
        if not self.told and not late:
            missed.append("the first error is not seen")
        if not self.ranks:
            missed.append("a rank does not say why it ends")
        # Who starts processes by spawning raises the error of one of them again; those who time out do so each.
        if self.tracebacks > (case.stages if slow else 2):
            missed.append(f"{self.tracebacks} tracebacks")
        return [*missed, *(f"left: {name}" for name in self.left)]


def run(case: Case, folder: Path) -> Outcome:
    """Runs a case.

    Args:
        case: The case.
        folder: For its files; what is in it is deleted.
    """
    shutil.rmtree(folder, ignore_errors=True)
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    mark = json.dumps({**asdict(case), "folder": str(folder)})
    environment = {**os.environ, VARIABLE: mark, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    before = _shared_memory()
    lines: list[bytes] = []
    struck = folder / STRUCK
    with held_port() as port:
        program = subprocess.Popen(
            command(case, port),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        # Through a pipe, which no limit of the size of files holds for, and read as long as anybody writes.
        reader = threading.Thread(target=lambda: lines.extend(program.stdout or ()), daemon=True)
        reader.start()
        _until(lambda: struck.exists() or program.poll() is not None, STARTING)
    at = float(struck.read_text() or time.monotonic()) if struck.exists() else time.monotonic()
    ended = _until(
        lambda: program.poll() is not None and not processes(mark), TIMEOUT + MORE + KILLING[case.launcher] + 15
    )
    seconds = time.monotonic() - at if ended else None
    alive = processes(mark)
    for process in alive:
        os.kill(process, signal.SIGKILL)
    code = program.wait()
    reader.join(10)
    output = b"".join(lines).decode(errors="replace")
    left = [f"process {process}" for process in alive]
    left += [f"/dev/shm/{name}" for name in sorted(_shared_memory() - before) if name.startswith(_OURS)]
    left += [path.name for path in (folder / "checkpoints").glob(".*.part") if case.fault not in ("kill", "exit")]
    left += [path.name for path in temporary.iterdir() if path.name.startswith(_OURS)]
    return Outcome(
        case=case,
        seconds=seconds,
        code=128 - code if code < 0 else code,
        told=struck.exists() and told(case, output),
        # In `teardown` they have parted already.
        ranks=case.place == "teardown"
        or all(_speaks(case, rank, output) for rank in range(case.stages) if rank != case.rank),
        tracebacks=len(re.findall(r"^(?:\[rank\d\]: )?Traceback \(most recent", output, re.MULTILINE)),
        left=tuple(left),
        output=output,
    )


def command(case: Case, port: int) -> list[str]:
    """The command line that starts a case; its ranks find each other at a port."""
    module = ["-m", "recipes.faults.program"]
    if case.launcher == "hosts":
        return hosts.start(sys.executable, "-m", "recipes.faults.hosts")
    if case.launcher != "torchrun":
        return [sys.executable, *module]
    started = ["--nproc-per-node", str(case.stages), "--master-port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *started, *module]


def told(case: Case, output: str) -> bool:
    """Whether an output says what has happened, and to whom."""
    name = re.escape(case.name)
    if case.place == "teardown" and case.fault != "raise":
        # Of a process that has parted from the others nobody tells but who has started it.
        return True
    words = {
        "raise": rf"{name} failed .* with ArithmeticError: bang",
        "hang": rf"waited 0:00:{TIMEOUT:02d} for .*{name}",
        "freeze": rf"waited 0:00:{TIMEOUT:02d} for .*{name}",
        "cut": rf"waited 0:00:{TIMEOUT:02d} for .*{name}",
        "kill": rf"{name} is gone",
        "exit": rf"{name} is gone",
        # Before Lightning handles signals, this one ends a process without a word.
        "sigterm": rf"SIGTERM came to rank {case.rank}\b|{name} was ended by SIGTERM|{name} is gone",
        "sigint": rf"Ctrl-C came to rank {case.rank}\b|{name} was interrupted by Ctrl-C",
        "full disk": rf"{name} failed while saving a checkpoint.* could not be written",
    }
    return re.search(words[case.fault], output) is not None


def _speaks(case: Case, rank: int, output: str) -> bool:
    """Whether a rank to which nothing has happened says why it ends; those that a signal ends together need not."""
    together = case.fault in ("sigterm", "sigint")
    return together or re.search(rf"Rank {rank} \(stage {case.stages - rank}\) (ends|failed)", output) is not None


def processes(mark: str) -> list[int]:
    """The processes of a case that are alive, by the variable that each of them has inherited."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and f"{VARIABLE}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _until(condition: object, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
