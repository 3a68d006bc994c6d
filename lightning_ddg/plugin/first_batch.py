"""The first training batch, read when a fit is set up, where the network's layers or their costs are not known without.

Lightning sets the training data up later: after ``on_fit_start``, and after it has restored the loops of a checkpoint.
So the loops are restored first here too. Where nobody has code in ``on_fit_start``, it is then the same set-up, some
moments early, and the loop goes on with it: no batch is lost, and what fails is what would have failed. Where somebody
has, the batch is read on trial, and all is set up again in Lightning's own order, as far as it can be read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_ddg.comm.mailbox import PeerError
from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.core.rng import Generators
from lightning_ddg.plugin import compat_data as compat
from lightning_ddg.plugin.site import Site
from lightning_ddg.plugin.warn import warn


class FirstBatch:
    """Reads the first training batch when it is asked for, and once.

    Args:
        site: What a run is built of.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._read: list[list[Any]] = []

    def read(self) -> list[Any]:
        """Return the batch in a list, on the rank that reads; an empty list elsewhere, or if there is none.

        Every rank must call it. The batch is the caller's own.

        Raises:
            Exception: What the user's data raises; on the other ranks :class:`PeerError`, which tells of it.
        """
        if not self._read:
            self._read.append(self._fetch())
        return [map_tensors(torch.clone, batch) for batch in self._read[0]]

    def _fetch(self) -> list[Any]:
        if not self._site.fits:
            return []
        trainer, ranks = self._site.trainer, self._site.ranks
        compat.restore_loops(trainer)
        if ranks.agree(compat.acts_at_fit_start(trainer), all=False):
            return self._try()
        compat.set_up_training_data(trainer)
        batch, failure = self._first()
        self._raise(failure)
        return batch

    def _first(self) -> tuple[list[Any], Exception | None]:
        """Return the first batch as the loop will train it, or why it cannot be read; on the rank that reads."""
        if self._site.ranks.reads:
            try:
                return compat.first_fetched(self._site.trainer), None
            except Exception as error:  # noqa: BLE001 - the user's data may raise anything
                return [], error
        return [], None

    def _raise(self, failure: Exception | None) -> None:
        """Raise what the rank that reads has met, on all ranks."""
        ranks = self._site.ranks
        told = ranks.broadcast(_text(failure), ranks.reading_rank)
        if failure is not None:
            raise failure
        if told is not None:
            raise PeerError(f"Rank {ranks.reading_rank} (stage 1) cannot read the first training batch: {told}")

    def _try(self) -> list[Any]:
        trainer, ranks = self._site.trainer, self._site.ranks
        undo: list[Callable[[], object]] = [Generators(self._site.device).restore]
        loaders: Any = None
        batch: list[Any] = []
        failure: Exception | None = None
        try:
            loaders = compat.request_training_data(trainer)
        except Exception as error:  # noqa: BLE001 - the user's data may raise anything
            failure = error
        if ranks.agree(failure is None):
            undo += [partial(generator.set_state, generator.get_state()) for generator in _generators(loaders)]
            compat.set_up_training_data(trainer, loaders)
            batch, failure = self._first()
            batch = [map_tensors(torch.clone, one) for one in batch]
        again = ranks.agree(all(map(_can_be_read_again, compat.flat(loaders))))
        if not again:
            # What fails once, and goes on when it is asked again, must not do so unseen.
            self._raise(failure)
            return batch
        told = ranks.broadcast(_text(failure), ranks.reading_rank)
        if failure is not None or told is not None:
            warn(
                f"The first training batch cannot be read before `on_fit_start` ({_text(failure) or told}), so that it"
                " is read after it, and is not there to cut the network by. Make the data in `setup`, or give"
                " `split_points`.",
            )
        compat.forget_training_data(trainer)
        for restore in undo:
            restore()
        return batch


def _text(failure: Exception | None) -> str | None:
    return None if failure is None else f"{type(failure).__name__}: {failure}"


def _can_be_read_again(loader: Any) -> bool:
    """Whether a loader that has been iterated over gives the same again, once its generators have been put back."""
    if loader is None:
        return True  # It could not be asked for.
    reads_by_index = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return reads_by_index and not hasattr(loader, "load_state_dict")


def _generators(loaders: Any) -> Iterator[torch.Generator]:
    """The generators that loaders draw from, besides the global ones."""
    for loader in compat.flat(loaders):
        batch_sampler = getattr(loader, "batch_sampler", None)
        for owner in (loader, batch_sampler, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                yield generator
