"""The data of a pipeline: the first stage's rank reads, all other ranks only count, and each gets what it needs.

In training, the rank with the loss gets the whole batch, and the ranks between get zeros of its shapes, for hooks to
hold; in evaluation all ranks get it. All that is exchanged is exchanged between Lightning's loops and their loaders:
the loaders themselves, and all attributes of the Trainer that hold them, stay the user's on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from lightning_ddg.comm.ranks import Ranks
from lightning_ddg.core.execution import Channel
from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.core.rng import Generators
from lightning_ddg.plugin import compat_data as compat
from lightning_ddg.plugin.compat import Undo
from lightning_ddg.plugin.host import LightningModule, Trainer, is_param_in_hook_signature
from lightning_ddg.plugin.shares import Shares, check_sampler

LENGTH = Channel("length", varied=True)
FLAG = Channel("flag")
BATCH = Channel("batch")


class RemoteBatch:
    """Stands for a batch that another rank reads; the exchange puts the received one in its place."""


class CountedLoader:
    """A user's loader as the rank that reads has it: with that one's length, and never iterated here.

    Args:
        loader: The user's iterable, whose attributes are passed on.
        length: Number of batches, or ``None`` if it is not known.
    """

    def __init__(self, loader: Any, length: int | None) -> None:
        self.loader = loader
        self._length = length

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("another rank reads")

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)


class Announced(Iterator[Any]):
    """What Lightning fetches on the rank that reads: before each batch, and at the end, the others are told.

    Args:
        source: Yields what a ``CombinedLoader`` yields: a batch, its index, and the index of its loader.
        announce: Is told the index of the loader of each batch, then ``None``; a length is only an estimate.
    """

    def __init__(self, source: Iterator[Any], announce: Callable[[int | None], None]) -> None:
        self.source = source
        self._announce = announce
        self._ended = False

    def __next__(self) -> Any:
        try:
            fetched = next(self.source)
        except StopIteration:
            # Once: who asks an exhausted iterator again must not end the other ranks' next epoch.
            if not self._ended:
                self._announce(None)
            self._ended = True
            raise
        self._announce(fetched[2])
        return fetched


def followed(hear: Callable[[], int | None]) -> Iterator[tuple[RemoteBatch, int, int]]:
    """Yield what Lightning fetches on a rank that does not read: as many batches as are announced.

    Args:
        hear: Waits for what the rank that reads announces; see :class:`Announced`.
    """
    index, before = 0, 0
    while (loader := hear()) is not None:
        index, before = (index if loader == before else 0), loader
        yield RemoteBatch(), index, loader
        index += 1


class BatchExchange:
    """Gives each rank what Lightning's loops need of the loaders, and its batches.

    Args:
        ranks: The processes.
        trainer: The Trainer whose loops fetch.
    """

    def __init__(self, ranks: Ranks, trainer: Trainer) -> None:
        self._ranks, self._mailbox, self._trainer = ranks, ranks.mailbox, trainer
        self._shares = Shares(ranks.replicas, trainer)
        # Whether what is moved to the device next is what the loop has fetched, and not a batch of the user's own.
        self._due = False
        # Of each loader whose batches are predicted: how many batches' indices the other ranks know.
        self._told: dict[int, int] = {}

    def install(self, module: LightningModule) -> Undo:
        """Stand between the Trainer's loops and their loaders; return what ends it."""
        undo = ExitStack()
        if self._ranks.others:
            reads = self._ranks.reads
            exchange = self._announced if reads else self._followed
            undo.callback(compat.exchange_fetched(self._trainer, reads, exchange))
            if reads:
                undo.callback(compat.before_transfer(module, self._fetched))
            else:
                undo.callback(compat.after_data_set_up(self._trainer, _own))
                undo.callback(compat.leave_out_loader_states(self._trainer))
        return undo.close

    def loader(self, dataloader: Any) -> Any:
        """Return a user's loader as the loop that sets it up shall see it: with the length it has where it is read."""
        if not self._ranks.others:
            return dataloader
        replicas = self._ranks.replicas
        check_sampler(dataloader, replicas.number, replicas.size)
        compat.seed_workers(dataloader, replicas.number)
        if self._ranks.reads:
            self._shares.check(dataloader)
            self._mailbox.send(self._ranks.others, LENGTH, compat.sized_len(dataloader))
            return dataloader
        return CountedLoader(dataloader, self._mailbox.take(self._ranks.reading_rank, LENGTH))

    def _announced(self, source: Iterator[Any] | None, loaders: Sequence[Any]) -> tuple[Sequence[Any], Iterator[Any]]:
        assert source is not None
        self._due = False
        self._told.clear()
        self._mailbox.send(self._ranks.others, LENGTH, [compat.sized_len(loader) for loader in loaders])
        source = self._shares.together(source)
        return loaders, Announced(source, lambda loader: self._mailbox.send(self._ranks.others, FLAG, loader))

    def _followed(self, source: Iterator[Any] | None, loaders: Sequence[Any]) -> tuple[Sequence[Any], Iterator[Any]]:
        for loader in loaders:
            sampler: Any = getattr(loader, "batch_sampler", None)
            if hasattr(sampler, "seen_batch_indices"):
                sampler.seen_batch_indices = []
        lengths = self._mailbox.take(self._ranks.reading_rank, LENGTH)
        counted = [CountedLoader(loader, length) for loader, length in zip(loaders, lengths, strict=True)]
        return counted, followed(lambda: self._mailbox.take(self._ranks.reading_rank, FLAG))

    def _fetched(self) -> None:
        self._due = True

    def batch(self, batch: Any, move: Callable[[Any], Any], dataloader_idx: int) -> Any:
        """Return what this rank gets of a batch that a loop has fetched; a batch of the user's own is moved only.

        Args:
            batch: What was fetched: on ranks that do not read, a :class:`RemoteBatch`.
            move: Moves a batch that was read to the device.
            dataloader_idx: Which loader it comes from.
        """
        due = self._due if self._ranks.reads else isinstance(batch, RemoteBatch)
        self._due = False
        if not due:
            return move(batch)
        if self._trainer.training:
            return self._training_batch(batch, move)
        indices: list[Any] = []
        if self._ranks.reads:
            batch = move(batch)
            if self._trainer.predicting:
                indices = self._new_indices(dataloader_idx)
            self._send(self._ranks.others, (batch, indices))
            return batch
        batch, indices = self._mailbox.take(self._ranks.reading_rank, BATCH)
        if indices:
            sampler = compat.prediction_loader(self._trainer, dataloader_idx).batch_sampler
            # Lightning's wrapper has no such attribute before it is iterated, which it never is here.
            sampler.seen_batch_indices = [*getattr(sampler, "seen_batch_indices", []), *indices]
        return batch

    def _new_indices(self, dataloader_idx: int) -> list[Any]:
        """The indices of the samples fetched since the last call, one list a batch, where Lightning has them."""
        loader = compat.prediction_loader(self._trainer, dataloader_idx)
        seen = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", [])
        new = list(seen[self._told.get(dataloader_idx, 0) :])
        self._told[dataloader_idx] = len(seen)
        return new

    def _training_batch(self, batch: Any, move: Callable[[Any], Any]) -> Any:
        rank = self._ranks.rank
        if self._ranks.reads:
            batch = move(batch)
            self._send([0], batch)
        elif self._ranks.is_rank_zero:
            return self._mailbox.take(self._ranks.reading_rank, BATCH)
        else:
            batch = self._mailbox.take(rank + 1, BATCH)
        if rank > 1:
            # Stages hand its shapes on, so that the reading rank need not write to all of them.
            self._mailbox.send(rank - 1, BATCH, batch, payload=False)
        return batch

    def _send(self, ranks: list[int], value: Any) -> None:
        # A snapshot: the user's step may change the batch in place while it is still on its way.
        self._mailbox.send(ranks, BATCH, value, snapshot=True)


def share_generators(ranks: Ranks) -> None:
    """Let every rank draw on as the one that reads, which has drawn what one process would have."""
    if ranks.others:
        ranks.broadcast(Generators(torch.device("cpu")), ranks.reading_rank).restore()


def put_loader_states(ranks: Ranks, checkpoint: dict[str, Any]) -> None:
    """Put the positions in the training data into rank 0's checkpoint: the rank that reads knows them."""
    if states := compat.loader_states(checkpoint):
        gathered = ranks.gather({"loaders": states if ranks.reads else []})
        if gathered:
            states[:] = gathered[ranks.reading_rank - 1]["loaders"]


def run_on_cpu(step: Callable[..., object], args: Any, kwargs: Any) -> object:
    """Run a step on copies of its arguments on the CPU."""
    args, kwargs = map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), (args, kwargs))
    return step(*args, **kwargs)


def _own(loader: Any) -> Any:
    return loader.loader if isinstance(loader, CountedLoader) else loader


def check_steps(module: LightningModule) -> None:
    """Refuse steps that fetch their batches themselves.

    Raises:
        TypeError: If a step takes ``dataloader_iter``.
    """
    for name in ("training_step", "validation_step", "test_step", "predict_step"):
        step = getattr(module, name)
        # Some switch a step off by None.
        if callable(step) and is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
            raise TypeError(
                f"`{type(module).__name__}.{name}` takes `dataloader_iter`, but only one process reads the data. Take"
                " `batch` and `batch_idx` instead."
            )
