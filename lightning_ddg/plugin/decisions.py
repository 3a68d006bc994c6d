"""Decisions that rank 0 takes in the middle of an epoch and that all ranks carry out after the same batch.

A stage is ahead of the stages after it, so such a decision travels with the gradients and takes effect ``K`` batches
later, in one process too. Nobody waits for it; keep it so. Decisions at the end of a validation or of an epoch, where
the ranks meet anyway, are rank 0's at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_ddg.plugin import compat
from lightning_ddg.plugin.signals import Signals

if TYPE_CHECKING:
    from lightning_ddg.core.delay_line import DelayLine
    from lightning_ddg.core.pipeline import Pipeline
    from lightning_ddg.core.staged import Lockstep

_STOP = "stop"


class Decisions:
    """What is asked for, what all ranks know, and what is due.

    Args:
        trainer: The Trainer, whose ``should_stop`` is watched and set.
        execution: Carries notices from rank 0 to the other stages.
        num_stages: ``K``, the number of batches a decision takes to be carried out.
        leads: Whether this is rank 0.
        signals: What operators ask for; ``None`` in one process, where Lightning's own ways will do.
    """

    def __init__(
        self,
        trainer: Trainer,
        execution: Pipeline | DelayLine | Lockstep,
        num_stages: int,
        leads: bool,
        signals: Signals | None = None,
    ) -> None:
        self._trainer = trainer
        self._execution = execution
        self._num_stages = num_stages
        self._leads = leads
        self._signals = signals
        self._due: set[str] = set()
        self._checkpoints = compat.TimedCheckpoints(trainer)
        self._run = 0
        self._stopping = False
        self._asked: set[str] = set()

    def begin(self) -> None:
        """Says that training begins: what an earlier run (a learning rate finder's) left behind counts no more."""
        self._run += 1
        self._stopping = False
        self._asked.clear()
        self._due.clear()
        self._execution.notices.clear()
        if self._signals is not None:
            self._signals.listen()

    def end(self) -> None:
        """Says that training has ended: signals act at once again."""
        if self._signals is not None:
            self._signals.listen(False)

    def due(self, batch: int) -> bool:
        """Readies what is to be carried out after ``batch``; whether a checkpoint is to be saved that monitors."""
        notices = self._execution.notices
        names = {name for run, due, names in notices for name in names if (run, due) == (self._run, batch)}
        self._asked -= names
        self._due = names
        self._stopping = self._stopping or _STOP in names
        notices[:] = [notice for notice in notices if notice[0] == self._run and notice[1] > batch]
        return self._checkpoints.allow(names)

    def end_batch(self, batch: int) -> None:
        """Asks for what has come up during ``batch``, and carries out what is due; a stop too early is taken back.

        Raises:
            KeyboardInterrupt: If that is due.
        """
        signals = set() if self._signals is None else self._signals.asked
        if self._leads:
            wanted = [*self._checkpoints.elapsed(), *signals, *self._execution.asked()]
            if self._trainer.should_stop and not self._stopping:
                wanted.append(_STOP)
            names = sorted(set(wanted) - self._asked)
            # Where no gradients carry notices, what is asked for waits for the end of the epoch, where all ranks meet.
            if names and not compat.skips_backward(self._trainer):
                notice = (self._run, batch + self._num_stages, names)
                self._execution.notices.append(notice)
                self._execution.announce(notice)
        else:
            names = sorted(signals - self._asked)
            if names:
                self._execution.ask(names)
        self._asked.update(names)
        self._trainer.should_stop = self._stopping
        if self._signals is not None:
            self._signals.obey(self._due)

    @property
    def wanted(self) -> set[str]:
        """What rank 0 wants of all ranks, now or later: to stop, and what it was sent a signal for."""
        stopping = self._trainer.should_stop or self._stopping or _STOP in self._asked
        return ({_STOP} if stopping else set()) | (set() if self._signals is None else self._signals.asked)

    def meet(self, wanted: set[str]) -> None:
        """Carries out what rank 0 wants, where all ranks have met.

        Raises:
            KeyboardInterrupt: If that is wanted.
        """
        self._stopping = self._trainer.should_stop = _STOP in wanted
        if self._signals is not None:
            self._signals.obey(wanted)

    def end_all(self, exception: BaseException) -> bool:
        """Whether an exception ends all ranks after the same batch, by what they have decided."""
        return self._signals is not None and self._signals.ends_all(exception)

    def restore(self) -> None:
        """Gives the callbacks and the handlers of signals back to themselves."""
        self._checkpoints.restore()
        if self._signals is not None:
            self._signals.restore()
