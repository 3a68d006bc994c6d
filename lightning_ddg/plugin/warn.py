"""Which code is the user's: warnings name that line of it that led to them, none of this package's or Lightning's."""

from __future__ import annotations

import sys
import traceback
import warnings
from types import FrameType

from lightning_ddg.plugin.host import rank_zero_only

_NOT_THE_USERS = {
    "lightning",
    "lightning_ddg",
    "lightning_fabric",
    "lightning_utilities",
    "pytorch_lightning",
    "torch",
    *sys.stdlib_module_names,
}


def warn(message: str) -> None:
    """Warn in this process."""
    frame = _users_frame(sys._getframe(1))
    module, registry = frame.f_globals.get("__name__"), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, module, registry)


#: Warn in the process of rank 0 alone.
warn_on_rank_zero = rank_zero_only(warn)


def _users_frame(frame: FrameType) -> FrameType:
    """The innermost call of the user's that a frame is in; the outermost of all where there is none."""
    while frame.f_back is not None and not is_users(_module(frame)):
        frame = frame.f_back
    return frame


def raised_by_user(error: BaseException) -> bool:
    """Return whether a line of the user's has raised an exception, or called what did and is not written in Python."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and is_users(_module(frames[-1]))


def is_users(module: str) -> bool:
    """Return whether a module of that name is the user's program, or a library that it brings."""
    return module.partition(".")[0] not in _NOT_THE_USERS


def _module(frame: FrameType) -> str:
    # What is run by `python -m` is called `__main__`, but its spec knows better.
    spec = frame.f_globals.get("__spec__")
    name: str = frame.f_globals.get("__name__", "") if spec is None else spec.name
    return name
