"""First error first: each rank's last line names the failure that came first, and only that one shows a traceback.

A failure ends all ranks, and each would print the whole way down to where it was told of it. Who reads the output looks
for the one traceback that matters, and at the end of it, which is where this says rank, stage and place.
"""

from __future__ import annotations

import signal
import sys
from itertools import chain
from traceback import walk_stack, walk_tb
from types import TracebackType
from typing import Any

from torch.multiprocessing.spawn import ProcessExitedException

from lightning_ddg.comm.mailbox import PeerError
from lightning_ddg.comm.ranks import name_of_rank
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import LightningModule, SIGTERMException, Trainer

_LONGEST = 600
_SAVING = {"save_checkpoint", "dump_checkpoint"}
_DOES = {
    "train": "while training",
    "validate": "while validating",
    "sanity_check": "in the sanity check",
    "test": "while testing",
    "predict": "while predicting",
}


def reason(rank: str, trainer: Trainer, exception: BaseException) -> str:
    """Return what the other ranks are told of a failure: whose, where, and which."""
    where = place(trainer, exception)
    if isinstance(exception, KeyboardInterrupt):
        return f"{rank} was interrupted by Ctrl-C {where}"
    if isinstance(exception, SIGTERMException):
        return f"{rank} was ended by SIGTERM {where}"
    text = f": {exception}" if str(exception) else ""
    return f"{rank} failed {where}, with {type(exception).__name__}{text}"


def place(trainer: Trainer, exception: BaseException) -> str:
    """Return where an exception comes from: the Trainer's loop or its set-up, and the hook that ran."""
    frames = chain(walk_stack(None), walk_tb(exception.__traceback__))
    functions = {frame.f_code.co_name for frame, _ in frames}
    if functions & _SAVING:
        where = "while saving a checkpoint"
    elif compat.RUNS_LOOPS not in functions:
        where = "in set-up"
    else:
        where = _DOES.get(str(getattr(trainer.state.stage, "value", "")), "in the Trainer's loop")
        if trainer.training:
            where += f" (epoch {trainer.current_epoch}, batch {trainer.fit_loop.batch_idx})"
    module: LightningModule | None = getattr(trainer.strategy, "lightning_module", None)
    hook = "" if module is None else compat.current_hook(module)
    return f"{where}, in `{hook}`" if hook else where


def sign(exception: BaseException, rank: str, first: str) -> None:
    """Let an exception that ends this rank say in its last line which rank this is, and what came first.

    What others have done to this rank needs no traceback: its line is printed at once, as whoever has started the
    processes may end this one as soon as the first has ended.

    Args:
        exception: The one that ends this rank.
        rank: The rank's name.
        first: The failure that came first, this rank's or another's.
    """
    _add_line(exception, one_line(first if first.startswith(rank) else f"{rank} ends: {first}"))


def sign_exit(exception: ProcessExitedException, num_stages: int, size: int) -> None:
    """Let the exception of who has started the processes say in its last line which of them has ended, and how."""
    rank, code = exception.error_index, exception.exit_code
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has left with exit code {code}"
    _add_line(exception, f"{name_of_rank(rank, num_stages, size)} {how}")


def _add_line(exception: BaseException, line: str) -> None:
    notes = getattr(exception, "__notes__", [])
    # A failure passes several places that tell of it.
    if line not in notes:
        exception.__notes__ = [*notes, line]
        # Python 3.10 shows no notes: the line is above the traceback there.
        if is_told(exception) or sys.version_info < (3, 11):
            print(line, file=sys.stderr, flush=True)


def say_waited(exception: BaseException) -> None:
    """Print the line of a rank that has given up waiting, where only one rank's traceback will be shown.

    Several ranks give up at the same time, each of its own.
    """
    if isinstance(exception, TimeoutError) and sys.version_info >= (3, 11):
        print(*getattr(exception, "__notes__", [])[-1:], file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """Return a text without line breaks, and not too long to be read."""
    joined = " ".join(text.split())
    return joined if len(joined) <= _LONGEST else f"{joined[:_LONGEST]} ..."


def silence_told() -> None:
    """Print no traceback where a program ends because another rank has failed; what is printed of others stays."""
    before = sys.excepthook
    if getattr(before, "_silences_told", False):
        return

    def hook(kind: type[BaseException], exception: BaseException, traceback: TracebackType | None) -> Any:
        if not is_told(exception):
            before(kind, exception, traceback)

    hook._silences_told = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def is_told(exception: BaseException) -> bool:
    """Return whether an exception says only what another rank has told of itself."""
    return type(exception) is PeerError
