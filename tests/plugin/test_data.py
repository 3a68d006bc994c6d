"""Tests of ``data.py``: nothing is lost by looking ahead, and ranks that do not read count along."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from lightning_ddg.plugin.data import RemoteBatch, RemoteLoader, SourceLoader, check_steps
from tests.networks import Classifier


class Stateful:
    """A loader with a length, a state and an attribute of its own."""

    sampler = "the sampler"

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def state_dict(self) -> dict[str, int]:
        return {"position": 2}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class Endless:
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def never() -> bool:
    raise AssertionError("a loader with a length needs no word from the rank that reads")


def test_peeking_loses_nothing() -> None:
    loader = SourceLoader(range(4))
    iterator = iter(loader)
    assert loader.peek() == 0
    assert loader.peek() == 0
    assert next(iterator) == 0
    assert loader.peek() == 0, "the first batch, although it has been fetched"
    assert list(iterator) == [1, 2, 3]


def test_peeking_looks_ahead_after_the_second_batch() -> None:
    loader = SourceLoader(range(4))
    iterator = iter(loader)
    assert [next(iterator), next(iterator)] == [0, 1]
    assert loader.peek() == 2
    assert list(iterator) == [2, 3]


def test_peeking_before_the_first_epoch_costs_no_epoch() -> None:
    loader = SourceLoader(range(3))
    assert loader.peek() == 0
    assert list(loader) == [0, 1, 2]
    assert list(loader) == [0, 1, 2]


def test_peeking_into_an_empty_loader() -> None:
    with pytest.raises(StopIteration):
        SourceLoader([]).peek()


def test_each_batch_and_the_end_are_announced_as_they_are_fetched() -> None:
    said: list[bool] = []
    loader = SourceLoader(Endless(), said.append)
    iterator = iter(loader)
    loader.peek()
    assert said == [], "looking ahead is no fetching"
    next(iterator)
    assert said == [True]
    assert list(iterator) == [1, 2]
    assert said == [True, True, True, False]
    assert list(loader) == [0, 1, 2]
    assert said == [True, True, True, False] * 2


def test_the_end_is_announced_once() -> None:
    """`CombinedLoader(mode="max_size")` asks an exhausted loader again until all of them are."""
    said: list[bool] = []
    iterator = iter(SourceLoader(Endless(), said.append))
    assert list(iterator) == [0, 1, 2]
    assert list(iterator) == []
    assert said == [True, True, True, False], "the other rank would take the second False for the next epoch's"


def test_lengths() -> None:
    assert len(SourceLoader(Stateful())) == 3
    assert len(RemoteLoader(Stateful(), 5, never)) == 5
    for loader in (SourceLoader(Endless()), RemoteLoader(Endless(), None, never)):
        with pytest.raises(TypeError):
            len(loader)


def test_ranks_that_do_not_read_never_touch_the_loader() -> None:
    class Untouchable:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("another rank reads")

    loader = RemoteLoader(Untouchable(), 3, never)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == 3
        assert all(isinstance(batch, RemoteBatch) for batch in batches)


def test_without_a_length_the_rank_that_reads_says_whether_there_is_more() -> None:
    answers = iter([True, True, False, True, False])
    loader = RemoteLoader(Endless(), None, lambda: next(answers))
    assert len(list(loader)) == 2
    assert len(list(loader)) == 1


def test_what_is_announced_is_what_the_other_rank_counts() -> None:
    said: list[bool] = []
    source = SourceLoader(Endless(), said.append)
    remote = RemoteLoader(Endless(), None, lambda: said.pop(0))
    for _ in range(2):
        assert len(list(source)) == len(list(remote)) == 3
        assert said == []


def test_attributes_are_the_users_loaders() -> None:
    for loader in (SourceLoader(Stateful()), RemoteLoader(Stateful(), 3, never)):
        assert loader.sampler == "the sampler"
        with pytest.raises(AttributeError):
            _ = loader.missing
    data: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(6)), batch_size=2, shuffle=True)
    assert SourceLoader(data).batch_sampler is data.batch_sampler


def test_the_position_in_the_data_is_saved_by_the_rank_that_reads() -> None:
    assert SourceLoader(Stateful()).state_dict() == {"position": 2}
    remote = RemoteLoader(Stateful(), 3, never)
    assert not hasattr(remote, "state_dict")
    assert not hasattr(remote, "load_state_dict")


class Sampled:
    """A loader with the sampler that Lightning gives to one whose batches are predicted."""

    def __init__(self) -> None:
        self.batch_sampler: Any = _IndexBatchSamplerWrapper(BatchSampler(range(5), 2, False))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return (len(indices) for indices in self.batch_sampler)


def test_indices_of_samples_are_told_once_and_noted_where_lightning_looks() -> None:
    theirs, mine = Sampled(), Sampled()
    source, remote = SourceLoader(theirs), RemoteLoader(mine, 3, lambda: True)
    for _ in range(2):
        batches = iter(source)
        for _, size in zip(remote, batches, strict=True):
            remote.add_indices(source.new_indices())
            assert len(mine.batch_sampler.seen_batch_indices[-1]) == size
        assert mine.batch_sampler.seen_batch_indices == [[0, 1], [2, 3], [4]]
        assert source.new_indices() == []


def test_a_loader_that_knows_no_samples_tells_none() -> None:
    source, remote = SourceLoader([1, 2]), RemoteLoader([1, 2], 2, lambda: True)
    assert next(iter(source)) == 1
    assert source.new_indices() == []
    remote.add_indices([])
    assert len(list(remote)) == 2


def fetching(self: Any, dataloader_iter: Iterator[Any]) -> None: ...


@pytest.mark.parametrize("name", ["training_step", "validation_step", "test_step", "predict_step"])
def test_steps_that_fetch_their_batches_are_refused(name: str) -> None:
    check_steps(Classifier())
    module = type("Fetching", (Classifier,), {name: fetching})()
    with pytest.raises(TypeError, match=f"`Fetching.{name}` takes `dataloader_iter`.*Take `batch` and `batch_idx`"):
        check_steps(module)
