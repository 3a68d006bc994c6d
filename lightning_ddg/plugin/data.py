"""The data of a pipeline: the first stage's rank reads, all other ranks only count, and each gets what it needs.

In training, the rank with the loss gets the whole batch, and the ranks between get zeros of its shapes, for hooks to
hold; in evaluation all ranks get it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import DistributedSampler

from lightning_ddg.comm.ranks import Ranks
from lightning_ddg.core.execution import Channel
from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import LightningModule, Trainer, is_param_in_hook_signature

FLAG = Channel("flag")
BATCH = Channel("batch")


class RemoteBatch:
    """Stands for a batch that another rank reads; the exchange puts the received one in its place."""


class _PassThrough:
    """Pass every attribute that it does not have on to the user's loader."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)


class SourceLoader(_PassThrough):
    """The loader of the rank that reads.

    Args:
        loader: The user's iterable.
        announce: Called before each batch with whether there is one; only for loaders without a length.
    """

    def __init__(self, loader: Any, announce: Callable[[bool], None] | None = None) -> None:
        super().__init__(loader)
        self._announce = announce
        # Made by the first `peek` or `iter`.
        self._iterators: list[_SourceIterator] = []
        self._told = 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._told = 0
        self._iterators = [_SourceIterator(iter(self._loader), self._announce)]
        return self._iterators[0]

    def peek(self) -> Any:
        """Return the batch that comes next, or came first if it has already been fetched; nothing is lost.

        Raises:
            StopIteration: If there is none.
        """
        if not self._iterators:
            iter(self)
        return self._iterators[0].peek()

    def new_indices(self) -> list[Any]:
        """Return the indices of the samples fetched since the last call, one list a batch, where Lightning has them."""
        seen = getattr(getattr(self._loader, "batch_sampler", None), "seen_batch_indices", [])
        new = list(seen[self._told :])
        self._told = len(seen)
        return new


class _SourceIterator(Iterator[Any]):
    def __init__(self, iterator: Iterator[Any], announce: Callable[[bool], None] | None) -> None:
        self._iterator = iterator
        self._announce = announce
        self._waiting: list[Any] = []
        self._first: list[Any] | None = None
        self._ended = False

    def __next__(self) -> Any:
        try:
            batch = self._waiting.pop() if self._waiting else next(self._iterator)
        except StopIteration:
            # Once: whoever asks an exhausted iterator again must not end the other ranks' next epoch.
            if self._announce is not None and not self._ended:
                self._announce(False)
            self._ended = True
            raise
        if self._announce is not None:
            self._announce(True)
        self._first = [batch] if self._first is None else []
        return batch

    def peek(self) -> Any:
        if self._first:
            return self._first[0]
        if not self._waiting:
            self._waiting.append(next(self._iterator))
        return self._waiting[0]


class RemoteLoader(_PassThrough):
    """The loader of a rank that does not read: as many :class:`RemoteBatch` as there are batches.

    Args:
        loader: The user's iterable, never iterated; only its attributes are passed on.
        length: Number of batches, or ``None`` if it is not known.
        more: Waits until the reading rank says whether there is another batch; only without a length.
    """

    def __init__(self, loader: Any, length: int | None, more: Callable[[], bool]) -> None:
        super().__init__(loader)
        self._length = length
        self._more = more

    def __getattr__(self, name: str) -> Any:
        # The position in the data is the reading rank's to save and restore.
        if name in ("state_dict", "load_state_dict"):
            raise AttributeError(name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{type(self._loader).__name__} has no length")
        return self._length

    def add_indices(self, new: list[Any]) -> None:
        """Note the indices of samples that the reading rank has fetched, where Lightning looks for them."""
        if new:
            sampler = self._loader.batch_sampler
            # Lightning's wrapper has no such attribute before it is iterated, which it never is here.
            sampler.seen_batch_indices = [*getattr(sampler, "seen_batch_indices", []), *new]

    def __iter__(self) -> Iterator[RemoteBatch]:
        sampler: Any = getattr(self._loader, "batch_sampler", None)
        if hasattr(sampler, "seen_batch_indices"):
            sampler.seen_batch_indices = []
        if self._length is None:
            while self._more():
                yield RemoteBatch()
        else:
            for _ in range(self._length):
                yield RemoteBatch()


class BatchExchange:
    """Gives each rank its loaders and its batches.

    Args:
        ranks: The processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._mailbox = ranks, ranks.mailbox

    def loader(self, dataloader: Any) -> SourceLoader | RemoteLoader:
        """Wrap a user's loader: on one rank it reads, on all others it counts along."""
        if not self._ranks.others:
            return SourceLoader(dataloader)
        check_sampler(dataloader)
        more = partial(self._mailbox.take, self._ranks.reading_rank, FLAG)
        if not self._ranks.reads:
            return RemoteLoader(dataloader, more(), lambda: bool(more()))
        compat.seed_workers_as_one_device(dataloader)
        try:
            length = len(dataloader)
        except (TypeError, NotImplementedError):
            length = None
        announce = partial(self._mailbox.send, self._ranks.others, FLAG)
        announce(length)
        return SourceLoader(dataloader, announce if length is None else None)

    def batch(self, trainer: Trainer, batch: Any, move: Callable[[Any], Any], dataloader_idx: int) -> Any:
        """Return what this rank gets of a batch.

        Args:
            trainer: The Trainer, in whose loop it is.
            batch: What the loader gave: on ranks that do not read, a :class:`RemoteBatch`.
            move: Moves a batch that was read to the device.
            dataloader_idx: Which loader it comes from.
        """
        if trainer.predicting:
            loader = compat.prediction_loader(trainer, dataloader_idx)
            if isinstance(loader, SourceLoader):
                batch = move(batch)
                self._send(self._ranks.others, (batch, loader.new_indices()))
                return batch
            batch, indices = self._mailbox.take(self._ranks.reading_rank, BATCH)
            loader.add_indices(indices)
            return batch
        if not trainer.training:
            if not self._ranks.reads:
                return self._mailbox.take(self._ranks.reading_rank, BATCH)
            batch = move(batch)
            self._send(self._ranks.others, batch)
            return batch
        return self._training_batch(batch, move)

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


def check_sampler(loader: Any) -> None:
    """Refuse a sampler that would leave out a part of the data: one process reads for all.

    Raises:
        ValueError: Naming the number of replicas.
    """
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    for sampler in samplers:
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise ValueError(
                f"A data loader has a {type(sampler).__name__} with num_replicas={sampler.num_replicas}, which gives"
                " each process a part of the data, but here one process reads for all stages. Leave the sampler out"
                " (shuffle=True), or give it num_replicas=1, rank=0."
            )


def check_steps(module: LightningModule) -> None:
    """Refuse steps that fetch their batches themselves.

    Raises:
        TypeError: If a step takes ``dataloader_iter``.
    """
    for name in ("training_step", "validation_step", "test_step", "predict_step"):
        if is_param_in_hook_signature(getattr(module, name), "dataloader_iter", explicit=True):
            raise TypeError(
                f"`{type(module).__name__}.{name}` takes `dataloader_iter`, but only one process reads the data. Take"
                " `batch` and `batch_idx` instead."
            )
