"""Tests of ``data.py``: ranks that do not read count along, whatever a loader's length says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_ddg.comm.ranks import LocalRanks
from lightning_ddg.plugin.data import (
    Announced,
    BatchExchange,
    CountedLoader,
    RemoteBatch,
    check_steps,
    followed,
)
from lightning_ddg.plugin.shares import check_sampler
from tests.networks import Classifier, quiet_trainer


class Sized:
    """A loader with a length and an attribute of its own, which nobody may iterate over."""

    sampler = "the sampler"

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("another rank reads")


def fetched(*batches: str) -> Iterator[Any]:
    return ((batch, index, 0) for index, batch in enumerate(batches))


def test_each_batch_and_the_end_are_announced_as_they_are_fetched() -> None:
    said: list[int | None] = []
    iterator = Announced(fetched("a", "b"), said.append)
    assert said == []
    assert next(iterator) == ("a", 0, 0)
    assert said == [0]
    assert list(iterator) == [("b", 1, 0)]
    assert said == [0, 0, None]


def test_the_end_is_announced_once() -> None:
    said: list[int | None] = []
    iterator = Announced(fetched("a"), said.append)
    assert len(list(iterator)) == 1
    assert list(iterator) == []
    assert said == [0, None], "the other rank would take the second one for the next epoch's"


def test_an_error_is_no_end() -> None:
    def fail() -> Iterator[Any]:
        yield "a", 0, 0
        raise OSError("the disk is gone")

    said: list[int | None] = []
    iterator = Announced(fail(), said.append)
    next(iterator)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)
    assert said == [0]


def test_what_is_announced_is_what_the_other_rank_counts() -> None:
    said: list[int | None] = []
    items = [("a", 0, 0), ("b", 1, 0), ("c", 0, 1), ("d", 0, 2), ("e", 1, 2)]
    assert list(Announced(iter(items), said.append)) == items
    counted = list(followed(lambda: said.pop(0)))
    assert [rest for _, *rest in counted] == [list(item[1:]) for item in items]
    assert all(isinstance(batch, RemoteBatch) for batch, _, _ in counted)
    assert said == []


def test_who_has_heard_of_the_end_asks_no_more() -> None:
    said: list[int | None] = [0, None]
    iterator = followed(lambda: said.pop(0))
    assert len(list(iterator)) == 1
    assert list(iterator) == []


@pytest.mark.parametrize("length", [0, 5])
def test_a_loader_has_the_length_that_it_has_elsewhere(length: int) -> None:
    counted = CountedLoader(Sized(), length)
    assert len(counted) == length
    assert counted.sampler == "the sampler"
    with pytest.raises(AttributeError):
        _ = counted.missing


def test_a_loader_may_have_no_length_elsewhere() -> None:
    with pytest.raises(TypeError, match="Sized has no length"):
        len(CountedLoader(Sized(), None))


def test_in_one_process_a_loader_and_a_batch_stay_what_they_are() -> None:
    exchange, module = BatchExchange(LocalRanks(2), quiet_trainer(devices=1)), Classifier()
    undo = exchange.install(module)
    loader, batch = Sized(), torch.ones(2)
    assert exchange.loader(loader) is loader
    assert exchange.batch(batch, lambda given: given + 1, 0).tolist() == [2, 2]
    undo()


@pytest.mark.parametrize("where", ["sampler", "batch_sampler"])
def test_a_sampler_for_several_replicas_is_refused(where: str) -> None:
    data = TensorDataset(torch.arange(6))
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=0)
    if where == "batch_sampler":
        loader: Any = DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(sampler, 2, False))
    else:
        loader = DataLoader(data, sampler=sampler)
    with pytest.raises(ValueError, match="DistributedSampler with num_replicas=2.*Leave the sampler out"):
        check_sampler(loader)
    check_sampler(DataLoader(data, sampler=DistributedSampler(data, num_replicas=1, rank=0)))


def test_a_step_may_be_none() -> None:
    module = Classifier()
    module.validation_step = None  # type: ignore[assignment,method-assign]
    check_steps(module)


def fetching(self: Any, dataloader_iter: Iterator[Any]) -> None: ...


@pytest.mark.parametrize("name", ["training_step", "validation_step", "test_step", "predict_step"])
def test_steps_that_fetch_their_batches_are_refused(name: str) -> None:
    check_steps(Classifier())
    module = type("Fetching", (Classifier,), {name: fetching})()
    with pytest.raises(TypeError, match=f"`Fetching.{name}` takes `dataloader_iter`.*Take `batch` and `batch_idx`"):
        check_steps(module)
