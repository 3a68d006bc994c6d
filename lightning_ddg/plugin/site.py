"""What is given when a run is built: the user's things, the processes, and what outlives a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch

from lightning_ddg.comm.ranks import Ranks
from lightning_ddg.core.rng import EVALUATION, TRAINING, Batch
from lightning_ddg.plugin.host import LightningModule, Precision, Trainer, TrainerFn
from lightning_ddg.plugin.options import Options
from lightning_ddg.plugin.ownership import Weights


@dataclass(frozen=True)
class Site:
    """What is given.

    Attributes:
        trainer: The Trainer.
        module: The LightningModule.
        options: The strategy's.
        num_stages: ``K``, 2 or more.
        ranks: The processes.
        precision: The precision plugin.
        device: This process's device.
        seed: The run's, the same on every rank.
        evaluations: Numbers the evaluated batches, over all runs.
        recorded_cut: Where an earlier run, or that of a checkpoint, has cut the network, if any has.
        weights: Which weights of the module are up to date in this process.
        undo: What is to be undone when the run ends.
        fail: Tells the other ranks of an exception.
    """

    trainer: Trainer
    module: LightningModule
    options: Options
    num_stages: int
    ranks: Ranks
    precision: Precision
    device: torch.device
    seed: int
    evaluations: Iterator[int]
    recorded_cut: list[str] | None
    weights: Weights
    undo: ExitStack
    fail: Callable[[BaseException], None]

    @property
    def fits(self) -> bool:
        """Whether the run trains."""
        return self.trainer.state.fn == TrainerFn.FITTING

    @property
    def one_process(self) -> bool:
        """Whether this process trains all stages."""
        return self.ranks.size == 1

    @property
    def has_loss(self) -> bool:
        """Whether this process has the network's output, and so the loss."""
        return self.ranks.stage in (None, self.num_stages)

    def training_batch(self, number: int) -> Batch:
        """Return the context of a batch that is trained."""
        return Batch(number, TRAINING, self.seed, self.device)

    def evaluated_batch(self) -> Batch:
        """Return the context of the next batch that is evaluated."""
        return Batch(next(self.evaluations), EVALUATION, self.seed, self.device)

    def first_draws(self) -> AbstractContextManager[None]:
        """Draw inside as the first step would, and leave no trace of it."""
        return self.training_batch(0).draws(0)
