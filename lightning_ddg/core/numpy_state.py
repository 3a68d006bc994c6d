"""The state of NumPy's global generator, read and written in microseconds; NumPy's own way takes 0.1 ms each.

A stage's draws are seeded several times a batch. The generator's memory is copied as it lies, through NumPy's public
interface for other languages. Beside it NumPy keeps every second normal number that it has drawn: whether there is
one is found by drawing it, as that leaves the generator as it is.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

#: 624 words and the position among them.
_BYTES = 625 * 4

# NumPy's type hints know less of it than its documentation.
_random: Any = np.random

State = bytes | dict[str, Any]


def read() -> State:
    """Return the state, for :func:`write` and :func:`same`."""
    address = _address()
    if address is None:
        return _in_full()
    memory = ctypes.string_at(address, _BYTES)
    normal = np.random.standard_normal()
    if ctypes.string_at(address, _BYTES) != memory:
        write(memory)
        return memory
    state = {**_in_full(), "has_gauss": 1, "gauss": normal}
    np.random.set_state(state)
    return state


def write(state: State) -> None:
    """Put the generator into a state that has been read.

    Raises:
        ValueError: If it is of another kind now.
    """
    if isinstance(state, dict):
        np.random.set_state(state)
        return
    address = _address()
    if address is None:
        raise ValueError(
            "NumPy's global generator has been exchanged (`np.random.set_bit_generator`) inside a step, which draws"
            " from the one there was. Exchange it before the fit."
        )
    ctypes.memmove(address, state, _BYTES)
    # Forgets a normal number that is kept.
    _random.set_bit_generator(_random.get_bit_generator())


def same(one: State, other: State) -> bool:
    """Return whether two states are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    return bool(np.all(one == other))


def _in_full() -> dict[str, Any]:
    return dict(np.random.get_state(legacy=False))


def _address() -> int | None:
    """Where the generator's memory is; ``None`` where it is another kind of generator, or NumPy is before 1.24."""
    if not hasattr(_random, "get_bit_generator"):
        return None
    generator = _random.get_bit_generator()
    return int(generator.ctypes.state_address) if isinstance(generator, np.random.MT19937) else None
