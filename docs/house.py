"""The picture of the package: its folders as storeys, their files as rooms, their imports as arrows.

python docs/house.py            # writes docs/images/house.svg and house.png
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PACKAGE = Path(__file__).parents[1] / "lightning_ddg"
FACE = "face"
STOREYS = ("core", "comm", "network", "planning", "plugin", "observe", FACE)  # from the ground up
COLOURS = ("#4c72b0", "#55a868", "#c98b2b", "#8172b3", "#a8487c", "#4aa3b8", "#5f6a72")
COLUMNS, ROOM, ROOM_HEIGHT, SPACE, LEFT, GAP, LANE = 5, 2.3, 0.62, 0.12, 2.3, 0.55, 0.34


def rooms() -> dict[str, list[tuple[str, int]]]:
    """The files of each storey, with their lines; empty ones are left out."""
    found: dict[str, list[tuple[str, int]]] = {storey: [] for storey in STOREYS}
    for path in sorted(PACKAGE.rglob("*.py")):
        inner = path.relative_to(PACKAGE).parts
        if path.name != "__init__.py" or len(inner) == 1:
            storey, name = (inner[0], "/".join(inner[1:])) if inner[0] in STOREYS else (FACE, inner[0])
            found[storey].append((name, len(path.read_text().splitlines())))
    return found


def imports() -> dict[tuple[str, str], int]:
    """How many imports lead from one storey to another."""
    found: Counter[tuple[str, ...]] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("lightning_ddg."):
                inside = f"{node.module}.{node.names[0].name}".split(".")[1]
                found[tuple(name if name in STOREYS else FACE for name in (source, inside))] += 1
    return {(source, target): count for (source, target), count in found.items() if source != target}


def box(axes: Axes, x: float, y: float, width: float, height: float, **style: Any) -> None:
    """A box with round corners."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", **style))


def draw_storeys(axes: Axes) -> tuple[dict[str, tuple[float, float]], float]:
    """Draw storeys and rooms; return where each begins and ends upwards, and the right edge of all."""
    spans, y, right = {}, 0.0, LEFT + COLUMNS * (ROOM + SPACE) + SPACE
    for (storey, files), colour in zip(rooms().items(), COLOURS, strict=True):
        rows = max(2, -(-len(files) // COLUMNS))
        top = y + rows * (ROOM_HEIGHT + SPACE) + SPACE
        box(axes, 0, y, right, top - y, facecolor=colour, alpha=0.16, edgecolor="none")
        lines = f"{sum(lines for _, lines in files):,} lines"
        axes.text(0.25, (y + top) / 2 + 0.15, storey, va="center", fontsize=15, weight="bold", color=colour)
        axes.text(0.25, (y + top) / 2 - 0.25, lines, va="center", fontsize=9, color=colour)
        ceiling = top - (rows - -(-len(files) // COLUMNS)) * (ROOM_HEIGHT + SPACE) / 2
        for i, (name, count) in enumerate(files):
            left = LEFT + (i % COLUMNS) * (ROOM + SPACE) + SPACE
            bottom = ceiling - (i // COLUMNS + 1) * (ROOM_HEIGHT + SPACE)
            box(axes, left, bottom, ROOM, ROOM_HEIGHT, facecolor="white", edgecolor=colour, linewidth=1)
            middle, size = left + ROOM / 2, 9.5 if len(name) < 20 else 7.8
            axes.text(middle, bottom + 0.40, name, ha="center", va="center", fontsize=size, color="#222222")
            axes.text(middle, bottom + 0.16, str(count), ha="center", va="center", fontsize=7.5, color="#777777")
        spans[storey] = (y, top)
        y = top + GAP
    return spans, right


def draw_arrows(axes: Axes, spans: dict[str, tuple[float, float]], right: float) -> float:
    """Draw one arrow for each pair of storeys, in a lane of its own beside the house; return the last lane."""
    level = {storey: i for i, storey in enumerate(STOREYS)}
    pairs = sorted(imports().items(), key=lambda pair: (abs(level[pair[0][0]] - level[pair[0][1]]), level[pair[0][0]]))
    # At each storey the ends are spread over its height: those that lead up above those that lead down.
    ends: dict[str, list[tuple[tuple[int, int], tuple[str, str]]]] = {storey: [] for storey in STOREYS}
    for lane, (pair, _) in enumerate(pairs):
        for here, there in (pair, pair[::-1]):
            up = level[there] > level[here]
            ends[here].append(((0, lane) if up else (1, -lane), pair))
    height = {}
    for storey, found in ends.items():
        low, top = spans[storey]
        for i, (_, pair) in enumerate(sorted(found)):
            height[storey, pair] = top - (i + 1) * (top - low) / (len(found) + 1)
    for lane, (pair, count) in enumerate(pairs):
        x, start, end = right + 0.75 + lane * LANE, height[pair[0], pair], height[pair[1], pair]
        colour = COLOURS[level[pair[0]]] if level[pair[0]] > level[pair[1]] else "red"
        axes.plot([right, x, x, right + 0.14], [start, start, end, end], color=colour, linewidth=1.3)
        axes.plot([right + 0.08], [end], marker="<", markersize=5, color=colour)
        note = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axes.text(right + 0.4, start, str(count), fontsize=8, color=colour, ha="center", va="center", bbox=note)
    return right + 0.75 + len(pairs) * LANE


def main(folder: Path) -> None:
    """Write the picture into a folder, as SVG and PNG; the same bytes for the same code."""
    rcParams.update({"svg.hashsalt": "house", "svg.fonttype": "none", "font.family": "DejaVu Sans"})
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    spans, right = draw_storeys(axes)
    width, top = draw_arrows(axes, spans, right) + 0.3, max(top for _, top in spans.values())
    total = sum(count for files in rooms().values() for _, count in files)
    legend = f"{total:,} lines. At an arrow: how many imports lead from the one storey to the other."
    axes.text(0.25, -0.35, legend, fontsize=9.5, va="center", color="#444444")
    axes.set(xlim=(-0.2, width), ylim=(-0.7, top + 0.2))
    axes.axis("off")
    figure.set_size_inches((width + 0.2) * 0.62, (top + 0.9) * 0.62)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "house.svg", metadata={"Date": None})
    figure.savefig(folder / "house.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
