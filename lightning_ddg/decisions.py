"""Decisions that rank 0 takes in the middle of an epoch and that all ranks carry out after the same batch.

A stage is ahead of the stages after it, so such a decision travels with the gradients and takes effect ``K`` batches
later, in one process too. Nobody waits for it; keep it so. Decisions at the end of a validation or of an epoch, where
the ranks meet anyway, are rank 0's at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_ddg import _lightning

if TYPE_CHECKING:
    from lightning_ddg.delayline import DelayLine
    from lightning_ddg.pipeline import Pipeline

_STOP = "stop"


class Decisions:
    """What is asked for, what all ranks know, and what is due.

    Args:
        trainer: The Trainer, whose ``should_stop`` is watched and set.
        execution: Carries notices from rank 0 to the other stages.
        num_stages: ``K``, the number of batches a decision takes to be carried out.
        leads: Whether this is rank 0.
    """

    def __init__(self, trainer: Trainer, execution: Pipeline | DelayLine, num_stages: int, leads: bool) -> None:
        self._trainer = trainer
        self._execution = execution
        self._num_stages = num_stages
        self._leads = leads
        self._checkpoints = _lightning.TimedCheckpoints(trainer)
        self._run = 0
        self._stopping = False
        self._asked: set[str] = set()

    def begin(self) -> None:
        """Says that training begins: what an earlier run (a learning rate finder's) left behind counts no more."""
        self._run += 1
        self._stopping = False
        self._asked.clear()
        self._execution.notices.clear()

    def due(self, batch: int) -> bool:
        """Readies what is to be carried out after ``batch``; whether a checkpoint is to be saved that monitors."""
        notices = self._execution.notices
        names = {name for run, due, names in notices for name in names if (run, due) == (self._run, batch)}
        self._asked -= names
        self._stopping = self._stopping or _STOP in names
        notices[:] = [notice for notice in notices if notice[0] == self._run and notice[1] > batch]
        return self._checkpoints.allow(names)

    def end_batch(self, batch: int) -> None:
        """Asks for what has come up on rank 0 during ``batch``; a stop that is not yet due is taken back."""
        if self._leads:
            names = self._checkpoints.elapsed()
            if self._trainer.should_stop and not self._stopping:
                names.append(_STOP)
            names = [name for name in names if name not in self._asked]
            if names:
                self._asked.update(names)
                notice = (self._run, batch + self._num_stages, names)
                self._execution.notices.append(notice)
                self._execution.announce(notice)
        self._trainer.should_stop = self._stopping

    @property
    def stopping(self) -> bool:
        """Whether rank 0 wants to stop, now or later."""
        return self._trainer.should_stop or self._stopping or _STOP in self._asked

    def restore(self) -> None:
        """Gives the callbacks back to themselves."""
        self._checkpoints.restore()

    def stop(self, decision: bool) -> None:
        """Carries rank 0's decision out, where all ranks have met."""
        self._stopping = self._trainer.should_stop = decision
