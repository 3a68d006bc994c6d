"""Tests of the digits recipe live here: its shapes, its split, its YAML file; ``make demo`` is what trains it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lightning_ddg import DDGStrategy
from recipes.digits import DigitsData, DigitsModule

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data() -> DigitsData:
    data = DigitsData(batch_size=16)
    data.setup("fit")
    return data


def test_batches_are_grey_images_in_the_unit_interval(data: DigitsData) -> None:
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (16, 1, 8, 8)
        assert images.dtype == torch.float32
        assert images.min() == 0
        assert images.max() == 1
        assert labels.shape == (16,)
        assert labels.dtype == torch.int64


def test_split_covers_every_image_once(data: DigitsData) -> None:
    indices = [*data.train.indices, *data.val.indices, *data.test.indices]
    assert len(data.train) > len(data.test) > len(data.val) > 0
    assert sorted(indices) == list(range(1797))


def test_split_is_the_same_in_every_run(data: DigitsData) -> None:
    torch.manual_seed(torch.initial_seed() + 1)
    again = DigitsData()
    again.setup("test")
    assert again.train.indices == data.train.indices
    assert again.val.indices == data.val.indices
    assert again.test.indices == data.test.indices


def test_every_class_is_in_every_part(data: DigitsData) -> None:
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert torch.cat([labels for _, labels in loader]).unique().tolist() == list(range(10))


def test_only_training_images_are_shuffled(data: DigitsData) -> None:
    def labels(loader: torch.utils.data.DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        return torch.cat([batch[1] for batch in loader])

    assert not torch.equal(labels(data.train_dataloader()), labels(data.train_dataloader()))
    assert torch.equal(labels(data.test_dataloader()), labels(data.test_dataloader()))


def test_module_maps_images_to_logits_through_a_sequence_of_layers() -> None:
    module = DigitsModule(width=4)
    images = torch.rand(3, 1, 8, 8)
    logits = module(images)
    assert logits.shape == (3, 10)
    assert isinstance(module.net, torch.nn.Sequential)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"net"}
    loss = module.training_step((images, torch.tensor([0, 1, 2])), 0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("stages", [2, 3])
def test_yaml_builds_the_whole_project(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # LightningCLI warns if it is given arguments while the test run itself has some.
    monkeypatch.setattr("sys.argv", ["lightning-ddg"])
    cli = LightningCLI(args=["--config", "recipes/digits.yaml", "--trainer.devices", str(stages)], run=False)

    assert isinstance(cli.model, DigitsModule)
    assert isinstance(cli.datamodule, DigitsData)
    assert isinstance(cli.trainer.strategy, DDGStrategy)
    assert cli.trainer.num_devices == stages
    assert isinstance(cli.trainer.logger, CSVLogger)
    checkpoint = cli.trainer.checkpoint_callback
    assert isinstance(checkpoint, ModelCheckpoint)
    assert checkpoint.monitor == "val_acc"
    (optimizer,), (scheduler,) = cli.model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert scheduler.T_max == cli.trainer.max_epochs
