"""The data of several replicas: each one's first stage reads a share, and all have as many batches.

As with DDP, Lightning's ``DistributedSampler`` makes the shares, and repeats some samples so that they are equally
long; what has no sampler, such as a stream, the user divides. A replica that ended alone would be waited for, so the
ranks that read agree on each batch before they announce it, but for predictions, which each replica makes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import DistributedSampler

from lightning_ddg.comm.replicas import Replicas
from lightning_ddg.plugin import compat_data as compat
from lightning_ddg.plugin.host import Trainer, TrainerFn
from lightning_ddg.plugin.warn import warn


class Shares:
    """Compares the data of the replicas, on the ranks that read; does nothing where there is one.

    Args:
        replicas: The ranks that read.
        trainer: The Trainer whose loops fetch.
    """

    def __init__(self, replicas: Replicas, trainer: Trainer) -> None:
        self._replicas, self._trainer = replicas, trainer

    def check(self, loader: Any) -> None:
        """Refuse a loader whose length is not the same on all replicas, or whose position is.

        Raises:
            ValueError: Naming the lengths, or the loader.
        """
        if self._replicas.size == 1 or self._trainer.predicting:
            return
        if self._trainer.state.fn == TrainerFn.FITTING and compat.keeps_position(loader):
            raise ValueError(
                f"{type(loader).__name__} keeps its position for checkpoints (`state_dict`), but a checkpoint has that"
                f" of one replica of {self._replicas.size}, and the others would go on where it was. Use a loader"
                " without `state_dict`, such as torch's DataLoader, or one pipeline (devices=num_stages)."
            )
        lengths = self._replicas.exchange(compat.sized_len(loader))
        if len(set(lengths)) > 1:
            each = ", ".join(f"{length} on replica {replica}" for replica, length in enumerate(lengths))
            raise ValueError(
                f"The replicas' data loaders ({type(loader).__name__}) have different numbers of batches: {each}. All"
                " replicas take their steps together. Give each the same number: leave use_distributed_sampler=True,"
                " or let your own sampler repeat or drop some samples."
            )

    def together(self, source: Iterator[Any]) -> Iterator[Any]:
        """Yield what a loop fetches, as long as all replicas have something.

        In training all end with the first that does.

        Raises:
            ValueError: If in an evaluation the replicas do not end together.
        """
        if self._replicas.size == 1 or self._trainer.predicting:
            return source
        return self._agreed(source)

    def _agreed(self, source: Iterator[Any]) -> Iterator[Any]:
        for number in count():
            fetched = next(source, None)
            # Of which loader the batch is: several may follow each other.
            loaders = self._replicas.exchange(None if fetched is None else fetched[2])
            if loaders == [None] * len(loaders):
                return
            if None in loaders or len(set(loaders)) > 1:
                self._say_uneven(number, loaders)
                return
            yield fetched

    def _say_uneven(self, number: int, loaders: list[int | None]) -> None:
        ended = ", ".join(str(replica) for replica, loader in enumerate(loaders) if loader is None)
        if self._trainer.training and ended:
            if self._replicas.number == 0:
                warn(
                    f"The data of replica {ended} ended after {number} batches, and so does the epoch on all"
                    f" {self._replicas.size}: batches that others have left are not trained. Give each replica as many."
                )
            return
        raise ValueError(
            f"After {number} batches of an evaluation the replicas of the data are not at the same batch:"
            f" {', '.join(_place(*one) for one in enumerate(loaders))}. Metrics over all of them would be of a part of"
            " the data. Give each replica as many batches, or evaluate with one pipeline (devices=num_stages)."
        )


def _place(replica: int, loader: int | None) -> str:
    return f"replica {replica} has ended" if loader is None else f"replica {replica} has another of loader {loader}"


def check_sampler(loader: Any, replica: int = 0, num_replicas: int = 1) -> None:
    """Refuse a sampler that makes other shares of the data than there are replicas: one process of each reads for all.

    Raises:
        ValueError: Naming the number of replicas.
    """
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    for sampler in samplers:
        if not isinstance(sampler, DistributedSampler):
            continue
        if (sampler.num_replicas, sampler.rank) == (num_replicas, replica):
            continue
        if num_replicas > 1:
            raise ValueError(
                f"A data loader has a {type(sampler).__name__} with num_replicas={sampler.num_replicas} and"
                f" rank={sampler.rank}, but this is replica {replica} of {num_replicas}: the processes are stages of"
                " these. Leave the sampler out (shuffle=True), or give it"
                " num_replicas=strategy.data_parallel_size, rank=strategy.replica."
            )
        raise ValueError(
            f"A data loader has a {type(sampler).__name__} with num_replicas={sampler.num_replicas}, which gives"
            " each process a part of the data, but here one process reads for all stages. Leave the sampler out"
            " (shuffle=True), or give it num_replicas=1, rank=0."
        )
