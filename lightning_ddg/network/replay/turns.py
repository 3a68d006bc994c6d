"""A network that runs uncut draws as its stages do, which may take turns: each goes on where it was left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_ddg.core.rng import Batch, Generators, Streams, untouched
from lightning_ddg.network.replay.frames import in_checkpoint
from lightning_ddg.network.replay.module_calls import Handler, calls_left, calls_taken


class Turns:
    """Lets modules draw random numbers of their stages."""

    def __init__(self) -> None:
        self._again = ExitStack()

    @contextmanager
    def taken(self, called: Mapping[nn.Module, int], batch: Batch, watched: bool = False) -> Iterator[Streams]:
        """Let each module, when it is called inside, draw its stage's numbers, and so the code after it.

        Until :meth:`release`, a module that began a stage inside a checkpoint finds its numbers again in the backward.
        """
        streams, inside = Streams(batch, watched), False
        self.release()

        def call(module: nn.Module, stage: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal inside
            outer, inside = inside, True
            if not outer and streams.enter(stage) and in_checkpoint():
                again[module] = partial(_draw_again, module, Generators(batch.device))
            try:
                with calls_left(module):
                    return nn.Module.__call__(module, *args, **kwargs)
            finally:
                inside = outer

        again: dict[nn.Module, Handler] = {}
        handlers = {module: partial(call, module, stage) for module, stage in called.items()}
        with untouched(batch.device), calls_taken(handlers):
            streams.enter(1)
            yield streams
            if watched:
                streams.leave()
        self._again.enter_context(calls_taken(again))

    def release(self) -> None:
        """Leave the calls of modules as they were: no backward will follow."""
        self._again.close()


def _draw_again(module: nn.Module, draws: Generators, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module of a checkpoint; when that runs it again, it would not know that a stage began here."""
    if torch._C._current_autograd_node() is not None:
        draws.restore()
    with calls_left(module):
        return nn.Module.__call__(module, *args, **kwargs)
