"""What is given when a run is built: the user's things, the processes, and what outlives a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lightning_ddg.comm.ranks import Ranks
from lightning_ddg.core.rng import EVALUATION, TRAINING, Batch, seed_of_replica
from lightning_ddg.core.schedule import delay
from lightning_ddg.core.split import even_sizes, length_of, split
from lightning_ddg.plugin.host import LightningModule, Precision, Trainer, TrainerFn
from lightning_ddg.plugin.options import Options
from lightning_ddg.plugin.ownership import Weights


class Part(NamedTuple):
    """A micro-batch.

    Attributes:
        batch: Its samples, in the form of the batch.
        size: How many.
        weight: Its share of the batch, of which that many samples are: what its loss counts for.
    """

    batch: Any
    size: int
    weight: float


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
        seed: The run's, the same on every rank; replicas draw by others.
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

    def delay(self, stage: int) -> int:
        """Return the delay of a stage, in batches, or in micro-batches where batches are split."""
        return delay(stage, self.num_stages, self.options.slack)

    def training_batch(self, number: int, micro: int = 0) -> Batch:
        """Return the context of a batch that is trained, or of one of its micro-batches."""
        return Batch(number, TRAINING, self._own_seed, self.device, micro)

    @property
    def _own_seed(self) -> int:
        return seed_of_replica(self.seed, self.ranks.replicas.number)

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a step is made after; a small batch may have fewer, as many as make up a step.

        1 where batches are not split.
        """
        return self.options.micro_batches_for(self.num_stages)

    def parts(self, batch: Any) -> list[Part]:
        """Return a training batch's micro-batches, at least one.

        Raises:
            ValueError: If it cannot be split.
        """
        if self.micro_batches == 1:
            return [Part(batch, 1, 1.0)]
        length = length_of(batch)
        sizes = even_sizes(length, self.options.micro_batches_of(length, self.num_stages))
        if len(sizes) == 1:
            return [Part(batch, length, 1.0)]
        return [Part(part, size, size / length) for part, size in zip(split(batch, sizes), sizes, strict=True)]

    def first_part(self, batch: Any) -> Any:
        """Return a training batch's first micro-batch, which is as large as any: what the network is called with."""
        return self.parts(batch)[0].batch

    def evaluated_batch(self) -> Batch:
        """Return the context of the next batch that is evaluated."""
        return Batch(next(self.evaluations), EVALUATION, self._own_seed, self.device)

    def first_draws(self) -> AbstractContextManager[None]:
        """Draw inside as the first step of the first replica would, and leave no trace of it."""
        return Batch(0, TRAINING, self.seed, self.device).draws(0)
