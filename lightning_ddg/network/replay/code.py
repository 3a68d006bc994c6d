"""The code that stages run: a network's forward, or a whole training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Function = Callable[..., Any]


@dataclass(frozen=True)
class Code:
    """The code that stages run.

    Attributes:
        label: What it is, for messages.
        whole: Runs all of it, or its last part.
        part: Runs it where it ends before its last part, so that what it says to the outside is of no use.
        observed: Runs it to be watched; what it says to the outside is part of what it returns.
        remedy: What to do about what no stage can know.
        keeps: Whether it may leave something in attributes for its next run, as every stage's process then does.
        runs_on: Whether every stage shall go on to the end.
    """

    label: str
    whole: Function
    part: Function
    observed: Function
    remedy: str = "Cut elsewhere (`split_points`), or return the network's layers from `configure_stages()`."
    keeps: bool = False
    runs_on: bool = False


def forward_of(target: nn.Module) -> Code:
    """Return the forward of a network."""
    forward = target.forward
    return Code(f"The forward of {type(target).__name__}", forward, forward, forward)
