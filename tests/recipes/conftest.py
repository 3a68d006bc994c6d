"""What the recipes' tests share lives here: small made-up data, the shared folder if there is one, the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.cli import LightningCLI
from PIL import Image

import lightning_ddg  # noqa: F401 - registers the strategy that the YAML files name

ROOT = Path(__file__).parents[2]
COLOURS = {"blue": (20, 20, 220), "green": (20, 220, 20), "red": (220, 20, 20)}


def make_images(root: Path, parts: dict[str, int], size: int) -> Path:
    """Write noisy one-coloured images into ``root``, ``parts[part]`` in each folder ``part/<colour>``."""
    rng = np.random.default_rng(0)
    for part, count in parts.items():
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.asarray(colour) + rng.integers(-20, 21, (size, size, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 12 test images of three classes, 32x32 pixels, in the layout that CifarData takes."""
    return make_images(tmp_path_factory.mktemp("images"), {"train": 8, "test": 4}, size=32)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 2000 bytes in which each follows from the one before."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("abcdefghi\n" * 200)
    return path


@pytest.fixture
def shared_file() -> Callable[[str], Path]:
    """Finds a file of the shared data, or skips the test saying so."""

    def find(name: str) -> Path:
        shared = Path(os.environ.get("LIGHTNING_DDG_SHARED") or ROOT.parent / "shared")
        if not (shared / "data" / name).is_file():
            pytest.skip(f"no data/{name} in the shared folder; LIGHTNING_DDG_SHARED may name that folder")
        return shared / "data" / name

    return find


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., LightningCLI]:
    """Builds what a recipe's YAML file describes, with further options; runs write into a temporary folder."""

    def build(recipe: str, *options: str) -> LightningCLI:
        # LightningCLI warns if it is given arguments while the test run itself has some.
        monkeypatch.setattr("sys.argv", ["lightning-ddg"])
        monkeypatch.chdir(tmp_path)
        return LightningCLI(args=["--config", str(ROOT / "recipes" / recipe), *options], run=False)

    return build
