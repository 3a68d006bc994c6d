"""Tests of the state of NumPy's generator: nothing that it holds is lost, and what is read is NumPy's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from lightning_ddg.core import numpy_state

DRAWS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "a number": np.random.rand,
    "a normal number, whose twin is kept": np.random.randn,
    "two normal numbers": lambda: np.random.randn(2),
    "enough for a new table": lambda: np.random.rand(1000),
    "a seed": lambda: np.random.seed(7),
}


@pytest.fixture(autouse=True)
def _generator() -> Iterator[None]:
    before, state = np.random.get_bit_generator(), np.random.get_state(legacy=False)
    np.random.seed(3)
    yield
    np.random.set_bit_generator(before)
    np.random.set_state(state)


def numbers() -> list[float]:
    return [*np.random.randn(3), np.random.rand()]


@pytest.mark.parametrize("inside", DRAWS)
@pytest.mark.parametrize("before", DRAWS)
def test_what_is_drawn_afterwards_is_what_would_have_been(before: str, inside: str) -> None:
    DRAWS[before]()
    whole = np.random.get_state(legacy=False)
    expected = numbers()
    np.random.set_state(whole)
    state = numpy_state.read()
    assert numpy_state.same({"": np.random.get_state(legacy=False)}, {"": whole}), "reading changes nothing"
    DRAWS[inside]()
    assert numpy_state.same(numpy_state.read(), state) == (inside == "nothing" or inside == before == "a seed")
    numpy_state.write(state)
    assert numpy_state.same({"": np.random.get_state(legacy=False)}, {"": whole})
    assert numbers() == expected


def test_a_kept_normal_number_is_part_of_the_state() -> None:
    """The generator's memory is the same after one normal number and after two, as they are drawn in pairs."""
    np.random.randn(2)
    two = numpy_state.read()
    np.random.seed(3)
    np.random.randn()
    assert not numpy_state.same(numpy_state.read(), two)


def test_of_other_generators_the_whole_state_is_read() -> None:
    np.random.set_bit_generator(np.random.PCG64(1))
    state = numpy_state.read()
    expected = numbers()
    numpy_state.write(state)
    assert numbers() == expected


def test_a_generator_that_is_exchanged_inside_is_an_error() -> None:
    state = numpy_state.read()
    np.random.set_bit_generator(np.random.PCG64(1))
    with pytest.raises(ValueError, match=r"has been exchanged \(`np.random.set_bit_generator`\) inside a step"):
        numpy_state.write(state)
