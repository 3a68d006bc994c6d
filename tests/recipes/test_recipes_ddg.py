"""Tests of the recipes under ``strategy: ddg`` live here: each YAML file as a user runs it, in 1 and 2 processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_ddg.cli import main

ROOT = Path(__file__).parents[2]


def fit(recipe: str, devices: int, options: list[str], folder: Path) -> None:
    """Run ``fit`` in ``folder`` on a few batches."""
    words = ["fit", "--config", str(ROOT / "recipes" / recipe)]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", str(devices), "--trainer.max_epochs", "1"]
    words += ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2", *options]
    if devices == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            main(words)
        return
    ended = subprocess.run(
        [sys.executable, "-m", "lightning_ddg", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr


def columns(folder: Path) -> Iterator[str]:
    """Yield the names of what was logged."""
    for path in folder.glob("runs/logs/*/version_0/metrics.csv"):
        yield from path.read_text().splitlines()[0].split(",")


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resnet_trains(devices: int, image_folder: Path, tmp_path: Path) -> None:
    options = ["--data.root", str(image_folder), "--data.batch_size", "6", "--data.num_workers", "0"]
    fit("resnet_cifar.yaml", devices, [*options, "--model.network.depth", "8"], tmp_path)
    assert {"train_loss_epoch", "train_acc", "val_loss", "val_acc"} <= set(columns(tmp_path))
    assert (tmp_path / "runs/resnet_cifar/best.ckpt").is_file()
    assert (tmp_path / "runs/logs/resnet_cifar/version_0/curves.png").is_file()


@pytest.mark.parametrize("devices", [1, 2])
def test_gpt_trains(devices: int, text_file: Path, tmp_path: Path) -> None:
    options = ["--data.path", str(text_file), "--data.context", "16", "--data.batch_size", "8"]
    options += ["--model.network.n_layers", "2", "--model.network.width", "32", "--model.network.heads", "2"]
    fit("gpt.yaml", devices, [*options, "--model.network.context", "16"], tmp_path)
    assert {"train_loss_epoch", "val_loss", "val_perplexity"} <= set(columns(tmp_path))
    assert (tmp_path / "runs/gpt/best.ckpt").is_file()


@pytest.mark.slow  # three more pairs of processes
@pytest.mark.parametrize(
    ("recipe", "small"),
    [
        ("wide_resnet", ["--model.network.depth", "10", "--model.network.widen", "1"]),
        ("vit_cifar", ["--model.network.num_layers", "2", "--model.network.hidden_dim", "48"]),
        ("resnet50", ["--data.size", "32"]),
    ],
)
def test_other_image_recipes_train_in_two_processes(
    recipe: str, small: list[str], image_folder: Path, tmp_path: Path
) -> None:
    # The image folder's parts are named as CIFAR's here; ImageNet's calls the second one val.
    (tmp_path / "data").mkdir()
    for name, part in (("train", "train"), ("test", "test"), ("val", "test")):
        (tmp_path / "data" / name).symlink_to(image_folder / part)
    options = ["--data.root", str(tmp_path / "data"), "--data.batch_size", "6", "--data.num_workers", "0"]
    fit(f"{recipe}.yaml", 2, [*options, *small], tmp_path)
    assert {"train_loss_epoch", "train_acc", "val_loss", "val_acc"} <= set(columns(tmp_path))
    assert (tmp_path / "runs" / recipe / "best.ckpt").is_file()
