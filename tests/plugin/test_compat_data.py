"""Tests of ``compat_data.py``: Lightning's private parts between loaders and loops are still what they are taken for.

A failure here means that Lightning has changed: mend the one function, and its docstring.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]
from torch.utils.data import DataLoader, IterableDataset

from lightning_ddg.plugin import compat_data as compat
from tests.networks import SAFELY, Classifier, dataset, loader, quiet_trainer


class Acts(pl.Callback):
    """Does something in ``setup``, where a strategy is not set up yet."""

    def __init__(self, act: Callable[[pl.Trainer], Any]) -> None:
        self.act = act

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.result = self.act(trainer)


def fitted(data: Any, act: Callable[[pl.Trainer], Any], module: Any = None, **flags: Any) -> tuple[pl.Trainer, Any]:
    ckpt_path = flags.pop("ckpt_path", None)
    acts = Acts(act)
    trainer = quiet_trainer(devices=1, **{"max_epochs": 1, "callbacks": [acts], **flags})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module or Batches(), data, ckpt_path=ckpt_path, **(SAFELY if ckpt_path else {}))
    return trainer, acts.result


class Batches(Classifier):
    """Notes the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__("mlp", step_lr=False)
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.sizes.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


def test_workers_are_seeded_as_those_of_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 5)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    data: Any = loader("mlp")
    compat.seed_workers(data, 0)
    assert data.worker_init_fn is None, "the user has not asked for it"
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    compat.seed_workers(data, 0)
    assert vars(data)["worker_init_fn"].keywords == {"rank": 0}
    before = data.worker_init_fn
    compat.seed_workers(data, 0)
    assert data.worker_init_fn is before
    compat.seed_workers([1, 2], 0)


def test_the_loader_of_a_prediction() -> None:
    loaders = [loader("mlp"), loader("mlp", 8)]
    seen: list[Any] = []

    class Predicting(Classifier):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.append(compat.prediction_loader(self.trainer, dataloader_idx).dataset)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(devices=1).predict(Predicting(), loaders)
    assert [id(found) for found in seen] == [id(loaders[0].dataset)] * 5 + [id(loaders[1].dataset)] * 2


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset("mlp", 12))


@pytest.mark.parametrize("sized", [True, False])
def test_the_first_batch_is_looked_at_and_not_lost(sized: bool) -> None:
    def look(trainer: pl.Trainer) -> list[Any]:
        compat.set_up_training_data(trainer)
        return [compat.first_fetched(trainer), compat.first_fetched(trainer)]

    module = Batches()
    data = loader("mlp", 12) if sized else DataLoader(Stream(), 5)
    _, (first, again) = fitted(data, look, module)
    assert [len(batch[0]) for batch in first + again] == [5, 5]
    assert torch.equal(first[0][0], again[0][0])
    assert module.sizes == [5, 5, 2]


def test_without_training_data_there_is_no_first_batch() -> None:
    def look(trainer: pl.Trainer) -> Any:
        compat.set_up_training_data(trainer)
        return compat.first_fetched(trainer)

    assert fitted(loader("mlp"), look, limit_train_batches=0)[1] == []
    assert fitted([], look)[1] == []


def test_data_is_set_up_from_what_was_requested_and_forgotten() -> None:
    asked: list[int] = []

    class Asked(Batches):
        def train_dataloader(self) -> Any:
            asked.append(1)
            return {"a": loader("mlp", 12)}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["a"], batch_idx)

    def try_out(trainer: pl.Trainer) -> Any:
        loaders = compat.request_training_data(trainer)
        compat.set_up_training_data(trainer, loaders)
        own = trainer.train_dataloader is not None and trainer.train_dataloader["a"] is loaders["a"]
        first = compat.first_fetched(trainer)
        compat.forget_training_data(trainer)
        return own, first[0].keys(), trainer.train_dataloader, trainer.num_training_batches, compat.flat(loaders)

    module = Asked()
    own, keys, forgotten, number, flat = fitted(None, try_out, module)[1]
    assert own
    assert list(keys) == ["a"]
    assert forgotten is None
    assert number == float("inf")
    assert [type(one) for one in flat] == [DataLoader]
    assert len(asked) == 2
    assert module.sizes == [5, 5, 2]


def test_loops_are_restored_before_their_time(tmp_path: Any) -> None:
    module = Batches()
    trainer, _ = fitted(loader("mlp", 12), lambda trainer: None, module)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    seen: list[Any] = []

    class Early(Batches):
        def configure_optimizers(self) -> Any:
            compat.restore_loops(self.trainer)
            seen.append((self.trainer.current_epoch, self.trainer.global_step))
            return super().configure_optimizers()

    again = Early()
    trainer, _ = fitted(loader("mlp", 12), compat.restore_loops, again, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert seen == [(1, 3)]
    assert again.sizes == [5, 5, 2]
    assert trainer.global_step == 6


class Starts(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None: ...


class OwnStart(Classifier):
    def on_fit_start(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "callbacks", "expected"),
    [
        (Classifier, [pl.callbacks.BackboneFinetuning(), pl.callbacks.Timer(), pl.callbacks.RichProgressBar()], False),
        (Classifier, [Starts()], True),
        (Classifier, [pl.callbacks.LambdaCallback(on_fit_start=lambda *args: None)], True),
        (OwnStart, [], True),
    ],
)
def test_whether_users_act_at_the_start(make: Any, callbacks: list[pl.Callback], expected: bool) -> None:
    trainer = quiet_trainer(devices=1, callbacks=callbacks, enable_progress_bar=True)
    trainer.strategy.connect(make())
    assert compat.acts_at_fit_start(trainer) == expected


def counted(trainer: pl.Trainer, loaders: list[Any]) -> Any:
    def exchange(source: Any, flat: Any) -> Any:
        loaders.append((source, list(flat)))
        return [range(4)], iter([("other", 0, 0)] * 4)

    return exchange


@pytest.mark.parametrize("reads", [True, False])
def test_what_the_loops_fetch_is_exchanged_and_nothing_else(reads: bool) -> None:
    trainer = quiet_trainer(devices=1)
    seen: list[Any] = []
    original = _DataFetcher.__iter__
    undo = compat.exchange_fetched(trainer, reads, counted(trainer, seen))
    try:
        other, data = CombinedLoader(loader("mlp", 12)), range(3)
        trainer.fit_loop._combined_loader = CombinedLoader(data)
        fetcher = _DataFetcher()
        fetcher.setup(trainer.fit_loop._combined_loader)
        assert [batch for batch, _, _ in fetcher] == ["other"] * 4
        assert len(trainer.fit_loop._combined_loader) == fetcher.length == (3 if reads else 4)
        assert trainer.train_dataloader is data
        fetcher.setup(other)
        assert [len(batch[0]) for batch, _, _ in fetcher] == [5, 5, 2]
    finally:
        undo()
    assert len(seen) == 1
    assert (seen[0][0] is not None) == reads
    assert seen[0][1] == [data]
    assert _DataFetcher.__iter__ is original


def test_loaders_are_replaced_once_they_have_been_set_up() -> None:
    trainer = quiet_trainer(devices=1, max_epochs=1, num_sanity_val_steps=0)
    undo = compat.after_data_set_up(trainer, lambda one: [*one])
    module = Batches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader("mlp", 12), [loader("mlp", 8)])
    assert [len(one) for one in trainer.train_dataloader] == [2, 2, 2]  # type: ignore[union-attr]
    assert [len(one) for one in trainer.val_dataloaders] == [2]  # type: ignore[union-attr, arg-type]
    undo()
    assert not any("setup_data" in vars(loop) for loop in compat.loops_with_data(trainer))


def test_before_a_batch_is_moved() -> None:
    called: list[int] = []
    module = Batches()
    undo = compat.before_transfer(module, lambda: called.append(1))
    fitted(loader("mlp", 12), lambda trainer: None, module)
    assert len(called) == 3
    undo()
    assert "_on_before_batch_transfer" not in vars(module)


class Stateful:
    def __iter__(self) -> Iterator[Any]:
        return iter(loader("mlp", 12))

    def state_dict(self) -> dict[str, int]:
        return {"position": 3}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def test_states_of_loaders_in_a_checkpoint(tmp_path: Any) -> None:
    trainer, _ = fitted(Stateful(), lambda trainer: None)
    assert trainer.fit_loop.on_save_checkpoint() == {"combined_loader": [{"position": 3}]}
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert compat.loader_states(torch.load(tmp_path / "one.ckpt", weights_only=True)) == [{"position": 3}]
    undo = compat.leave_out_loader_states(trainer)
    assert trainer.fit_loop.on_save_checkpoint() == {"combined_loader": [{}]}
    undo()
    assert trainer.fit_loop.on_save_checkpoint() == {"combined_loader": [{"position": 3}]}
    assert compat.loader_states({}) == []
