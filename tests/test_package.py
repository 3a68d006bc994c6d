"""Tests of what is shipped live here: one version, a wheel with the package alone, and commands that work from it.

The wheel is built in a copy of the checkout (a build leaves folders behind) with the tools of the environment that runs
the tests, and installed into an empty folder, so nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from lightning_ddg.version import __version__

ROOT = Path(__file__).parents[1]


def run(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    merged = os.environ | environment
    ended = subprocess.run(command, cwd=folder, env=merged, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a freshly built wheel."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("lightning_ddg", "recipes", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, copy], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run([*pip, "--target", folder, wheel], folder)
    return folder


def test_version_is_written_in_one_place() -> None:
    sources = [ROOT / "pyproject.toml", *(ROOT / "lightning_ddg").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert [path.name for path in sources if f'"{__version__}"' in path.read_text()] == ["version.py"]


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.split("/")[0] for name in names} == {"lightning_ddg", f"lightning_ddg-{__version__}.dist-info"}
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_ddg").rglob("*.py")]
    assert {*sources, "lightning_ddg/py.typed"} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert re.search(rf"^Version: {re.escape(__version__)}$", metadata, re.MULTILINE)
    assert re.search(r"^License-Expression: Apache-2\.0$", metadata, re.MULTILINE)


def test_installed_package_imports_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import lightning_ddg, importlib.metadata as metadata;"
        "from lightning.pytorch.strategies import StrategyRegistry;"
        "print(lightning_ddg.__file__);"
        "print(lightning_ddg.__version__, metadata.version('lightning-ddg'));"
        "print(sorted(name for name in StrategyRegistry.available_strategies() if name.startswith('ddg')))"
    )
    where, versions, strategies = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(where) == installed / "lightning_ddg" / "__init__.py"
    assert versions == f"{__version__} {__version__}"
    assert strategies == "['ddg', 'ddg_notebook', 'ddg_spawn']"


PROJECT = """
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn


class Module(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))

    def on_fit_start(self):
        print(f"stage {self.trainer.strategy.stage} of {self.trainer.world_size}")
"""

CONFIG = """
trainer:
  accelerator: cpu
  devices: 2
  strategy: ddg
  max_epochs: 1
  limit_train_batches: 2
  limit_val_batches: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: project.Module
"""


def test_the_command_runs_a_project_beside_its_yaml_in_every_process(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "project.py").write_text(PROJECT)
    (tmp_path / "config.yaml").write_text(CONFIG)
    printed = run(
        [installed / "bin" / "lightning-ddg", "fit", "--config", "config.yaml"], tmp_path, PYTHONPATH=str(installed)
    )
    # Two processes may print on one line.
    assert "stage 1 of 2" in printed
    assert "stage 2 of 2" in printed
