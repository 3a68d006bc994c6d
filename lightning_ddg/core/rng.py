"""Random numbers that depend on the run's seed, the stage and the batch, and on nothing else.

Two ranks that must draw alike (the user's step) get the same seed, two stages different ones; the streams outside, such
as the data loader's, go on as if nothing had been drawn. All saving and restoring of generators is here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from lightning_ddg.core import numpy_state

_MASK = (1 << 64) - 1

TRAINING, EVALUATION = 0, 1
# No batch has this number.
_REPLICA = _MASK - 1


def seed_of(base: int, stage: int, batch: int, purpose: int = TRAINING, micro: int = 0) -> int:
    """Return the seed of the random draws of one stage for one batch, in ``0..2**63 - 1``.

    The mixing is the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), so that neighbouring batches and
    stages get unrelated streams.

    Args:
        base: The run's seed.
        stage: ``1..K``; 0 stands for the user's step outside the network, which every rank must draw alike.
        batch: The batch's number.
        purpose: ``TRAINING`` or ``EVALUATION``.
        micro: Which micro-batch of the batch; the first one draws what the whole batch would.
    """
    return _mixed(base, (stage, batch, purpose, *([micro] if micro else [])))


def seed_of_replica(base: int, replica: int) -> int:
    """Return the seed of one of several pipelines that train together; the first one's is the run's own."""
    return _mixed(base, (replica, _REPLICA)) if replica else base


def _mixed(base: int, values: Iterable[int]) -> int:
    state = base & _MASK
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 * (value + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class Batch(NamedTuple):
    """Which batch is computed, and what for: all that random draws depend on.

    Attributes:
        number: Counted through the run.
        purpose: ``TRAINING`` or ``EVALUATION``.
        seed: The run's; ``None`` leaves the generators to whoever seeds them.
        device: The device whose generator is seeded besides the CPU's.
        micro: Which of its micro-batches, where it is split.
    """

    number: int
    purpose: int = TRAINING
    seed: int | None = None
    device: torch.device = torch.device("cpu")
    micro: int = 0

    def draws(self, stage: int) -> AbstractContextManager[None]:
        """Seed the draws of a stage inside, those of Python and NumPy too; see :func:`seeded`."""
        return nullcontext() if self.seed is None else seeded(self._seed_of(stage), self.device, libraries=True)

    def begin_draws(self, stage: int) -> None:
        """Seed the draws of a stage from here on."""
        if self.seed is not None:
            _seed(self._seed_of(stage), self.device, libraries=True)

    def _seed_of(self, stage: int) -> int:
        return seed_of(cast(int, self.seed), stage, self.number, self.purpose, self.micro)


class Generators:
    """The RNG states of torch (CPU and ``device``) and, with ``libraries``, of Python and NumPy, when this is made."""

    def __init__(self, device: torch.device, *, libraries: bool = True) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._libraries: Any = (random.getstate(), numpy_state.read()) if libraries else None

    def restore(self) -> None:
        """Put the generators back into these states."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        if self._libraries is not None:
            python, numpy = self._libraries
            random.setstate(python)
            numpy_state.write(numpy)

    def unchanged(self) -> bool:
        """Return whether nothing has been drawn since."""
        now = Generators(self._device, libraries=self._libraries is not None)
        cuda = self._cuda is None or now._cuda is not None and torch.equal(self._cuda, now._cuda)
        return torch.equal(self._cpu, now._cpu) and cuda and _same(self._libraries, now._libraries)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Repeat inside what has been drawn since, and go on afterwards as if nothing had been."""
        with untouched(self._device, libraries=self._libraries is not None):
            self.restore()
            yield


class Streams:
    """The streams of random numbers of several stages that take turns: each goes on where it was left.

    Args:
        batch: Says how each stage's begins.
        watched: Whether it shall be known if anything is drawn.

    Attributes:
        drew: Whether anything was drawn from a stream that was left.
    """

    def __init__(self, batch: Batch, watched: bool = False) -> None:
        self._batch, self._watched = batch, watched
        self._entered: Generators | None = None
        self.drew = False
        self._left: dict[int, Generators] = {}
        self._stage: int | None = None

    def enter(self, stage: int) -> bool:
        """Draw a stage's numbers from here on; return whether another's were drawn before."""
        if stage == self._stage or self._batch.seed is None:
            return False
        self.leave()
        if stage in self._left:
            self._left[stage].restore()
        else:
            self._batch.begin_draws(stage)
        self._entered = Generators(self._batch.device) if self._watched else None
        self._stage = stage
        return True

    def leave(self) -> None:
        """Draw no stage's numbers from here on."""
        if self._stage is not None:
            self._left[self._stage] = Generators(self._batch.device)
            self.drew |= self._entered is not None and not self._entered.unchanged()
            self._stage = None


def _same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return one[0] == other[0] and numpy_state.same(one[1], other[1])


@contextmanager
def untouched(device: torch.device, *, libraries: bool = True) -> Iterator[None]:
    """Restore the generators afterwards; see :class:`Generators`."""
    before = Generators(device, libraries=libraries)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def seeded(seed: int, device: torch.device, *, libraries: bool = False) -> Iterator[None]:
    """Seed torch's generators (the CPU's and that of ``device``) inside, and restore them afterwards.

    ``seed`` is in ``0..2**63 - 1``; with ``libraries``, Python's ``random`` and NumPy are seeded too.
    """
    with untouched(device, libraries=libraries):
        _seed(seed, device, libraries=libraries)
        yield


def _seed(seed: int, device: torch.device, *, libraries: bool = False) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    if libraries:
        random.seed(seed)
        np.random.seed(seed % 2**32)
