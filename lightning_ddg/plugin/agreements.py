"""What all ranks do after the same batch: stop, save by the clock, obey a signal.

A stage is ahead of the stages after it, so what rank 0 decides in the middle of an epoch travels with the gradients and
takes effect ``K`` batches later, in one process too. Nobody waits for it. What is decided at the end of a validation or
of an epoch, where the ranks meet anyway, takes effect at once.

An operator's signal (SIGTERM, or Ctrl-C) is one such case: stages that stopped wherever it met them would stop at
different batches, some of them waiting for others. So in the middle of training it only leaves word, and all ranks stop
after the same batch, able to save a checkpoint. Outside of training, and when Ctrl-C comes a second time, it acts at
once, as Lightning has it.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from lightning_ddg.plugin import compat

if TYPE_CHECKING:
    from lightning_ddg.core.delay_line import DelayLine
    from lightning_ddg.core.pipeline import Pipeline
    from lightning_ddg.core.staged import Lockstep

STOP = "stop"
TERMINATE = "terminate"
INTERRUPT = "interrupt"


class Signals:
    """The signals that this rank has received, and those that all ranks obey.

    Args:
        trainer: The Trainer, whose handler of SIGTERM is replaced until :meth:`restore`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.asked: set[str] = set()
        self._obeyed: set[str] = set()
        self._trainer = trainer
        self._listening = False
        self._process = os.getpid()
        self._undo = ExitStack()
        self._undo.callback(compat.on_sigterm(trainer, self._terminate))

    def listen(self, training: bool = True) -> None:
        """Called when training begins, from where on signals wait for the batch at which all ranks stop, or ends."""
        self._listening = training
        if not training:
            return
        self.asked.clear()
        self._obeyed.clear()
        # Another handler than Python's own is somebody's who wants to act at once.
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._interrupt)
            self._undo.callback(self._give_ctrl_c_back)

    def obey(self, names: Iterable[str]) -> None:
        """Carry out what all ranks carry out after the same batch.

        Raises:
            KeyboardInterrupt: For Ctrl-C. For SIGTERM Lightning raises its own exception, at the end of the batch.
        """
        self._obeyed |= {TERMINATE, INTERRUPT} & set(names)
        if TERMINATE in self._obeyed:
            compat.mark_sigterm(self._trainer)
        if INTERRUPT in self._obeyed:
            raise KeyboardInterrupt

    def ends_all(self, exception: BaseException) -> bool:
        """Return whether an exception is what ends all ranks together, after the same batch and still connected."""
        return bool(self._obeyed) and isinstance(exception, SIGTERMException | KeyboardInterrupt)

    def restore(self) -> None:
        """Give the handlers of signals back."""
        self._listening = False
        self._undo.close()

    def _terminate(self, number: int) -> None:
        if TERMINATE in self.asked or self._trainer.received_sigterm:
            return
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(number)
        if self._waits:
            self.asked.add(TERMINATE)
        else:
            compat.mark_sigterm(self._trainer)

    def _interrupt(self, number: int, frame: Any) -> None:
        if not self._waits or INTERRUPT in self.asked:
            signal.default_int_handler(number, frame)
        self.asked.add(INTERRUPT)
        rank_zero_info("Ctrl-C: all stages stop after the same batch. Press it again to stop at once.")

    def _give_ctrl_c_back(self) -> None:
        # Lightning ignores it while it shuts down.
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def _waits(self) -> bool:
        # Data loaders' workers inherit the handlers.
        return self._listening and self._trainer.training and os.getpid() == self._process


def time_on_rank_zero(trainer: Trainer, is_rank_zero: bool) -> compat.Undo:
    """Let a Timer on rank 0 look at its clock, and no rank ask another: waiting would lock all stages together.

    Rank 0's ``should_stop`` reaches the other ranks anyway.
    """
    undo = ExitStack()

    def check(timer: Timer) -> None:
        left = timer.time_remaining()
        if is_rank_zero and left is not None and left <= 0:
            trainer.should_stop = True

    for timer in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(timer, Timer):
            undo.callback(compat.on_timer_check(timer, functools.partial(check, timer)))
    return undo.close


class TimedCheckpoints:
    """The checkpoints with a ``train_time_interval``: they save when allowed to, not when their own clock says so.

    Each would ask rank 0 after every batch whether to save, and lock all stages together by waiting for the answer.

    Args:
        trainer: The Trainer, with all its callbacks.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._allowed: set[str] = set()
        self._undo = ExitStack()
        self._callbacks = {
            f"save {number}": callback
            for number, callback in enumerate(trainer.checkpoint_callbacks)
            if isinstance(callback, ModelCheckpoint) and compat.saves_by_time(callback)
        }
        for name, callback in self._callbacks.items():
            self._undo.callback(self._guard(name, callback))

    def elapsed(self) -> list[str]:
        """Return the names of those whose interval has passed by this rank's clock."""
        return [name for name, callback in self._callbacks.items() if compat.is_save_due(callback)]

    def allow(self, names: Collection[str]) -> bool:
        """Let those of the given names save after this batch, and no other; return whether any of them monitors."""
        self._allowed = set(names) & self._callbacks.keys()
        return any(self._callbacks[name].monitor is not None for name in self._allowed)

    def restore(self) -> None:
        """Give the callbacks their own hooks back."""
        self._undo.close()

    def _guard(self, name: str, callback: ModelCheckpoint) -> compat.Undo:
        hook = callback.on_train_batch_end

        def save_if_allowed(*args: Any, **kwargs: Any) -> None:
            if name in self._allowed:
                compat.make_save_due(callback)
                hook(*args, **kwargs)

        return compat.replaced(callback, "on_train_batch_end", save_if_allowed)


class Decisions:
    """What is asked for, what all ranks know, and what is due.

    Args:
        trainer: The Trainer, whose ``should_stop`` is watched and set.
        execution: Carries notices from rank 0 to the other stages.
        num_stages: ``K``, the number of batches a decision takes to be carried out.
        is_rank_zero: Whether this is rank 0.
        signals: What operators ask for; ``None`` in one process, where Lightning's own ways will do.
    """

    def __init__(
        self,
        trainer: Trainer,
        execution: Pipeline | DelayLine | Lockstep,
        num_stages: int,
        is_rank_zero: bool,
        signals: Signals | None = None,
    ) -> None:
        self._trainer = trainer
        self._execution = execution
        self._num_stages = num_stages
        self._is_rank_zero = is_rank_zero
        self._signals = signals
        self._due: set[str] = set()
        self._checkpoints = TimedCheckpoints(trainer)
        self._run = 0
        self._stopping = False
        self._asked: set[str] = set()

    def begin(self) -> None:
        """Called when training begins: what an earlier run (a learning rate finder's) left behind counts no more."""
        self._run += 1
        self._stopping = False
        self._asked.clear()
        self._due.clear()
        self._execution.notices.clear()
        if self._signals is not None:
            self._signals.listen()

    def end(self) -> None:
        """Called when training has ended: signals act at once again."""
        if self._signals is not None:
            self._signals.listen(False)

    def due(self, batch: int) -> bool:
        """Ready what is to be carried out after ``batch``; return whether a checkpoint is to be saved that monitors."""
        notices = self._execution.notices
        names = {name for run, due, names in notices for name in names if (run, due) == (self._run, batch)}
        self._asked -= names
        self._due = names
        self._stopping = self._stopping or STOP in names
        notices[:] = [notice for notice in notices if notice[0] == self._run and notice[1] > batch]
        return self._checkpoints.allow(names)

    def end_batch(self, batch: int) -> None:
        """Ask for what has come up during ``batch``, and carry out what is due; a stop too early is taken back.

        Raises:
            KeyboardInterrupt: If that is due.
        """
        signals = set() if self._signals is None else self._signals.asked
        if self._is_rank_zero:
            wanted = [*self._checkpoints.elapsed(), *signals, *self._execution.asked()]
            if self._trainer.should_stop and not self._stopping:
                wanted.append(STOP)
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
        stopping = self._trainer.should_stop or self._stopping or STOP in self._asked
        return ({STOP} if stopping else set()) | (set() if self._signals is None else self._signals.asked)

    def meet(self, wanted: set[str]) -> None:
        """Carry out what rank 0 wants, where all ranks have met.

        Raises:
            KeyboardInterrupt: If that is wanted.
        """
        self._stopping = self._trainer.should_stop = STOP in wanted
        if self._signals is not None:
            self._signals.obey(wanted)

    def end_all(self, exception: BaseException) -> bool:
        """Return whether an exception ends all ranks after the same batch, by what they have decided."""
        return self._signals is not None and self._signals.ends_all(exception)

    def restore(self) -> None:
        """Give the callbacks and the handlers of signals back to themselves."""
        self._checkpoints.restore()
        if self._signals is not None:
            self._signals.restore()
