"""What happens at which moment of a fit, besides the strategy's own hooks.

Strategies have no hook at the end of a batch or an epoch. So one callback acts before all others, and functions are
called after the module's own hooks, which come after the callbacks'::

    end of a batch:   FitHooks.on_train_batch_end   callbacks   the module's hook   FitHooks.after_batch_end
    end of an epoch:  FitHooks.on_train_epoch_end   callbacks   the module's hook   FitHooks.after_epoch_end

It keeps no state of its own and enters no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override

from lightning_ddg.comm.ranks import Ranks
from lightning_ddg.core.execution import Channel, Execution
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.agreements import Agreements
from lightning_ddg.plugin.drain import Drain
from lightning_ddg.plugin.finish import Finish
from lightning_ddg.plugin.host import Callback, LightningModule, Trainer
from lightning_ddg.plugin.late_parameters import LateParameters
from lightning_ddg.plugin.ownership import OptimizerGroups
from lightning_ddg.plugin.sharing import Sharing
from lightning_ddg.plugin.stale_copies import StaleCopies
from lightning_ddg.plugin.verify import Proof

EPOCH = Channel("epoch", ends=True)


class FitHooks(Callback):
    """Acts at the moments of a fit.

    Args:
        execution: Trains the stages.
        ranks: The processes.
        drain: Applies gradients in flight.
        finish: Makes the last part of a fit synchronous.
        agreements: What rank 0 decides for all.
        groups: The optimizers' groups over the whole module.
        copies: Guards copies of the network's layers.
        late: Refuses parameters that a step makes.
        sharing: Gives every rank all weights.
        fail: Tells the other ranks of an exception.
        proof: Compares the first batch's gradients with those of plain backpropagation, if that is wanted.
    """

    def __init__(
        self,
        execution: Execution,
        ranks: Ranks,
        drain: Drain,
        finish: Finish,
        agreements: Agreements,
        groups: Sequence[OptimizerGroups],
        copies: StaleCopies,
        late: LateParameters,
        sharing: Sharing,
        fail: Callable[[BaseException], None],
        proof: Proof | None = None,
    ) -> None:
        self._execution, self._ranks, self._drain, self._finish = execution, ranks, drain, finish
        self._agreements, self._groups, self._copies = agreements, groups, copies
        self._late, self._sharing, self._fail, self._proof = late, sharing, fail, proof

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        """Leave a callback that does nothing where the Trainer's are copied or pickled during a fit."""
        return Callback, ()

    # ---- before all other callbacks

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let callbacks that change the optimizer's groups find the whole module's parameters in them."""
        for groups in self._groups:
            groups.show_all()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note what copies of the network's layers are; empty the pipeline where the synchronous finish begins."""
        self._copies.mark()
        if batch_idx == 0 and self._ranks.others:
            self._late.mark()
        self._finish.at_batch()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """Refuse parameters that the step has just made, before anything looks for their gradients."""
        self._late.check()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Let the weights be changed, before any hook may do so."""
        self._execution.before_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Drain after the last batch, before the validation that may follow; ready what callbacks do after a batch."""
        if compat.is_last_batch(trainer):
            self._drain.at_end("epoch", batch_idx)
        saves = self._agreements.due(compat.batch_number(trainer))
        if saves or compat.monitors_after_batch(trainer):
            self._agreements.follow()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drain if the epoch ended early, end it on all ranks together, and give all of them rank 0's metrics."""
        self._drain.at_end("epoch")
        if self._ranks.others:
            self._copies.mark(look=True)
            own = compat.looks_after_epoch(trainer, pl_module)
            self._ranks.world.send(self._ranks.all_others, EPOCH, own)
            # Every rank ends the epoch before any goes on.
            others = [self._ranks.world.take(rank, EPOCH) for rank in self._ranks.all_others]
            if own or any(others):
                self._sharing.share()
        if self._proof is not None:
            self._proof.after_epoch()
        if self._ranks.others:
            self._agreements.follow()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let validation steps, and hooks around them, look at weights that are up to date."""
        self._sharing.share()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the other replicas rank 0's metrics before a callback goes by their own."""
        if self._ranks.replicas.size > 1:
            self._agreements.follow()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drain with ``drain="fit"``; let the users' hooks see the trained weights."""
        self._drain.at_end("fit")
        self._sharing.share()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the other ranks before any callback tries to save what can no longer be gathered."""
        self._fail(exception)

    # ---- after the module's own hooks

    def after_batch_end(self, trainer: Trainer) -> None:
        """Carry out what is due; give all ranks rank 0's metrics where a scheduler looks at them."""
        self._copies.check()
        self._agreements.end_batch(compat.batch_number(trainer))
        if compat.plateaus_after_batch(trainer):
            self._agreements.follow()

    def after_epoch_end(self) -> None:
        """Let all ranks do what rank 0 has decided."""
        self._copies.check()
        self._agreements.follow(meet=True)

    def adopt_groups(self) -> None:
        """Take the parameters of other stages out of the groups again."""
        for groups in self._groups:
            groups.adopt()

    def install(self, trainer: Trainer, module: LightningModule) -> Callable[[], None]:
        """Become part of a fit; return what ends it."""
        undo = [
            compat.insert_callback(trainer, self),
            # Each process has exchanged its own stage's weights alone, and hooks that follow may look at all.
            compat.after_averages(trainer, "on_validation_epoch_start", self._sharing.share),
            compat.after_averages(trainer, "on_train_end", self._sharing.share),
            compat.after_hook(module, "on_fit_start", self.adopt_groups),
            compat.after_hook(module, "on_train_epoch_start", self.adopt_groups),
            compat.after_hook(module, "on_train_batch_end", lambda: self.after_batch_end(trainer)),
            compat.after_hook(module, "on_train_epoch_end", self.after_epoch_end),
        ]

        def remove() -> None:
            for function in reversed(undo):
                function()

        return remove
