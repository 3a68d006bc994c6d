"""The drain: the gradients still in flight at the end of an epoch, or of the fit, are applied without a new forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ddg.core.execution import Execution
from lightning_ddg.plugin.averaging import Averaging
from lightning_ddg.plugin.host import LightningModule
from lightning_ddg.plugin.ownership import keep_options

_log = logging.getLogger(__name__)


class Drain:
    """Steps with the gradients in flight, with as many a step as before.

    Args:
        when: ``"epoch"``, ``"fit"`` or ``"never"``: at whose end.
        module: The LightningModule.
        execution: Has the gradients.
        optimizers: Step with them.
        clip_again: Clips as the last step in manual optimization did.
        averaging: Takes the mean of gradients over replicas.
        micro_batches: How many make up a batch.

    Attributes:
        pending: Backwards since the last step.
    """

    def __init__(
        self,
        when: str,
        module: LightningModule,
        execution: Execution,
        optimizers: Sequence[Optimizer],
        clip_again: Callable[[], object],
        averaging: Averaging,
        micro_batches: int = 1,
    ) -> None:
        self._when, self._module, self._execution = when, module, execution
        self._averaging, self._micro_batches = averaging, micro_batches
        self._optimizers, self._clip_again = optimizers, clip_again
        self._steps = 0
        # And the most backwards that there have been for one.
        self.pending, self._accumulated = 0, 1

    def added(self) -> None:
        """Called after each backward."""
        self.pending += 1

    def stepped(self) -> None:
        """Called after each step of the optimizer."""
        self._steps += 1
        self._accumulated, self.pending = max(self._accumulated, self.pending), 0

    def at_end(self, of: str, batch_idx: int = 0) -> None:
        """Apply the gradients in flight, if this is when they shall be.

        Args:
            of: ``"epoch"`` or ``"fit"``: what has just ended.
            batch_idx: Index of the last batch, for the hooks of Lightning.
        """
        if of == self._when:
            self.now(batch_idx)
            _log.debug("drained at the end of the %s", of)

    def now(self, batch_idx: int = 0) -> None:
        """Apply the gradients in flight."""
        before = self._steps
        # A user's `optimizer_step` may set the learning rate, here on each stage another number of times.
        with ExitStack() as undo:
            for optimizer in self._optimizers:
                undo.callback(keep_options(optimizer))
            if not self._module.automatic_optimization:
                self._step_manually()
            while self._execution.waiting:
                self._step(batch_idx)
        _log.debug("drained: %d steps", self._steps - before)

    def _step_manually(self) -> None:
        (optimizer,) = self._optimizers
        # What has been added up since the last step is part of the first of these.
        while self._execution.waiting or self.pending:
            if not self.pending:
                optimizer.zero_grad()
            for _ in range(max(1, self._accumulated - self.pending)):
                if not self._execution.drain():
                    break
            self._averaging.now()
            self._clip_again()
            optimizer.step()

    def _step(self, batch_idx: int) -> None:
        module, trainer = self._module, self._module.trainer
        optimizer: Any = module.optimizers()
        before = self._steps

        def closure() -> Tensor:
            module.optimizer_zero_grad(trainer.current_epoch, batch_idx, optimizer)
            for _ in range(trainer.accumulate_grad_batches * self._micro_batches):
                if not self._execution.drain():
                    break
            self._averaging.now()
            # A user's `optimizer_step` may look at the loss, and the batches' own are long gone.
            return torch.zeros((), device=module.device)

        module.optimizer_step(trainer.current_epoch, batch_idx, optimizer, closure)
        if self._steps == before:
            # The user's hook steps at other batches only, but for these gradients there will be none.
            optimizer.step(lambda: None)
