"""Validation, test and predict steps, run in stages with today's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from torch import Tensor, nn

from lightning_ddg.core.execution import Execution
from lightning_ddg.core.rng import Batch
from lightning_ddg.plugin.redirection import Redirection


class Outside(Enum):
    """Whether all ranks have the weights outside the network as the last stage's process trains them."""

    SHARED = "shared"
    TRAINED = "trained"


class Evaluation:
    """Runs evaluation steps.

    Modules outside the network train on the last stage's process, and every rank evaluates with its weights. These are
    given to all when a validation starts, and once more before its first batch: a callback may have exchanged them, for
    their average, in between.

    Args:
        execution: Answers the network's calls.
        redirection: Sends them here.
        next_batch: Makes the context of the next evaluated batch.
        share: Gives all ranks rank 0's parameters and buffers outside the network, those that ``wanted`` says.
    """

    def __init__(
        self,
        execution: Execution,
        redirection: Redirection,
        next_batch: Callable[[], Batch],
        share: Callable[[Callable[[Tensor], bool]], None],
    ) -> None:
        self._execution, self._redirection = execution, redirection
        self._next_batch, self._share = next_batch, share
        self._outside = Outside.SHARED

    def begin(self) -> None:
        """Called when a validation starts; every rank must."""
        self._share(_trained_or_buffer)
        self._outside = Outside.TRAINED
        # A callback may exchange the weights for the validation.
        self._execution.before_step()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Answer the network's calls inside, which may be several: for the sake of random draws, each is a batch."""
        if self._outside is Outside.TRAINED:
            self._share(_trained_or_buffer)
            self._outside = Outside.SHARED
        with self._next_batch().draws(0, libraries=True), self._redirection.handled_by(self._answer):
            yield

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._execution.evaluate(self._next_batch(), args, kwargs)


def _trained_or_buffer(tensor: Tensor) -> bool:
    return tensor.requires_grad or not isinstance(tensor, nn.Parameter)
