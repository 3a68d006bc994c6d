"""Where in the user's code something happened, for messages."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def line_of(error: BaseException) -> str:
    """Return ``file:line: `code` (what is wrong)`` of the user's line where an error came from."""
    problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    line = _innermost(reversed([(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]))
    return f"{line} ({problem})" if line else problem


def line_now() -> str:
    """Return ``file:line: `code``` of the user's line that is running."""
    return _innermost((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None))


def _innermost(frames: Iterable[tuple[str, int]]) -> str:
    """The innermost line that is the user's; frames come innermost first."""
    for file, line in frames:
        if not file.startswith(_NOT_THE_USERS) and Path(file).is_file():
            return f"{file}:{line}: `{linecache.getline(file, line).strip()}`"
    return ""
