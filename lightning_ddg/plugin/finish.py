"""The synchronous finish: from which batch on no gradient is stale, the same on every rank.

Lightning knows a fit's length by steps, by epochs, or by both; whichever ends it first decides. What it depends on, the
steps and batches so far and the lengths of loaders, is the same on every rank, and in a fit that was resumed.
"""

from __future__ import annotations

from math import ceil, isinf

from lightning_ddg.core.execution import Execution
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.drain import Drain
from lightning_ddg.plugin.host import Trainer


def last_ones(part: float, total: int) -> int:
    """Return how many of ``total`` batches or steps are the last ``part``, in 0..1, rounded up.

    >>> [last_ones(0.1, total) for total in (30, 31, 5)], last_ones(1.0, 7)
    ([3, 4, 1], 7)
    """
    # 0.1 * 30 is a little more than 3.
    return ceil(round(part * total, 6))


def is_last_part(trainer: Trainer, part: float, batch_idx: int) -> bool:
    """Return whether the batch of that index in this epoch is one of the last ``part`` of a fit."""
    steps, epochs, batches = trainer.max_steps, trainer.max_epochs, trainer.num_training_batches
    if steps != -1 and steps - trainer.global_step <= last_ones(part, steps):
        return True
    if epochs is None or epochs == -1 or isinf(batches):
        return False
    left = (epochs - trainer.current_epoch) * int(batches) - batch_idx
    return left <= last_ones(part, epochs * int(batches))


def check_length(trainer: Trainer, part: float) -> None:
    """Refuse a fit whose length nobody knows.

    Raises:
        ValueError: Naming the Trainer's options.
    """
    endless = trainer.max_epochs is None or trainer.max_epochs == -1
    if trainer.max_steps == -1 and (endless or isinf(trainer.num_training_batches)):
        what = f"max_epochs={trainer.max_epochs}" if endless else "a training loader without a length"
        raise ValueError(
            f"finish={part} makes the last part of a fit synchronous, but with max_steps=-1 and {what} nobody knows how"
            " long this fit is. Give the Trainer `max_steps`, or `max_epochs` and a loader that has a length."
        )


class Finish:
    """Empties the pipeline before the last part of a fit, and has every batch of that flushed before its step.

    Args:
        part: How much of the fit is synchronous, in 0..1; 0 is nothing of it.
        trainer: The Trainer.
        execution: Trains the stages.
        drain: Applies the gradients in flight.
    """

    def __init__(self, part: float, trainer: Trainer, execution: Execution, drain: Drain) -> None:
        self._part, self._trainer, self._execution, self._drain = part, trainer, execution, drain

    @property
    def begun(self) -> bool:
        """Whether batches are trained synchronously."""
        return self._execution.synchronous

    def check(self) -> None:
        """Called when training begins.

        Raises:
            ValueError: If the length of the fit is not known.
        """
        if self._part:
            check_length(self._trainer, self._part)

    def at_batch(self) -> None:
        """Called before each training batch."""
        if not self._part or self.begun:
            return
        index = compat.batch_index(self._trainer)
        # Not between batches whose gradients one step adds up.
        between = index % self._trainer.accumulate_grad_batches or self._drain.pending
        if not between and is_last_part(self._trainer, self._part, index):
            self._drain.now(index)
            self._execution.synchronize()
