"""Tests of the house: six storeys, arrows only down. The imports are read from the source; ``docs/architecture.md``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ParallelStrategy
from torch import nn

PACKAGE = Path(__file__).parents[1] / "lightning_ddg"

#: From the ground up; the face is what stands beside the folders.
STOREYS = ("core", "comm", "network", "planning", "plugin", "observe", "face")
FACE = {"__init__", "__main__", "version", "cli"}
LINES = {"plugin.strategy": 350}
MOST_LINES = 450
MAY_IMPORT = {
    "torchmetrics": {"plugin", "observe", "face"},
    "torch.distributed": {"comm", "plugin"},
}


@cache
def modules() -> dict[str, ast.Module]:
    """The source of each module, by its name below the package."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        trees[name.removesuffix(".__init__")] = ast.parse(path.read_text())
    return trees


def storey(name: str) -> str:
    first = name.partition(".")[0]
    return first if first in STOREYS else "face"


def imports(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Each module that is imported, wherever in the file, with the names taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            assert node.module is not None
            yield node.module, [alias.name for alias in node.names]


def arrows(name: str) -> set[str]:
    """The modules of the package that a module imports, below the package; its own name for the face."""
    found = set()
    for module, names in imports(modules()[name]):
        if module == "lightning_ddg":
            found |= {name if name in modules() else "__init__" for name in names}
        elif module.startswith("lightning_ddg."):
            inner = module.removeprefix("lightning_ddg.")
            within = {f"{inner}.{name}" for name in names} & modules().keys()
            found |= within or {inner}
    return found


def test_the_root_holds_the_storeys_and_the_face() -> None:
    entries = {path.stem for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert entries == {*STOREYS, *FACE} - {"face"}


def test_arrows_run_down() -> None:
    up = {
        f"{name} -> {other}"
        for name in modules()
        for other in arrows(name)
        if STOREYS.index(storey(other)) > STOREYS.index(storey(name))
    }
    assert up == set()


def test_nothing_goes_round_in_a_circle() -> None:
    graph = {name: arrows(name) - {name} for name in modules()}
    while ends := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in ends}
    # What only leads to a circle is not on it.
    while ends := {name for name in graph if not any(name in others for others in graph.values())}:
        graph = {name: others for name, others in graph.items() if name not in ends}
    assert graph == {}


def test_no_file_is_long() -> None:
    lengths = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > LINES.get(name, MOST_LINES)} == {}


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_libraries_stay_in_their_storeys(library: str) -> None:
    found = {
        name
        for name, tree in modules().items()
        for module, taken in imports(tree)
        for whole in (module, *(f"{module}.{one}" for one in taken))
        if whole == library or whole.startswith(f"{library}.")
        if storey(name) not in MAY_IMPORT[library]
    }
    assert found == set()


def test_lightning_is_imported_in_one_place() -> None:
    packages = {"lightning", "lightning_fabric", "pytorch_lightning"}
    found = {
        name for name, tree in modules().items() for module, _ in imports(tree) if module.split(".")[0] in packages
    }
    assert found == {"plugin.host"}


def private_names_of_lightning() -> set[str]:
    classes = (Trainer, LightningModule, ParallelStrategy, Callback, ModelCheckpoint, *map(type, loops()))
    names = {name for kind in classes for name in dir(kind)} | {name for loop in loops() for name in vars(loop)}
    own = set(dir(nn.Module())) | {name for name in names if name.startswith("__") or not name.startswith("_")}
    return names - own - {"_configure_launcher"}  # which every strategy that starts processes has to define


def loops() -> list[object]:
    trainer = Trainer(logger=False, enable_checkpointing=False, barebones=True)
    return [trainer, trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.predict_loop, LightningModule()]


def test_private_names_of_lightning_are_used_in_one_place() -> None:
    known = private_names_of_lightning()
    found = set()
    for name, tree in modules().items():
        if name in ("plugin.compat", "plugin.compat_data") or storey(name) not in MAY_IMPORT["torchmetrics"]:
            continue
        for module, taken in imports(tree):
            if module.partition(".")[0] == "lightning" or module == "lightning_ddg.plugin.host":
                found |= {f"{name}: {part}" for part in (*taken, *module.split(".")) if part.startswith("_")}
        nodes = list(ast.walk(tree))
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        own = {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}
        used = {node.attr for node in attributes} - own | {n.value for n in nodes if isinstance(n, ast.Constant)}
        found |= {f"{name}: {private}" for private in used & known}
    assert found == set()
