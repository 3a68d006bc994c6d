"""Loaders in every state: what is read, when and in which order is as without the strategy, in one process and two."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks, run_ranks_raw
from tests.networks import SAFELY, quiet_trainer


class Seer(pl.LightningModule):
    """Notes what each step has seen; where a batch has several parts, of each."""

    def __init__(self, **data: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
        self.seen: list[Any] = []
        self.data = data

    def look(self, what: str, batch: Any) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else [batch]
        output = self.net(torch.cat([part for part in parts if part is not None]))
        self.seen.append((what, [None if part is None else part.flatten().tolist() for part in parts]))
        return output.square().mean()  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.look(f"train {batch_idx} of {self.trainer.num_training_batches}", batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", self.look(f"val {dataloader_idx} {batch_idx}", batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.look(f"test {dataloader_idx} {batch_idx}", batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.look(f"predict {dataloader_idx} {batch_idx}", batch)
        return batch.sum()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Estimated(IterableDataset[Tensor]):
    """Twelve rows, or as many as there are; its length is what somebody has estimated."""

    def __init__(self, length: int, rows: int = 12) -> None:
        self.length, self.rows = length, rows

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(row)]) for row in range(self.rows))


class Learning(Estimated):
    """Knows its length when it has been read to its end."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from super().__iter__()
        self.length = self.rows


class Unsized(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(row)]) for row in range(10))


def numbers(count: int = 12) -> TensorDataset:
    return TensorDataset(torch.arange(float(count)).unsqueeze(1))


def rows(samples: list[Any]) -> Tensor:
    return torch.stack([sample[0] for sample in samples])


def mapped(count: int = 12, **options: Any) -> DataLoader[Any]:
    return DataLoader(numbers(count), 4, collate_fn=rows, **options)


def trainer(how: str, **flags: Any) -> pl.Trainer:
    warnings.simplefilter("ignore")
    if how != "auto":
        flags["strategy"] = DDGStrategy(num_stages=2, split_points=flags.pop("split", None))
    flags.pop("split", None)
    return quiet_trainer(devices=2 if how == "two" else 1, **{"max_epochs": 2, "num_sanity_val_steps": 0} | flags)


# ---- lengths


def lengths(how: str, train: Callable[[], Any], evaluated: Callable[[], Any], **flags: Any) -> Any:
    module, one = Seer(), trainer(how, **flags)
    one.fit(module, train(), evaluated())
    one.validate(module, evaluated(), verbose=False)
    one.test(module, evaluated(), verbose=False)
    predictions = one.predict(module, evaluated())
    return module.seen, one.global_step, predictions, one.current_epoch


def estimated(length: int) -> Callable[[], Any]:
    return lambda: DataLoader(Estimated(length), 4)


def of_two(first: int, second: int, mode: str) -> Callable[[], Any]:
    loaders = {"a": DataLoader(Estimated(first), 4), "b": DataLoader(Estimated(second, 8), 4)}
    return lambda: CombinedLoader(loaders, mode)  # type: ignore[arg-type]


LENGTHS: dict[str, Callable[[str], Any]] = {
    "validation too large": lambda how: lengths(how, mapped, estimated(24)),
    "validation too small": lambda how: lengths(how, mapped, estimated(8)),
    "training too large": lambda how: lengths(how, estimated(40), mapped),
    "training too small": lambda how: lengths(how, estimated(5), mapped),
    "training by one": lambda how: lengths(how, estimated(13), mapped),
    "learned": lambda how: lengths(how, lambda: DataLoader(Learning(40), 4), lambda: DataLoader(Learning(30), 4)),
    "several validated": lambda how: lengths(how, mapped, lambda: [estimated(24)(), mapped(), estimated(8)()]),
    "several trained": lambda how: lengths(how, of_two(30, 16, "max_size_cycle"), mapped),
    "shortest": lambda how: lengths(how, of_two(30, 40, "min_size"), mapped),
    "longest": lambda how: lengths(how, of_two(30, 4, "max_size"), mapped),
    "limited": lambda how: lengths(how, estimated(40), estimated(24), limit_train_batches=5, limit_val_batches=0.5),
    "not known": lambda how: lengths(how, lambda: DataLoader(Unsized(), 4), lambda: DataLoader(Unsized(), 4)),
    "within an epoch": lambda how: lengths(how, estimated(40), estimated(24), val_check_interval=2),
    "none": lambda how: lengths(how, mapped, lambda: DataLoader(Estimated(8, 0), 4)),
}


# ---- user code that looks at the Trainer's loaders


class Looks(pl.Callback):
    """Iterates over the Trainer's loaders, and asks them what they are."""

    def __init__(self, on_rank_zero_only: bool) -> None:
        self.only, self.seen = on_rank_zero_only, []  # type: ignore[var-annotated]

    def look(self, trainer: pl.Trainer, loaders: Any) -> None:
        if self.only and not trainer.is_global_zero:
            return
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            kind = type(loader).__name__
            assert isinstance(loader, DataLoader)
            size = None if isinstance(loader.dataset, Unsized) else len(loader)
            samplers = type(loader.sampler).__name__, type(loader.batch_sampler).__name__
            first = trainer.strategy.batch_to_device(next(iter(loader)))
            self.seen.append((kind, size, samplers, first.flatten().tolist(), sum(float(x.sum()) for x in loader)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer, trainer.train_dataloader)
        self.look(trainer, trainer.val_dataloaders)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.look(trainer, trainer.val_dataloaders)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer, trainer.train_dataloader)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer, trainer.val_dataloaders)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer, trainer.test_dataloaders)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not earlier: there is one iterator over the indices of a loader to predict.
        self.look(trainer, trainer.predict_dataloaders)


def looking(how: str, on_rank_zero_only: bool, train: Callable[[], Any], evaluated: Callable[[], Any]) -> Any:
    module, looks = Seer(), Looks(on_rank_zero_only)
    one = trainer(how, callbacks=[looks])
    one.fit(module, train(), evaluated())
    one.test(module, evaluated(), verbose=False)
    one.predict(module, evaluated())
    return looks.seen, module.seen


def unsized() -> DataLoader[Any]:
    return DataLoader(Unsized(), 4)


LOOKS: dict[str, Callable[[str], Any]] = {
    "looking everywhere": lambda how: looking(how, False, mapped, mapped),
    "looking on rank 0": lambda how: looking(how, True, mapped, lambda: [mapped(), mapped(8)]),
    "looking everywhere, no length": lambda how: looking(how, False, unsized, unsized),
    "looking on rank 0, no length": lambda how: looking(how, True, unsized, lambda: [unsized(), mapped()]),
    "looking at an estimate": lambda how: looking(how, False, estimated(40), estimated(24)),
}


# ---- order, seeds, resuming


def shuffled(how: str) -> Any:
    """Two fits, an evaluation between them, and weights drawn after each."""
    pl.seed_everything(5, verbose=False)
    result = []
    for _ in range(2):
        module = Seer()
        one = trainer(how)
        one.fit(module, mapped(shuffle=True), mapped())
        one.validate(module, mapped(shuffle=True), verbose=False)
        result.append((module.seen, torch.rand(3).tolist()))
    return result


class Noisy(Dataset[Any]):
    """Draws from torch's generator while reading, as augmentations do."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (torch.rand(1),)


def seeded_workers(how: str) -> Any:
    pl.seed_everything(6, workers=True, verbose=False)
    module, noisy = Seer(), DataLoader(Noisy(), 4, collate_fn=rows, num_workers=2, persistent_workers=True)
    trainer(how).fit(module, noisy)
    ended = noisy._iterator is None
    pl.seed_everything(6, workers=False, verbose=False)
    return module.seen, noisy.worker_init_fn is not None, ended


def weighted(how: str) -> Any:
    """A sampler whose weights a training step changes; in several processes another one reads (docs/limits.md)."""
    pl.seed_everything(7, verbose=False)
    weights = WeightedRandomSampler([1.0] * 12, 12)
    data = DataLoader(numbers(), 4, sampler=weights, collate_fn=rows)

    class Weighing(Seer):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            weights.weights[: int(batch.max())] = 0.01
            return loss

    module = Weighing()
    trainer(how).fit(module, data)
    return module.seen


class Stateful:
    """A loader that goes on where it was, as torchdata's does."""

    def __init__(self, count: int = 5) -> None:
        self.count, self.position, self.loaded = count, 0, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < self.count:
            self.position += 1
            yield torch.full((2, 1), float(self.position))
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.loaded = state["position"], self.loaded + 1


class Called(nn.Module):
    """A network that is traced, so that an example of its call is looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).tanh()).tanh())  # type: ignore[no-any-return]


class Loads(Seer):
    """Makes its loader when asked, and notes the epoch."""

    def __init__(self, traced: bool, make: Callable[[], Any]) -> None:
        super().__init__()
        if traced:
            self.net = Called()  # type: ignore[assignment]
        self.make = make
        self.asked: list[Any] = []

    def configure_optimizers(self) -> Any:
        self.asked.append("optimizers")
        return super().configure_optimizers()

    def train_dataloader(self) -> Any:
        self.asked.append(("data", self.trainer.current_epoch, self.trainer.global_step, self.trainer.state.fn.value))
        return self.make()


class SavesAt(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def resumed(how: str, path: Path, traced: bool, step: int, make: Callable[[], Any], split: Any = None) -> Any:
    file = path / f"{how}{traced}{step}.ckpt"
    first = Loads(traced, make)
    trainer(how, callbacks=[SavesAt(step, file)], max_epochs=3, split=split).fit(first)
    again = Loads(traced, make)
    one = trainer(how, max_epochs=3, split=split)
    one.fit(again, ckpt_path=file, **SAFELY)
    states = torch.load(file, weights_only=True)["loops"]["fit_loop"]["state_dict"]
    return first.seen, first.asked, again.seen, again.asked, states, one.global_step


def two_of_them() -> Any:
    return {"a": Stateful(5), "b": mapped(20), "c": Stateful(5)}


def resumes(path: Path) -> dict[str, Callable[[str], Any]]:
    return {
        "resumed": lambda how: resumed(how, path, False, 2, Stateful),
        "resumed, traced": lambda how: resumed(how, path, True, 7, Stateful),
        "resumed, cut by hand": lambda how: resumed(how, path, False, 8, Stateful, ["net.2"]),
        "resumed at an epoch's end": lambda how: resumed(how, path, True, 5, Stateful),
        "resumed, several": lambda how: resumed(how, path, False, 3, two_of_them),
        "resumed, not stateful": lambda how: resumed(how, path, True, 4, mapped),
    }


class MadeAtStart(Seer):
    """Makes or changes its data in ``on_fit_start``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.rows, self.asked = kind, torch.zeros(0, 1), 0
        if kind == "changed":
            self.rows = torch.ones(12, 1)

    def on_fit_start(self) -> None:
        if self.kind != "untouched":
            self.rows = torch.arange(12.0).unsqueeze(1)
        self.made = True

    def train_dataloader(self) -> Any:
        if self.kind == "missing":
            assert self.made
        owner = self

        class Lazy(Dataset[Any]):
            def __len__(self) -> int:
                return 12

            def __getitem__(self, index: int) -> tuple[Tensor]:
                return (owner.rows[index],)

        generator = torch.Generator().manual_seed(3)
        data = Lazy() if self.kind in ("lazy", "changed") else TensorDataset(self.rows)
        return DataLoader(data, 4, shuffle=len(data) > 0, collate_fn=rows, generator=generator)


def made_at_start(how: str, kind: str) -> Any:
    pl.seed_everything(8, verbose=False)
    module = MadeAtStart(kind)
    one = trainer(how)
    one.fit(module)
    return module.seen, one.global_step, torch.rand(2).tolist()


class Stream:
    """Can be read once."""

    def __init__(self) -> None:
        self.rows = iter([torch.full((2, 1), float(row)) for row in range(7)])

    def __iter__(self) -> Iterator[Tensor]:
        return self.rows


class AtStart(pl.Callback):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass


def streamed(how: str, **flags: Any) -> Any:
    module = Seer()
    trainer(how, max_epochs=1, **flags).fit(module, Stream())
    return module.seen


ORDERS: dict[str, Callable[[str], Any]] = {
    "two fits": shuffled,
    "seeded workers": seeded_workers,
    "a stream": streamed,
    "a stream, and a callback at the start": lambda how: streamed(how, callbacks=[AtStart()]),
    **{
        f"{kind} at the start": lambda how, kind=kind: made_at_start(how, kind)  # type: ignore[misc]
        for kind in ("missing", "empty", "lazy", "changed")
    },
}


def cases(path: Path) -> dict[str, Callable[[str], Any]]:
    return {**LENGTHS, **LOOKS, **ORDERS, **resumes(path)}


def run_all(how: str, path: Path) -> dict[str, Any]:
    return {name: case(how) for name, case in cases(path).items()}


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run_all, 2, "two", tmp_path_factory.mktemp("two"), timeout=250)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", list(cases(Path())))
def test_loaders_are_read_as_without_the_strategy(name: str, in_two: list[dict[str, Any]], tmp_path: Path) -> None:
    plain = cases(tmp_path)[name]("auto")
    assert cases(tmp_path)[name]("one") == plain
    assert in_two[0][name] == plain


# ---- errors


class Broken(Dataset[Any]):
    def __init__(self, at: int) -> None:
        self.at = at

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor]:
        if index == self.at:
            raise LookupError(f"sample {index} is broken")
        return (torch.full((1,), float(index)),)


class BrokenStream(IterableDataset[Any]):
    """Fails once, and would go on if it were asked again."""

    def __init__(self) -> None:
        self.failed = False

    def __iter__(self) -> Iterator[Any]:
        if not self.failed:
            self.failed = True
            raise LookupError("sample 0 is broken")
        yield torch.ones(1)


class SizedBrokenStream(BrokenStream):
    def __len__(self) -> int:
        return 3


class BrokenHook(Seer):
    def train_dataloader(self) -> Any:
        raise LookupError("sample 0 is broken")


def broken(how: str, kind: str, traced: bool, at_start: bool) -> None:
    module = BrokenHook() if kind == "hook" else Seer()
    if traced:
        module.net = Called()  # type: ignore[assignment]
    data: Any = {
        "map": DataLoader(Broken(0), 2, collate_fn=rows),
        "workers": DataLoader(Broken(1), 2, collate_fn=rows, num_workers=1),
        "later": DataLoader(Broken(3), 2, collate_fn=rows),
        "stream": DataLoader(BrokenStream(), 2),
        "sized stream": DataLoader(SizedBrokenStream(), 2),
        "hook": None,
    }[kind]
    trainer(how, callbacks=[AtStart()] if at_start else []).fit(module, data)


BROKEN = [
    ("map", False, False),
    ("map", True, True),
    ("workers", False, False),
    ("later", True, False),
    ("stream", False, False),
    ("stream", True, True),
    ("sized stream", False, True),
    ("sized stream", True, False),
    ("hook", True, False),
    ("hook", False, True),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "traced", "at_start"), BROKEN)
def test_an_error_of_the_data_is_the_error(kind: str, traced: bool, at_start: bool) -> None:
    with pytest.raises(LookupError, match="sample . is broken"):
        broken("one", kind, traced, at_start)


@pytest.mark.parametrize(("kind", "traced", "at_start"), [BROKEN[0], BROKEN[1], *BROKEN[4:8]])
def test_an_error_of_the_data_ends_all_ranks(kind: str, traced: bool, at_start: bool) -> None:
    loss, reads = run_ranks_raw(broken, 2, "two", kind, traced, at_start, timeout=60)
    assert "LookupError: sample 0 is broken" in (reads.error or "")
    assert "PeerError" in (loss.error or "")
    assert "LookupError: sample 0 is broken" in (loss.error or "")


@pytest.mark.filterwarnings("ignore:You defined")
def test_what_cannot_be_read_before_the_start_is_told_of() -> None:
    module = MadeAtStart("missing")
    module.made = False
    one = trainer("one")
    warnings.simplefilter("always")
    with pytest.warns(UserWarning, match=r"(?s)before `on_fit_start` \(AssertionError.*in `setup`"):
        one.fit(module)
    assert one.global_step == 6


def test_a_training_step_may_change_the_sampler_in_one_process() -> None:
    assert weighted("one") == weighted("auto")


def test_a_step_may_be_switched_off() -> None:
    module = Seer()
    module.validation_step = None  # type: ignore[assignment,method-assign]
    one = trainer("one")
    one.fit(module, mapped())
    assert one.global_step == 6
