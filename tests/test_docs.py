"""Tests of the documentation: lines are short enough to read in a diff, and the files that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCS += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]
PATHS = [str(path.relative_to(ROOT)) for path in DOCS]
MOST = 160


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Each line with its number that is neither of a table nor of a code block."""
    fenced, before = False, ""
    for number, line in enumerate(text.splitlines(), 1):
        indented = line.startswith("    ") and (not before.strip() or before.startswith("    "))
        if line.startswith("```"):
            fenced = not fenced
        elif not (fenced or line.startswith("|") or indented):
            yield number, line
        before = line


@pytest.mark.parametrize("path", PATHS)
def test_lines_are_short(path: str) -> None:
    long = [number for number, line in prose((ROOT / path).read_text()) if len(line) > MOST]
    assert not long, f"{path}: lines {long} have more than {MOST} characters"


@pytest.mark.parametrize("path", PATHS)
def test_links_lead_somewhere(path: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / path).read_text())
    files = {target.partition("#")[0] for target in targets if not target.startswith(("http:", "https:", "mailto:"))}
    missing = sorted(name for name in files if name and not ((ROOT / path).parent / name).exists())
    assert not missing, f"{path} links to {missing}"


@pytest.mark.parametrize("path", PATHS)
def test_files_that_are_named_exist(path: str) -> None:
    named = re.findall(r"`((?:tests|lightning_ddg|docs|recipes)/[^`\s:]*)`", (ROOT / path).read_text())
    missing = sorted({name for name in named if "NAME" not in name and not any(ROOT.glob(name.rstrip("/")))})
    assert not missing, f"{path} names {missing}"


def test_the_house_is_drawn_whole(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        subprocess.run([sys.executable, str(ROOT / "docs" / "house.py"), str(folder)], check=True, timeout=120)
    picture = (tmp_path / "one" / "house.svg").read_text()
    assert picture == (tmp_path / "two" / "house.svg").read_text()
    assert (tmp_path / "one" / "house.png").is_file()
    drawn = set(re.findall(r">([^<>]+)</text>", picture))
    package = ROOT / "lightning_ddg"
    for path in package.rglob("*.py"):
        storey, *rest = path.relative_to(package).parts
        assert (storey in drawn) if rest else ("face" in drawn)
        if path.name != "__init__.py" or not rest:
            assert ("/".join(rest) or storey) in drawn
