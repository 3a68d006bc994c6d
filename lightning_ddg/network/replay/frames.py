"""Which of torch's own code the network's is called from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FrameType

import torch.utils.checkpoint

_CHECKPOINT = torch.utils.checkpoint.__file__


def in_checkpoint() -> FrameType | None:
    """Return the outermost call of ``torch.utils.checkpoint`` that this is in, which runs its code again later."""
    calls = [frame for code, frame in _stack() if code.co_name == "checkpoint" and code.co_filename == _CHECKPOINT]
    return calls[-1] if calls else None


def _stack() -> Iterator[tuple[CodeType, FrameType]]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame.f_code, frame
        frame = frame.f_back
