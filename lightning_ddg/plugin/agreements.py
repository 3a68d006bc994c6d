"""What all ranks do after the same batch: stop, save by the clock, obey a signal.

A stage is ahead of the stages after it, so what rank 0 decides in the middle of an epoch travels with the gradients and
takes effect ``d(1) + 1`` batches later, ``K`` without slack, in one process too. Nobody waits for it. What is decided
at the end of a validation or of an epoch, where the ranks meet anyway, takes effect at once. Where there are several
replicas it goes to the last stage of each first, which hears of it a batch later, so that it takes a batch more.

An operator's signal (SIGTERM, or Ctrl-C) is one such case: stages that stopped wherever it met them would stop at
different batches, some of them waiting for others. So in the middle of training it only leaves word, and all ranks stop
after the same batch, able to save a checkpoint. Outside of training, and when Ctrl-C comes a second time, it acts at
once, as Lightning has it.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from enum import Enum
from typing import Any, NamedTuple

from lightning_ddg.comm.ranks import Ranks
from lightning_ddg.core.execution import GRADIENT, Channel, Observer
from lightning_ddg.plugin import compat, host
from lightning_ddg.plugin.host import ModelCheckpoint, SIGTERMException, Timer, Trainer, rank_zero_info
from lightning_ddg.plugin.launcher import STOPPED_BY_SIGTERM

# Lightning's own, which is shown on every rank.
_log = logging.getLogger(host.part("pytorch").__name__)

METRICS = Channel("metrics")
NOTICE = Channel("notice")
TOLD = Channel("told", varied=True)

STOP = "stop"
TERMINATE = "terminate"
INTERRUPT = "interrupt"


class Notice(NamedTuple):
    """What all ranks carry out after a batch.

    Attributes:
        run: In which of the Trainer's runs.
        due: After which batch.
        names: What.
    """

    run: int
    due: int
    names: list[str]


class Listening(Enum):
    """What becomes of a signal: it is Lightning's, or it acts at once, or waits for the batch where all ranks stop."""

    OFF = "off"
    AT_ONCE = "at once"
    WAITING = "waiting"


class Signals:
    """The signals that this rank has received, and those that all ranks obey.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.asked: set[str] = set()
        self._obeyed: set[str] = set()
        self._trainer = trainer
        self._listening = Listening.OFF
        self._process = os.getpid()
        self._undo = ExitStack()

    def install(self) -> compat.Undo:
        """Handle signals; return what gives their handlers back."""
        self._listening = Listening.AT_ONCE
        self._undo.callback(compat.on_sigterm(self._trainer, self._terminate))
        return self._restore

    def listen(self, training: bool = True) -> None:
        """Called when training begins, from where on signals wait for the batch at which all ranks stop, or ends."""
        if self._listening is Listening.OFF:
            return
        self._listening = Listening.WAITING if training else Listening.AT_ONCE
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

    def _restore(self) -> None:
        self._listening = Listening.OFF
        self._undo.close()

    def _terminate(self, number: int) -> None:
        if TERMINATE in self.asked or self._trainer.received_sigterm:
            return
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(number)
        rank = self._trainer.global_rank
        if self._waits:
            _log.info("SIGTERM came to rank %s: all stages stop after the same batch.", rank)
            self.asked.add(TERMINATE)
        else:
            _log.info("SIGTERM came to rank %s, which stops.", rank)
            compat.mark_sigterm(self._trainer)

    def _interrupt(self, number: int, frame: Any) -> None:
        if not self._waits or INTERRUPT in self.asked:
            signal.default_int_handler(number, frame)
        _log.info("Ctrl-C came to rank %s: all stages stop after the same batch.", self._trainer.global_rank)
        self.asked.add(INTERRUPT)
        rank_zero_info("Ctrl-C: all stages stop after the same batch. Press it again to stop at once.")

    def _give_ctrl_c_back(self) -> None:
        # Lightning ignores it while it shuts down.
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def _waits(self) -> bool:
        # Data loaders' workers inherit the handlers.
        return self._listening is Listening.WAITING and self._trainer.training and os.getpid() == self._process


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
        self._callbacks = {
            f"save {number}": callback
            for number, callback in enumerate(trainer.checkpoint_callbacks)
            if isinstance(callback, ModelCheckpoint) and compat.saves_by_time(callback)
        }

    def install(self) -> compat.Undo:
        """Take over when they save; return what gives it back."""
        undo = ExitStack()
        for name, callback in self._callbacks.items():
            undo.callback(self._guard(name, callback))
        return undo.close

    def elapsed(self) -> list[str]:
        """Return the names of those whose interval has passed by this rank's clock."""
        return [name for name, callback in self._callbacks.items() if compat.is_save_due(callback)]

    def allow(self, names: Collection[str]) -> bool:
        """Let those of the given names save after this batch, and no other; return whether any of them monitors."""
        self._allowed = set(names) & self._callbacks.keys()
        return any(self._callbacks[name].monitor is not None for name in self._allowed)

    def _guard(self, name: str, callback: ModelCheckpoint) -> compat.Undo:
        hook = callback.on_train_batch_end

        def save_if_allowed(*args: Any, **kwargs: Any) -> None:
            if name in self._allowed:
                compat.make_save_due(callback)
                hook(*args, **kwargs)

        return compat.replaced(callback, "on_train_batch_end", save_if_allowed)


class Notices(Observer):
    """What rank 0 lets all stages know, so that each knows it in time, and none waits for it.

    A notice travels upstream from neighbour to neighbour, always before the next gradient. Stage K tells of it after
    batch t; it reaches stage k before the gradient of batch t + 1, which stage k takes at iteration t + 1 + d(k).

    Args:
        ranks: The processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.known: list[Notice] = []
        self._ranks = ranks
        # Whether another replica's rank 0 has said something after a batch that has not been taken.
        self._untold = False

    def announce(self, notice: Notice) -> None:
        """Note something that all stages must know, and let the stages upstream know it."""
        self.known.append(notice)
        upstream = self._ranks.rank + 1
        if upstream < self._ranks.size:
            self._ranks.mailbox.send(upstream, NOTICE, notice)

    def after_take(self, source: int, channel: Channel) -> None:
        """Pass on what came before a gradient, before this stage sends its own."""
        while channel is GRADIENT and self._ranks.mailbox.has(source, NOTICE):
            self.announce(self._ranks.mailbox.take(source, NOTICE))

    def ask(self, names: list[str]) -> None:
        """On another rank than 0 of all: ask rank 0 for a decision."""
        self._ranks.world.send(0, NOTICE, names)

    def asked(self) -> list[str]:
        """On rank 0 of all: return what others have asked for since it was last called."""
        world = self._ranks.world
        return [name for peer in self._ranks.all_others if world.has(peer, NOTICE) for name in world.take(peer, NOTICE)]

    def forget(self) -> None:
        """Called when a run begins: what was known in an earlier one counts no more."""
        self.known.clear()
        self._untold = False

    def end_batch(self, new: Notice | None = None) -> None:
        """Called on the last stage of each replica after each batch; on rank 0 of all with what it has just announced.

        The others hear of it one batch later, when it is there, so that they do not wait.
        """
        replicas, world = self._ranks.replicas, self._ranks.world
        if replicas.size == 1:
            return
        if replicas.number == 0:
            world.send(range(self._ranks.size, world.size, self._ranks.size), TOLD, new)
        elif self._untold:
            self._hear()
        self._untold = True

    def end(self) -> None:
        """Called when training has ended: take what has not been heard of yet, as nobody will."""
        if self._untold and self._ranks.is_rank_zero and self._ranks.replicas.number:
            self._hear()
        self._untold = False

    def _hear(self) -> None:
        notice = self._ranks.world.take(0, TOLD)
        if notice is not None:
            self.announce(notice)


class Followed(dict[str, Any]):
    """The metrics by which callbacks and schedulers decide, on a replica whose own are not those of rank 0."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Leave out what this rank has logged: who went by that would do something else than the first replica."""


class Agreements:
    """What is asked for, what all ranks know, and what is due.

    Args:
        trainer: The Trainer, whose ``should_stop`` is watched and set.
        ranks: The processes.
        takes: The number of batches that a decision takes in one pipeline: the greatest delay, and one.
    """

    def __init__(self, trainer: Trainer, ranks: Ranks, takes: int) -> None:
        self._trainer, self._ranks = trainer, ranks
        self._takes = takes + (ranks.replicas.size > 1)
        self._notices = Notices(ranks)
        self._signals = Signals(trainer)
        self._checkpoints = TimedCheckpoints(trainer)
        # How many runs have begun: a learning rate finder's comes before the fit's own.
        self._run = 0
        self._due: set[str] = set()
        self._asked: set[str] = set()
        self._stopping = False

    def install(self) -> compat.Undo:
        """Become part of a fit; return what ends it."""
        undo = ExitStack()
        undo.callback(self._ranks.observers.subscribe(self._notices))
        undo.callback(self._checkpoints.install())
        if self._ranks.replicas.number:
            compat.hold_metrics(self._trainer, Followed)
        # In one process Lightning's own ways will do.
        if self._ranks.size > 1:
            undo.callback(self._signals.install())
            undo.callback(compat.save_on_exception_if(self._trainer, self.end_all))
        return undo.close

    def begin(self) -> None:
        """Called when training begins: what an earlier run has left behind counts no more."""
        self._run += 1
        self._stopping = False
        self._asked.clear()
        self._due.clear()
        self._notices.forget()
        self._signals.listen()

    def end(self) -> None:
        """Called when training has ended: signals act at once again."""
        self._notices.end()
        self._signals.listen(False)

    def due(self, batch: int) -> bool:
        """Ready what is to be carried out after ``batch``; return whether a checkpoint is to be saved that monitors."""
        notices = self._notices.known
        self._due = {
            name for notice in notices if (notice.run, notice.due) == (self._run, batch) for name in notice.names
        }
        self._asked -= self._due
        self._stopping = self._stopping or STOP in self._due
        notices[:] = [notice for notice in notices if notice.run == self._run and notice.due > batch]
        return self._checkpoints.allow(self._due)

    def end_batch(self, batch: int) -> None:
        """Ask for what has come up during ``batch``, and carry out what is due; a stop too early is taken back.

        Raises:
            KeyboardInterrupt: If that is due.
        """
        stops = {STOP} if self._trainer.should_stop and not self._stopping else set()
        if self._ranks.decides:
            wanted = {*self._checkpoints.elapsed(), *self._signals.asked, *self._notices.asked(), *stops}
            names = sorted(wanted - self._asked)
            notice: Notice | None = None
            # Where no gradients carry notices, what is asked for waits for the end of the epoch, where all ranks meet.
            if names and not compat.skips_backward(self._trainer):
                notice = Notice(self._run, batch + self._takes, names)
                self._notices.announce(notice)
            self._notices.end_batch(notice)
        else:
            # With another replica's loss a hook of the user's may want to stop as well.
            names = sorted({*self._signals.asked, *(stops if self._ranks.is_rank_zero else ())} - self._asked)
            if names:
                self._notices.ask(names)
            if self._ranks.is_rank_zero:
                self._notices.end_batch()
        self._asked.update(names)
        self._trainer.should_stop = self._stopping
        self._signals.obey(self._due)

    def follow(self, meet: bool = False) -> None:
        """Give all ranks rank 0's metrics; they wait for it, so not often.

        Args:
            meet: Whether all ranks carry out what rank 0 wants.

        Raises:
            KeyboardInterrupt: If that is wanted.
        """
        if not self._run or self._trainer.sanity_checking:
            return
        wanted, world = self._wanted, self._ranks.world
        # A look at metrics that are known on the last stage only: it may reduce them over the replicas, which all join.
        own = dict(self._trainer.callback_metrics) if self._ranks.is_rank_zero else {}
        if self._ranks.decides:
            world.send(self._ranks.all_others, METRICS, (own, wanted), snapshot=True)
        else:
            metrics, wanted = world.take(0, METRICS)
            dict.update(self._trainer.callback_metrics, metrics)
        if meet:
            self._stopping = self._trainer.should_stop = STOP in wanted
            self._signals.obey(wanted)

    def end_all(self, exception: BaseException) -> bool:
        """Return whether an exception ends all ranks after the same batch; SIGTERM's gets the program's exit code."""
        if isinstance(exception, SIGTERMException) and self._trainer.local_rank == 0:
            # Lightning's would end the program as if nothing had happened. It is nobody's business but the first's:
            # whoever has started the others takes a code other than 0 for a failure, and kills what still saves.
            exception.code = STOPPED_BY_SIGTERM
        return self._signals.ends_all(exception)

    @property
    def _wanted(self) -> set[str]:
        """What rank 0 wants of all ranks, now or later: to stop, and what it was sent a signal for."""
        stopping = self._trainer.should_stop or self._stopping or STOP in self._asked
        return ({STOP} if stopping else set()) | self._signals.asked
