"""Pictures of a schedule, as pipeline papers draw them: one row a stage, a box for each forward and backward.

What is drawn are :class:`~lightning_ddg.planning.simulate.Event` objects, simulated or measured. matplotlib is imported
only when something is drawn, and its global state is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ddg.planning.simulate import Event
from lightning_ddg.planning.units import show_ms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

# Of one lightness, so that no batch stands out; neighbours are far apart in hue.
_COLOURS = ("#3274a1", "#d9822b", "#3a923a", "#b03a5b", "#7b63a8", "#8a6a4f", "#c26bb0", "#2a9d94")
_IDLE, _INK, _FAINT = "#ededed", "#222222", "#8a8a8a"
_WIDTH = 10.0  # inches
_ROW = 0.34  # inches
_UNDER = 0.8  # rows of room for the mark of the period
_BOX = 0.82  # of a row
_TINT = 0.62  # how much white is in a forward's colour
_FONT = 7.5  # points
_DIGIT = 0.62  # width of a digit, of the font's size


@dataclass(frozen=True)
class Panel:
    """One schedule of the picture, with a row for each stage; its period is marked below the last one."""

    title: str
    events: Sequence[Event]
    num_stages: int
    period: float


def check_picture(path: str | Path) -> None:
    """Refuse a picture that cannot be drawn, before any work is done.

    Raises:
        ValueError: The name ends neither in ``.png`` nor in ``.svg``.
        ImportError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"The picture {str(path)!r} is of no known kind: let its name end in .png or .svg.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{str(path)!r} cannot be drawn, as matplotlib is missing: pip install "lightning-ddg[plot]".'
        ) from error


def draw_timeline(panels: Sequence[Panel], path: str | Path, *, span: tuple[float, float]) -> None:
    """Draw schedules below each other, on one scale of time.

    A colour is a batch; forwards are pale, backwards are full, waits are grey.

    Args:
        panels: What to draw, from top to bottom; one or more.
        path: Where to write the picture; ``.png`` or ``.svg`` by its suffix. Missing folders are made.
        span: The seconds between which the schedules are shown; the axis begins at 0.

    Raises:
        ValueError: The name ends neither in ``.png`` nor in ``.svg``, or nothing would be seen.
        ImportError: matplotlib is not installed.
    """
    check_picture(path)
    start, stop = span
    if not panels or not stop > start:
        raise ValueError(f"{len(panels)} panels from {start} s to {stop} s: there is nothing to draw.")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [panel.num_stages + _UNDER for panel in panels]
    # Text stays text in an SVG file, and its ids do not change from run to run.
    with rc_context({"font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "lightning-ddg"}):
        figure = Figure(figsize=(_WIDTH, sum(rows) * _ROW + 0.4 * len(panels) + 0.6), layout="constrained")
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=rows)
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            _draw_panel(axes, panel, start, stop)
        grid[-1, 0].set_xlabel("time (ms)", color=_INK)
        _add_legend(figure)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # Without a date the same numbers give the same file.
        figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix.lower() == ".svg" else None)


def _draw_panel(axes: Axes, panel: Panel, start: float, stop: float) -> None:
    points = _WIDTH * 0.9 * 72 / (stop - start)
    for event in panel.events:
        left, right = max(event.start, start), min(event.end, stop)
        if right <= left:
            continue
        style: dict[str, Any] = {"facecolors": _IDLE, "linewidth": 0.0}
        if event.kind != "idle":
            style = {"facecolors": _colour(event), "edgecolors": "white", "linewidth": 0.6}
        low = event.stage - _BOX / 2
        axes.broken_barh([((left - start) * 1e3, (right - left) * 1e3)], (low, _BOX), **style)
        label = str(event.batch)
        if event.kind != "idle" and (right - left) * points > len(label) * _DIGIT * _FONT + 2:
            middle = ((left + right) / 2 - start) * 1e3
            colour = "white" if event.kind == "B" else _INK
            axes.text(middle, event.stage, label, ha="center", va="center", fontsize=_FONT, color=colour)
    axes.set_xlim(0, (stop - start) * 1e3)
    axes.set_ylim(panel.num_stages + 0.5 + _UNDER, 0.5)
    stages = range(1, panel.num_stages + 1)
    axes.set_yticks(stages, [f"stage {stage}" for stage in stages] if panel.num_stages > 1 else ["all layers"])
    axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=_INK)
    axes.tick_params(axis="x", labelsize=9, labelcolor=_INK, color=_FAINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.set_title(panel.title, loc="left", fontsize=10.5, color=_INK)
    _mark_period(axes, panel, start, stop)


def _mark_period(axes: Axes, panel: Panel, start: float, stop: float) -> None:
    """Mark one period below the last stage, as late as it fits: there the schedule has settled."""
    last = panel.num_stages
    begins = [event.start for event in panel.events if event.stage == last and event.kind == "F"]
    fitting = [begin for begin in begins if begin >= start and begin + panel.period <= stop]
    if not fitting:
        return
    left, right = ((second - start) * 1e3 for second in (fitting[-1], fitting[-1] + panel.period))
    height = last + 0.72
    arrow = {"arrowstyle": "<->", "color": _INK, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (left, height), (right, height), arrowprops=arrow)
    for edge in (left, right):
        axes.plot([edge, edge], [last + _BOX / 2, height + 0.18], color=_INK, linewidth=0.8)
    text = f"period {show_ms(panel.period)}  "
    axes.text(left, height + 0.02, text, ha="right", va="center", fontsize=8.5, color=_INK)


def _add_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    event = Event(1, "F", 0, 0.0, 0.0)
    handles = [
        Patch(facecolor=_colour(event), label="forward"),
        Patch(facecolor=_colour(event._replace(kind="B")), label="backward"),
        Patch(facecolor=_IDLE, label="wait"),
        Patch(facecolor="none", label="number and colour: the batch"),
    ]
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": _INK, "handlelength": 1.5}
    figure.legend(handles=handles, loc="outside lower center", ncols=4, **style)


def _colour(event: Event) -> str:
    colour = _COLOURS[event.batch % len(_COLOURS)]
    if event.kind == "B":
        return colour
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * _TINT):02x}" for part in parts)
