"""What a study consists of lives here: its settings, the recipes it reads, and the list of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from recipes.study.methods import METHODS

FOLDER = Path(__file__).parents[1]

#: The recipes from which the optimizers' settings are taken, whatever recipe is trained.
OPTIMIZERS = {"sgd": "resnet_cifar", "adam": "resnet_cifar_adam"}

#: After which parts of the epochs the learning rate is divided by ten: the paper's, 150 and 225 of 300.
DROPS = (0.5, 0.75)


@dataclass(frozen=True)
class Settings:
    """What all runs of a study share: runs with other settings cannot be compared with them.

    Attributes:
        epochs: Of each run.
        train_images: As many are trained on; ``None`` for all.
        test_images: As many are tested on; ``None`` for all.
        data: Where the images are.
        lr: The learning rate at the start; ``None`` for the optimizer's recipe's.
        precision: The Trainer's.
        accelerator: The Trainer's.
    """

    epochs: int
    train_images: int | None
    test_images: int | None
    data: str
    lr: float | None
    precision: str
    accelerator: str

    @property
    def milestones(self) -> list[int]:
        """The epochs after which the learning rate drops, at least one each."""
        return sorted({max(1, round(part * self.epochs)) for part in DROPS})


@dataclass(frozen=True)
class Recipe:
    """What a study takes from a recipe's YAML file, and from the optimizer's.

    Attributes:
        network: ``class_path`` and ``init_args`` of the network.
        classes: Number of logits.
        dataset: Which of CIFAR's two.
        batch_size: Images in a training batch.
        optimizer: ``class_path`` and ``init_args`` of the optimizer.
    """

    network: dict[str, Any]
    classes: int
    dataset: str
    batch_size: int
    optimizer: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One fit.

    Attributes:
        recipe: The name of its YAML file, without the suffix.
        depth: Of the network; 0 for the recipe's own.
        optimizer: Of ``OPTIMIZERS``.
        method: Of ``METHODS``.
        stages: K.
        seed: Of the first weights, the order of the images and their augmentation.
    """

    recipe: str
    depth: int
    optimizer: str
    method: str
    stages: int
    seed: int

    @property
    def network(self) -> str:
        """The recipe, and the depth if it is not the recipe's own."""
        return f"{self.recipe}-{self.depth}" if self.depth else self.recipe

    @property
    def name(self) -> str:
        """Names the run, and its file."""
        return f"{self.network}_{self.optimizer}_{self.method}_K{self.stages}_seed{self.seed}"


def runs(
    recipes: Sequence[str],
    depths: Sequence[int],
    optimizers: Sequence[str],
    methods: Sequence[str],
    stages: Sequence[int],
    seeds: Sequence[int],
) -> Iterator[Run]:
    """Lists the runs, seed by seed: a study that is cut short has the same methods for each of its seeds.

    Backpropagation has one stage and the others have several, so that K = 1 stands for backpropagation alone.
    """
    for seed, recipe, depth, optimizer in product(seeds, recipes, depths or [0], optimizers):
        for method, number in product(methods, stages):
            if (METHODS[method].kind == "backprop") == (number == 1):
                yield Run(recipe, depth, optimizer, method, number, seed)


def find_recipe(name: str) -> Path:
    """Finds a recipe's YAML file by its path, or by its name in ``recipes/``.

    Raises:
        FileNotFoundError: If there is none.
    """
    for path in (Path(name), FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    raise FileNotFoundError(f"There is no recipe {name!r}: give a YAML file, or one of {known}.")


def read_recipe(path: Path, depth: int, optimizer: str) -> Recipe:
    """Reads what is trained, and how.

    Args:
        path: The recipe's YAML file.
        depth: In place of its own; 0 leaves it.
        optimizer: Of ``OPTIMIZERS``, in place of its own.

    Raises:
        ValueError: If it does not train an ``ImageClassifier`` on CIFAR, or its network has no depth to change.
    """
    said = yaml.safe_load(path.read_text())
    model, data = said.get("model", {}), said.get("data", {})
    if (model.get("class_path"), data.get("class_path")) != (
        "recipes.classifier.ImageClassifier",
        "recipes.cifar.CifarData",
    ):
        raise ValueError(
            f"{path.name} does not train recipes.classifier.ImageClassifier on recipes.cifar.CifarData: a study keeps"
            " CIFAR's images in memory; give resnet_cifar, resnet_cifar100, wide_resnet or a recipe like them."
        )
    network = dict(model["init_args"]["network"])
    if depth:
        if "depth" not in network["init_args"]:
            raise ValueError(f"--depth {depth}: the network of {path.name} has no depth; leave it out.")
        network["init_args"] = {**network["init_args"], "depth": depth}
    trained = yaml.safe_load((FOLDER / f"{OPTIMIZERS[optimizer]}.yaml").read_text())["optimizer"]
    settings = data["init_args"]
    return Recipe(network, model["init_args"]["classes"], settings["dataset"], settings["batch_size"], trained)
