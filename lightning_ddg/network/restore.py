"""Running a user's code without a trace in the modules: what is put back afterwards may be extended here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@contextmanager
def untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back the modules' buffers, their plain attributes (counters, flags) and their random generators."""
    undo = [function for module in dict.fromkeys(modules) for function in (_buffers(module), *_attributes(module))]
    try:
        yield
    finally:
        with torch.no_grad():
            for function in undo:
                function()


def _buffers(module: nn.Module) -> Callable[[], None]:
    table = module._buffers
    saved = {name: (value, None if value is None else value.detach().clone()) for name, value in table.items()}

    def undo() -> None:
        # A forward may also have bound another tensor to the name, or added a name.
        table.clear()
        for name, (buffer, value) in saved.items():
            table[name] = buffer
            if buffer is not None and value is not None:
                buffer.copy_(value)

    return undo


def _attributes(module: nn.Module) -> Iterator[Callable[[], object]]:
    held = vars(module)
    plain = {name: value for name, value in held.items() if type(value) in _PLAIN}
    yield partial(held.update, plain)
    for value in held.values():
        if isinstance(value, np.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
