"""Callbacks of the package: the internal one that acts before all others at the end of batches and epochs.

Strategies have no hook there. It keeps no state of its own and enters no checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_ddg.plugin import compat

if TYPE_CHECKING:
    from lightning_ddg.plugin.strategy import DDGStrategy


class EpochEnd(Callback):
    """Drains the gradients in flight, and lets all ranks end an epoch together, before validation and checkpoints."""

    def __init__(self, strategy: DDGStrategy) -> None:
        self._strategy = strategy

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets callbacks that change the optimizer's groups find the whole module's parameters in them."""
        self._strategy.show_all_parameters()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Drains after the last batch, before the validation that may follow it, and readies what saves after it."""
        if compat.is_last_batch(trainer):
            self._strategy.drain("epoch", batch_idx)
        self._strategy.before_batch_end_hooks(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Stashes weights before any hook may change them."""
        self._strategy.before_step()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drains if the epoch ended early, then relays rank 0's metrics."""
        self._strategy.drain("epoch")
        self._strategy.end_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drains with ``drain="fit"``."""
        self._strategy.drain("fit")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tells the other ranks before any callback tries to save what can no longer be gathered."""
        self._strategy.on_exception(exception)
