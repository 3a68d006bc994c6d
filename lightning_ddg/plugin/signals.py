"""What an operator asks for by a signal while several processes train: SIGTERM, or Ctrl-C.

Stages that stopped wherever a signal met them would stop at different batches, some of them waiting for others. So a
signal in the middle of training only leaves word here; rank 0 makes a decision of it
(:mod:`~lightning_ddg.plugin.decisions`), and all ranks stop after the same batch, able to save a checkpoint. Outside of
training, and when Ctrl-C comes a second time, a signal acts at once, as Lightning has it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from lightning_ddg.plugin import compat

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
        """Says that training begins, from where on signals can wait for the batch at which all ranks stop, or ends."""
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
        """Carries out what all ranks carry out after the same batch.

        Raises:
            KeyboardInterrupt: For Ctrl-C. For SIGTERM Lightning raises its own exception, at the end of the batch.
        """
        self._obeyed |= {TERMINATE, INTERRUPT} & set(names)
        if TERMINATE in self._obeyed:
            compat.mark_sigterm(self._trainer)
        if INTERRUPT in self._obeyed:
            raise KeyboardInterrupt

    def ends_all(self, exception: BaseException) -> bool:
        """Whether an exception is what ends all ranks together, after the same batch and still connected."""
        return bool(self._obeyed) and isinstance(exception, SIGTERMException | KeyboardInterrupt)

    def restore(self) -> None:
        """Gives the handlers of signals back."""
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
