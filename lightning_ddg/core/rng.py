"""Random numbers that depend on the run's seed, the stage and the batch, and on nothing else.

Two ranks that must draw alike (the user's step) get the same seed, two stages different ones; the streams outside, such
as the data loader's, go on as if nothing had been drawn. The seeds themselves come from
:func:`lightning_ddg.core.schedule.seed_of`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: torch.device, *, libraries: bool = False) -> Iterator[None]:
    """Seeds torch's generators (CPU and ``device``) inside, and restores them afterwards.

    Args:
        seed: The seed, ``0 <= seed < 2**63``.
        device: A device whose generator is seeded besides the CPU's.
        libraries: Also seed Python's ``random`` and NumPy.
    """
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    python, numpy = (random.getstate(), np.random.get_state(legacy=False)) if libraries else (None, None)
    try:
        torch.default_generator.manual_seed(seed)
        if cuda is not None:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        if python is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        if python is not None and numpy is not None:
            random.setstate(python)
            np.random.set_state(numpy)


class Draws:
    """The state of all generators, torch's, Python's and NumPy's, when this is made: where to begin again.

    Args:
        device: A device whose generator counts besides the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state = _states(device)

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Repeats inside what has been drawn since, and goes on afterwards as if nothing had been."""
        now = _states(self._device)
        _restore(self._state, self._device)
        try:
            yield
        finally:
            _restore(now, self._device)


def _states(device: torch.device) -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(legacy=False)


def _restore(states: tuple[Any, ...], device: torch.device) -> None:
    cpu, cuda, python, numpy = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
    random.setstate(python)
    np.random.set_state(numpy)
