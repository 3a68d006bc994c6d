"""One run lives here: a recipe's network is trained by a method, and what each epoch ended with is kept; what is
recorded may be changed here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import instantiate_class
from torch.optim.lr_scheduler import MultiStepLR

from lightning_ddg import DDGStrategy
from recipes.cifar_tensors import CifarTensors
from recipes.classifier import ImageClassifier
from recipes.dni import DNIClassifier
from recipes.study.grid import Recipe, Run, Settings
from recipes.study.methods import METHODS

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """All that a process must know to do a run.

    Attributes:
        run: Which one.
        recipe: What is trained.
        settings: The study's.
        split_points: Names of the submodules that begin stages ``2..K``.
        cache: The folder for images that have been decoded.
    """

    run: Run
    recipe: Recipe
    settings: Settings
    split_points: list[str]
    cache: Path


class Recorder(Callback):
    """Keeps what each epoch ended with; ``seconds`` are those of all training until then, without evaluation."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._seconds = 0.0
        self._start = 0.0
        self._lr = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds += time.perf_counter() - self._start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "lr": self._lr,
                "train_loss": found["train_loss_epoch"],
                "train_acc": found["train_acc"],
                "test_loss": found["val_loss"],
                "test_acc": found["val_acc"],
                "seconds": self._seconds,
            }
        )


def make_data(recipe: Recipe, settings: Settings, cache: Path, seed: int) -> CifarTensors:
    """The images of a run."""
    return CifarTensors(
        root=settings.data,
        dataset=recipe.dataset,  # type: ignore[arg-type]
        train_images=settings.train_images,
        test_images=settings.test_images,
        batch_size=recipe.batch_size,
        seed=seed,
        cache=str(cache),
    )


def make_module(recipe: Recipe, settings: Settings, method: str, stages: int) -> ImageClassifier:
    """What is trained, with its optimizer; the network's first weights depend on the seed alone, not on the method."""
    network = instantiate_class((), recipe.network)
    module: ImageClassifier
    if METHODS[method].kind == "dni":
        module = DNIClassifier(network, recipe.classes, stages, **METHODS[method].arguments)
    else:
        module = ImageClassifier(network, recipe.classes)
    # As LightningCLI does it, so that a recipe's module need not know its optimizer.
    module.configure_optimizers = partial(_optimize, module, recipe, settings)  # type: ignore[method-assign]
    return module


def _optimize(module: LightningModule, recipe: Recipe, settings: Settings) -> Any:
    init = dict(recipe.optimizer)
    if settings.lr is not None:
        init["init_args"] = {**init["init_args"], "lr": settings.lr}
    optimizer = instantiate_class(module.parameters(), init)
    return {"optimizer": optimizer, "lr_scheduler": MultiStepLR(optimizer, settings.milestones, gamma=0.1)}


def make_trainer(settings: Settings, **options: Any) -> Trainer:
    """A Trainer on one device that leaves no file behind."""
    return Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,  # type: ignore[arg-type]
        max_epochs=settings.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(job: Job) -> list[Row]:
    """Does a run.

    Returns:
        What each epoch ended with.
    """
    run, settings = job.run, job.settings
    # Sums are rounded otherwise by another number of threads, and a run must not depend on how many run beside it.
    torch.set_num_threads(1)
    seed_everything(run.seed, verbose=False)
    method = METHODS[run.method]
    module = make_module(job.recipe, settings, run.method, run.stages)
    options: dict[str, Any] = {"callbacks": [recorder := Recorder()]}
    if method.kind == "ddg":
        options["strategy"] = DDGStrategy(run.stages, job.split_points, **method.arguments)
    make_trainer(settings, **options).fit(module, make_data(job.recipe, settings, job.cache, run.seed))
    return recorder.rows
