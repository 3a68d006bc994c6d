"""Tests of ``rng.py``: seeded draws repeat themselves, and the streams outside go on as if nothing had been drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_ddg.core.rng import Generators, seeded

CPU = torch.device("cpu")


def draw() -> tuple[Any, ...]:
    return torch.rand(3).tolist(), torch.randn(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn()


def seed_all() -> None:
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    # One of a pair is drawn, so that the cached other one is part of the state.
    torch.randn(1)
    random.gauss(0, 1)
    np.random.randn()


def draw_and_fail() -> None:
    with seeded(5, CPU, libraries=True):
        draw()
        raise ArithmeticError


@pytest.mark.parametrize("fails", [False, True])
def test_all_generators_go_on_as_if_nothing_had_been_drawn(fails: bool) -> None:
    seed_all()
    expected = draw()
    seed_all()
    if fails:
        with pytest.raises(ArithmeticError):
            draw_and_fail()
    else:
        with seeded(5, CPU, libraries=True):
            draw()
    assert draw() == expected


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 5, 2**63 - 1])
def test_draws_depend_on_the_seed_alone(seed: int) -> None:
    with seeded(seed, CPU, libraries=True):
        first = draw()
    draw()
    with seeded(seed, CPU, libraries=True):
        assert draw() == first
    with seeded(seed ^ 1, CPU, libraries=True):
        other = draw()
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_libraries_are_left_alone_unless_asked_for() -> None:
    seed_all()
    expected = draw()[2:]
    seed_all()
    with seeded(5, CPU):
        inside = draw()[2:]
    assert inside == expected


def test_the_runs_seed_is_still_known() -> None:
    torch.manual_seed(123)
    with seeded(5, CPU):
        assert torch.initial_seed() == 5
    assert torch.initial_seed() == 123


def test_nesting() -> None:
    with seeded(1, CPU):
        expected = torch.rand(4).tolist()
    with seeded(1, CPU):
        first = torch.rand(2).tolist()
        with seeded(2, CPU):
            torch.rand(7)
        assert first + torch.rand(2).tolist() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_devices_generator_too() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.manual_seed(3)
    before = torch.cuda.get_rng_state(device)
    with seeded(5, device):
        first = torch.rand(3, device=device).tolist()
    assert torch.equal(torch.cuda.get_rng_state(device), before)
    with seeded(5, device):
        assert torch.rand(3, device=device).tolist() == first


@pytest.mark.parametrize(
    ("one_draw", "seen"),
    [
        (lambda: torch.rand(1), (True, True)),
        (random.random, (True, False)),
        (lambda: np.random.rand(1), (True, False)),
        (lambda: random.gauss(0, 1), (True, False)),
        (lambda: None, (False, False)),
    ],
)
def test_whether_something_has_been_drawn_can_be_told(one_draw: Callable[[], object], seen: tuple[bool, bool]) -> None:
    for libraries, drawn in zip((True, False), seen, strict=True):
        before = Generators(CPU, libraries=libraries)
        one_draw()
        assert before.unchanged() is not drawn
        before.restore()
        assert before.unchanged()
