"""Tests of what recipes import of the package: ``recipes/README.md`` says it. The imports are read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"

#: By folder: the modules below ``lightning_ddg`` that may be imported, or the folders of them; the face always may be.
MAY_IMPORT = {
    ".": set(),
    "experiments": set(),
    "faults": set(),
    "study": {"planning"},
    "benchmarks": {"core", "comm", "network", "planning"},
}


def imported(path: Path) -> set[str]:
    """What a file imports from below the package, wherever in the file: dotted names without ``lightning_ddg``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lightning_ddg":
            # A folder or a file of the package can be taken from it like a public name.
            inner = {alias.name for alias in node.names if not alias.name[0].isupper()}
            found |= {f"lightning_ddg.{name}" for name in inner}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
    return {name.removeprefix("lightning_ddg.") for name in found if name.startswith("lightning_ddg.")}


def test_every_folder_is_named() -> None:
    assert {str(path.parent.relative_to(RECIPES)) for path in RECIPES.rglob("*.py")} == MAY_IMPORT.keys()


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_recipes_import_what_the_readme_says(folder: str) -> None:
    allowed = MAY_IMPORT[folder]
    for path in sorted((RECIPES / folder).glob("*.py")):
        over = {name for name in imported(path) if not any(f"{name}.".startswith(f"{one}.") for one in allowed)}
        assert not over, f"{path.relative_to(RECIPES)} imports {sorted(over)}"


def test_the_readme_names_what_each_folder_may_import() -> None:
    rows = [line for line in (RECIPES / "README.md").read_text().splitlines() if line.startswith("|")]
    for folder, allowed in MAY_IMPORT.items():
        if folder == ".":
            continue
        (row,) = [row for row in rows if row.startswith(f"| `recipes/{folder}/`")]
        storeys = {"core", "comm", "network", "planning", "plugin", "observe"}
        assert {one for one in storeys if f"`lightning_ddg.{one}`" in row} == {one.partition(".")[0] for one in allowed}


def test_imports_are_found(tmp_path: Path) -> None:
    path = tmp_path / "recipe.py"
    lines = ["import lightning_ddg.core.stage", "from lightning_ddg import DDGStrategy, plugin"]
    path.write_text("\n".join([*lines, "def late():", "    from lightning_ddg.comm.wire import pack"]))
    assert imported(path) == {"core.stage", "plugin", "comm.wire"}
