"""The figures of a study are drawn here, from the rows of its table; nothing is measured or averaged here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from recipes.study.methods import METHODS
from recipes.study.summary import Contender, Runs, Setup, best, by_setup, curve, mean_sd

BACKPROP_COLOUR = "#222222"
#: By the number of stages, from 2 on, for the methods in the order in which they appear beside backpropagation.
COLOURS = (
    ("#e6a03c", "#c44e52", "#7a2a5a", "#4a1a4a"),
    ("#5aa9d6", "#2f6db5", "#173f7a", "#0d2548"),
    ("#7fbf7b", "#3d9a4f", "#1b6b34", "#0c4020"),
    ("#b0a08a", "#85725a", "#5d4c38", "#3a2e20"),
)
DASHED = (0, (4, 2))


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draws the curves of each setup, and the best accuracies of all.

    Args:
        rows: Of the study's table.
        folder: Where the PNG files go.

    Returns:
        The files.
    """
    setups = by_setup(rows)
    colours = _colours(setups)
    drawn = []
    for setup, contenders in setups.items():
        network = f"{setup.recipe}-{setup.depth}" if setup.depth else setup.recipe
        drawn.append(folder / f"curves-{network}-{setup.optimizer}.png")
        curves(setup, contenders, colours).savefig(drawn[-1], dpi=130)
    if setups:
        drawn.append(folder / "best.png")
        best_accuracies(setups, colours).savefig(drawn[-1], dpi=130)
    return drawn


def label(contender: Contender) -> str:
    """What a legend calls a method with its number of stages."""
    name = METHODS[contender.method].label
    return name if contender.method == "backprop" else f"{name}, K = {contender.stages}"


def curves(setup: Setup, contenders: Mapping[Contender, Runs], colours: Mapping[Contender, str]) -> Figure:
    """Draws accuracy and loss against epochs and against time on K devices; bands are one deviation over the seeds."""
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row", sharex="col")
    for contender, runs in contenders.items():
        for row, (measure, scale) in enumerate((("acc", 100.0), ("loss", 1.0))):
            for column, seconds in enumerate((None, _epoch_seconds(runs))):
                if column == 0 or seconds is not None:
                    _lines(panels[row, column], runs, measure, scale, seconds, colours[contender], label(contender))
    panels[0, 0].set_ylabel("accuracy, %")
    panels[1, 0].set_ylabel("loss")
    panels[1, 0].set_xlabel("epoch")
    panels[1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1, 1].set_xlabel("seconds of training on K devices, from measured stage times")
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.margins(x=0.02)
    seeds = max(len(runs) for runs in contenders.values())
    averaged = f", mean ± deviation of {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(f"{setup.title}: test (solid), training (dashed){averaged}")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    return figure


def best_accuracies(setups: Mapping[Setup, Mapping[Contender, Runs]], colours: Mapping[Contender, str]) -> Figure:
    """Draws the best test accuracy of each run, and their mean ± deviation; backpropagation's is a band too."""
    count = len(setups)
    columns = min(2, count)
    width = max(5.5, 1.1 * max(map(len, setups.values())))  # names of contenders stand side by side
    figure = Figure(figsize=(width * columns, 3.6 * -(-count // columns)), layout="constrained")
    for index, (setup, contenders) in enumerate(setups.items()):
        axes = figure.add_subplot(-(-count // columns), columns, index + 1)
        for place, (contender, runs) in enumerate(contenders.items()):
            accuracies = [100 * value for value in best(runs).values()]
            mean, deviation = mean_sd(accuracies)
            colour = colours[contender]
            if contender.method == "backprop" and deviation is not None:
                axes.axhspan(mean - deviation, mean + deviation, color=colour, alpha=0.1, linewidth=0)
            bar = {"marker": "_", "markersize": 26, "markeredgewidth": 2.5, "capsize": 4}
            axes.errorbar(place, mean, deviation, color=colour, **bar)
            beside = [place + 0.3] * len(accuracies)
            axes.plot(beside, accuracies, "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
        names = [label(contender).replace(", ", "\n") for contender in contenders]
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylabel("best test accuracy, %")
        axes.set_title(setup.title)
        axes.grid(axis="y", alpha=0.25)
    return figure


def _lines(axes: Axes, runs: Runs, measure: str, scale: float, seconds: float | None, colour: str, name: str) -> None:
    for part, style, width in (("test", "-", 1.8), ("train", DASHED, 1.0)):
        epochs, means, deviations = zip(*curve(runs, f"{part}_{measure}"), strict=True)
        across = epochs if seconds is None else [seconds * epoch for epoch in epochs]
        middle = [scale * mean for mean in means]
        marker = "." if len(epochs) == 1 else None
        named = name if part == "test" else None
        axes.plot(across, middle, color=colour, linestyle=style, linewidth=width, marker=marker, label=named)
        if part == "test" and deviations[0] is not None:
            low = [scale * (mean - deviation) for mean, deviation in zip(means, deviations, strict=True)]
            high = [scale * (mean + deviation) for mean, deviation in zip(means, deviations, strict=True)]
            axes.fill_between(across, low, high, color=colour, alpha=0.13, linewidth=0)


def _epoch_seconds(runs: Runs) -> float | None:
    row = next(iter(runs.values()))[0]
    return None if row["device_seconds"] is None else row["device_seconds"] / row["epoch"]


def _colours(setups: Mapping[Setup, Mapping[Contender, Runs]]) -> dict[Contender, str]:
    """A contender has the same colour in all figures of a study."""
    everybody = sorted({contender for contenders in setups.values() for contender in contenders})
    others = list(dict.fromkeys(contender.method for contender in everybody if contender.method != "backprop"))
    colours = {}
    for contender in everybody:
        if contender.method == "backprop":
            colours[contender] = BACKPROP_COLOUR
        else:
            shades = COLOURS[others.index(contender.method) % len(COLOURS)]
            colours[contender] = shades[min(contender.stages - 2, len(shades) - 1)]
    return colours
