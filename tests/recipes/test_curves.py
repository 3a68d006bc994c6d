"""Tests of the learning curves live here: what is read from a log, what is drawn, and that a fit ends with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib.image
from lightning.pytorch.cli import LightningCLI

from recipes.curves import draw, read_curves

LOG = """\
epoch,lr-SGD,step,train_acc,train_loss_epoch,train_loss_step,val_acc,val_loss
,0.01,0,,,,,
0,,4,,,2.5,,
0,,7,,,,0.25,2.0
0,,7,0.5,2.25,,,
1,,15,,,,0.75,1.0
1,,15,0.625,1.5,,,
"""


def test_values_at_the_end_of_epochs_are_read(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text(LOG)
    assert read_curves(log) == {
        "train_acc": [(8, 0.5), (16, 0.625)],
        "train_loss": [(8, 2.25), (16, 1.5)],
        "val_acc": [(8, 0.25), (16, 0.75)],
        "val_loss": [(8, 2.0), (16, 1.0)],
    }


def test_each_kind_of_metric_has_a_panel_and_each_metric_a_line() -> None:
    curves = {"val_acc": [(8, 0.25), (16, 0.75)], "val_loss": [(8, 2.0)], "train_loss": [(8, 2.5)]}
    loss, accuracy = draw(curves).axes
    assert [axes.get_ylabel() for axes in (loss, accuracy)] == ["loss", "accuracy"]
    assert [line.get_label() for line in loss.lines] == ["train_loss", "val_loss"]
    (line,) = accuracy.lines
    assert line.get_xydata().tolist() == [[8, 0.25], [16, 0.75]]


def test_nothing_logged_draws_nothing() -> None:
    assert draw({}).axes == []


def test_a_fit_ends_with_its_curves(build: Callable[..., LightningCLI], text_file: Path, tmp_path: Path) -> None:
    options = ["--trainer.strategy", "auto", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
    options += ["--trainer.max_steps", "6", "--data.path", str(text_file), "--data.context", "16"]
    options += ["--model.network.n_layers", "1", "--model.network.width", "12", "--model.network.context", "16"]
    cli = build("gpt.yaml", *options, "--trainer.enable_progress_bar", "false")
    cli.trainer.fit(cli.model, cli.datamodule)
    folder = tmp_path / "runs/logs/gpt/version_0"
    curves = read_curves(folder / "metrics.csv")
    assert {"train_loss", "val_loss", "val_perplexity"} == curves.keys()
    picture = matplotlib.image.imread(folder / "curves.png")
    assert picture.shape[:2] == (525, 1500), "two panels, loss and perplexity, 5 x 3.5 inches each at 150 dots"
