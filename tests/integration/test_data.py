"""One process reads the data: every kind of loader and batch reaches the loss rank as it was read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.networks import SAFELY, Classifier, largest_difference, quiet_trainer, state_of


@dataclass
class Sample:
    """A batch as people write them: tensors, names and nests in a dataclass."""

    x: Tensor
    extra: dict[str, Any]


class Recorder(pl.LightningModule):
    """Notes on every rank which samples its training step saw, and whether input and target belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
        self.seen: list[list[float]] = []

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, Sample):
            assert batch.extra["names"] == ["a", ("b", 3)]
            return batch.x, batch.extra["nest"][0]["y"]
        if isinstance(batch, dict):
            return batch["x"], batch["y"]
        if isinstance(batch, Tensor):
            return batch, batch
        return batch[0], batch[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.unpack(batch)
        output = self.net(x)
        assert torch.equal(x, y), "input and target are of different samples"
        self.seen.append(x.flatten().tolist())
        return (output - y).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.unpack(batch)
        assert torch.equal(x, y)
        self.seen.append(x.flatten().tolist())
        self.net(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Numbers(Dataset[Any]):
    def __init__(self, count: int = 22) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


class Noisy(Numbers):
    """Draws from torch's generator while reading, as augmentations do."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(1)


class Stream(IterableDataset[Any]):
    """No length, and a random number of samples."""

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(int(torch.randint(9, 23, ()))):
            yield torch.tensor([float(index)])


class OwnLoader:
    """An iterable with a length that is no DataLoader."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        return (as_pair([torch.rand(1)]) for _ in range(6))


def as_pair(samples: list[Tensor]) -> Any:
    x = torch.stack(samples)
    return x, x.clone()


def as_dict(samples: list[Tensor]) -> Any:
    x, y = as_pair(samples)
    return {"x": x, "y": y}


def as_dataclass(samples: list[Tensor]) -> Any:
    x, y = as_pair(samples)
    return Sample(x, {"names": ["a", ("b", 3)], "nest": ({"y": y}, torch.arange(3), torch.tensor([True]))})


def as_mixup(samples: list[Tensor]) -> Any:
    x = torch.stack(samples)
    mixed = 0.5 * x + torch.rand(()) * x[torch.randperm(len(x))]
    return mixed, mixed.clone()


def loaders() -> dict[str, Any]:
    return {
        "pair_shuffled": DataLoader(Numbers(), 5, shuffle=True, collate_fn=as_pair),
        "workers": DataLoader(Noisy(), 5, shuffle=True, collate_fn=as_pair, num_workers=2),
        "mixup": DataLoader(Numbers(), 5, shuffle=True, collate_fn=as_mixup),
        "dict": DataLoader(Numbers(), 5, collate_fn=as_dict),
        "dataclass": DataLoader(Numbers(), 5, shuffle=True, collate_fn=as_dataclass),
        "tensor": DataLoader(Numbers(), 5, shuffle=True),
        "sampler": DataLoader(Numbers(), 4, sampler=RandomSampler(Numbers(), replacement=True), collate_fn=as_pair),
        "stream": DataLoader(Stream(), 4, collate_fn=as_pair),
        "own_class": OwnLoader(),
    }


def train_on(name: str, limit: Any = None) -> tuple[int, list[list[float]], int]:
    torch.seed()
    module = Recorder()
    loader = loaders()[name]
    limits = {} if limit is None else {"limit_train_batches": limit}
    trainer = quiet_trainer(devices=3, strategy="ddg", max_epochs=2, num_sanity_val_steps=1, **limits)
    trainer.fit(module, loader, loader if name != "workers" else None)
    return trainer.global_rank, module.seen, trainer.global_step


def train_on_all() -> list[Any]:
    warnings.simplefilter("ignore")
    cases = [(name, None) for name in loaders()] + [("pair_shuffled", 3), ("stream", 2), ("pair_shuffled", 0.5)]
    return [(case, train_on(*case)) for case in cases]


def test_every_loader_and_batch() -> None:
    ranks = run_ranks(train_on_all, 3, timeout=200)
    for (case, loss_rank), *others in zip(*ranks, strict=True):
        rank, seen, steps = loss_rank
        assert rank == 0
        assert seen, case
        for _, (_, _, other_steps) in others:
            assert other_steps == steps, case
    by_case = dict(ranks[0])
    assert by_case["pair_shuffled", 3][2] == 6
    assert by_case["stream", 2][2] == 4
    # sanity check 1, then two epochs of 5 training and 5 validation batches
    _, seen, steps = by_case["pair_shuffled", None]
    assert steps == 10
    assert len(seen) == 1 + 2 * (5 + 5)
    first_epoch = sum(seen[1:6], [])
    assert sorted(first_epoch) == [float(i) for i in range(22)]
    assert first_epoch != sorted(first_epoch)
    assert len(seen[5]) == 2


class WithNoise(Classifier):
    """Draws in the step, before and after the network, as a diffusion model does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn_like(x)
        output = self.net(x + noise)
        return nn.functional.cross_entropy(output, y) + (noise - noise.detach()).sum() + noise.mean() * output.sum()


def fit_with_noise(devices: int) -> Any:
    from tests.networks import loader

    warnings.simplefilter("ignore")
    pl.seed_everything(3)
    module = WithNoise("mlp", "sgd")
    strategy = DDGStrategy(num_stages=3, split_points=["net.2", "net.5"])
    quiet_trainer(devices=devices, strategy=strategy).fit(module, loader("mlp"))
    return state_of(module)


def test_draws_of_the_step_agree_on_all_ranks() -> None:
    alone = fit_with_noise(1)
    for got in run_ranks(fit_with_noise, 3, 3):
        assert largest_difference(alone, got) <= 1e-12


class Augmented(Recorder):
    """Uses the batch transfer hooks."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert isinstance(batch, Tensor)
        return batch + 100

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 2


def train_augmented() -> Any:
    warnings.simplefilter("ignore")
    module = Augmented()
    quiet_trainer(devices=2, strategy="ddg", max_epochs=1).fit(module, DataLoader(Numbers(4), 2))
    return module.seen


def test_batch_transfer_hooks_run_once() -> None:
    loss_rank, _ = run_ranks(train_augmented, 2)
    assert loss_rank == [[200.0, 202.0], [204.0, 206.0]]


class CountsReplicas(Classifier):
    """What user code asks for the number of replicas, and what it would divide by it."""

    def on_train_start(self) -> None:
        trainer = self.trainer
        self.found = {
            "world_size": trainer.world_size,
            "num_replicas": (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"],
            "batches": trainer.num_training_batches,
            "steps": trainer.estimated_stepping_batches,
            "samples": len(trainer.train_dataloader.dataset),
        }


def count_replicas(strategy: str, devices: int) -> dict[str, Any]:
    module = CountsReplicas()
    data = TensorDataset(torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 3, (20,)))
    quiet_trainer(strategy=strategy, devices=devices, max_epochs=3).fit(module, DataLoader(data, batch_size=4))
    return module.found


def test_there_is_one_replica_whatever_the_world_size() -> None:
    """As `docs/compatibility.md` says."""
    plain = run_ranks(count_replicas, 1, "auto", 1)[0]
    assert plain == {"world_size": 1, "num_replicas": 1, "batches": 5, "steps": 15, "samples": 20}
    assert run_ranks(count_replicas, 1, "ddg", 1) == [plain]
    assert run_ranks(count_replicas, 2, "ddg", 2) == [{**plain, "world_size": 2}] * 2


class Shuffles(Sampler[int]):
    """Its order follows from the epoch alone."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class SeesOrder(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.order: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.order += batch[0][:, 0].tolist()
        return super().training_step(batch, batch_idx)


def see_order(strategy: str, devices: int) -> list[float]:
    module = SeesOrder()
    x = torch.arange(8, dtype=torch.float64)[:, None].expand(8, 6)
    loader = DataLoader(TensorDataset(x, torch.zeros(8, dtype=torch.long)), batch_size=4, sampler=Shuffles())
    quiet_trainer(strategy=strategy, devices=devices).fit(module, loader)
    return module.order[-24:]


def test_a_sampler_is_told_the_epoch() -> None:
    plain = run_ranks(see_order, 1, "auto", 1)[0]
    assert plain[:8] != plain[8:16]
    assert run_ranks(see_order, 1, "ddg", 1) == [plain]
    assert run_ranks(see_order, 2, "ddg", 2)[0] == plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", ["auto", "ddg"])
def test_a_sampler_is_told_the_epoch_before_the_first_batch_of_a_resumed_fit(strategy: str, tmp_path: Path) -> None:
    """What the network is found by is read early."""
    x = torch.arange(8, dtype=torch.float64)[:, None].expand(8, 6)
    data = TensorDataset(x, torch.zeros(8, dtype=torch.long))

    def see(epochs: int, path: str | None = None) -> list[float]:
        module, saving = SeesOrder(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = quiet_trainer(
            strategy=strategy, devices=1, max_epochs=epochs, callbacks=[saving], enable_checkpointing=True
        )
        trainer.fit(module, DataLoader(data, batch_size=4, sampler=Shuffles()), ckpt_path=path, **SAFELY)
        return module.order[-8:]

    whole = see(2)
    assert see(2, str(tmp_path / "epoch=0.ckpt")) == whole
