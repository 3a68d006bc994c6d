"""What a study has found is put into tables and sentences here, for the terminal and as Markdown; nothing is computed
here that ``summary.py`` could compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table

from recipes.study.methods import METHODS
from recipes.study.summary import (
    Contender,
    Difference,
    Runs,
    Setup,
    best,
    by_setup,
    difference,
    difference_over_all,
    mean_sd,
)

BACKPROP = Contender("backprop", 1)
BEST = ("method", "K", "seeds", "best test accuracy", "minus backprop", "time on K devices", "speed-up")


def percent(values: Sequence[float]) -> str:
    """Writes shares as a mean and a standard deviation in percent."""
    mean, deviation = mean_sd(values)
    return f"{mean:.2%}".removesuffix("%") + (" %" if deviation is None else f" ± {100 * deviation:.2f} %")


def points(found: Difference | None) -> str:
    """Writes a difference of shares in percentage points, with its confidence interval."""
    if found is None:
        return "-"
    return f"{100 * found.mean:+.2f}" + ("" if found.half is None else f" ± {100 * found.half:.2f}")


def best_rows(contenders: Mapping[Contender, Runs]) -> list[tuple[str, ...]]:
    """Lists the table of one setup; the cells are those of ``BEST``."""
    reference = contenders.get(BACKPROP)
    rows = []
    for contender, runs in contenders.items():
        compared = difference(best(runs), best(reference)) if reference and contender != BACKPROP else None
        accuracies = list(best(runs).values())
        label = METHODS[contender.method].label
        rows.append((label, str(contender.stages), str(len(runs)), percent(accuracies), points(compared)))
        rows[-1] += _times(runs, reference)
    return rows


def _times(runs: Runs, reference: Runs | None) -> tuple[str, str]:
    seconds = _last(runs)
    alone = _last(reference) if reference else None
    if seconds is None:
        return "-", "-"
    return f"{seconds:.{0 if seconds > 100 else 1}f} s", "-" if alone is None else f"{alone / seconds:.2f}"


def _last(runs: Runs) -> float | None:
    return next(iter(runs.values()))[-1]["device_seconds"]


def early_epochs(epochs: int) -> list[int]:
    """Which epochs the table of the course shows: the first three, the middle and the last."""
    return sorted({epoch for epoch in (1, 2, 3, (epochs + 1) // 2, epochs) if epoch <= epochs})


def course_rows(contenders: Mapping[Contender, Runs]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Lists the training accuracy on the way, mean ± deviation over seeds: the header, and the rows."""
    some = next(iter(contenders.values()))
    epochs = early_epochs(len(next(iter(some.values()))))
    rows = []
    for contender, runs in contenders.items():
        cells = [percent([rows[epoch - 1]["train_acc"] for rows in runs.values()]) for epoch in epochs]
        rows.append((METHODS[contender.method].label, str(contender.stages), *cells))
    return ["method", "K", *(f"epoch {epoch}" for epoch in epochs)], rows


def findings(setups: Mapping[Setup, Mapping[Contender, Runs]]) -> list[str]:
    """Says in a sentence for each contender whether it reaches backpropagation's best test accuracy.

    First setup by setup, then over all of them together.
    """
    said = []
    for setup, contenders in setups.items():
        reference = best(contenders.get(BACKPROP, {}))
        for contender, runs in contenders.items():
            if contender != BACKPROP:
                said.append(sentence(setup.title, contender, difference(best(runs), reference)))
    if len(setups) > 1:
        for contender in dict.fromkeys(one for contenders in setups.values() for one in contenders):
            if contender != BACKPROP:
                said.append(sentence("All together", contender, difference_over_all(setups, contender, BACKPROP)))
    return said


def sentence(where: str, contender: Contender, found: Difference | None) -> str:
    """Says how far a contender is from backpropagation, and whether that is more than seeds explain."""
    who = f"{where}: {METHODS[contender.method].label}, K = {contender.stages},"
    if found is None:
        return f"{who} cannot be compared: backpropagation has not been run with the same seeds."
    if found.within_noise is None:
        return f"{who} differs by {points(found)} points in one seed, which says nothing about noise."
    verdict = "within" if found.within_noise else "beyond"
    return (
        f"{who} differs from backpropagation by {points(found)} points of best test accuracy: {verdict} what seeds"
        " explain (95 % interval of paired differences)."
    )


def tables(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Puts everything into tables for the terminal."""
    parts: list[RenderableType] = []
    for setup, contenders in by_setup(rows).items():
        parts.append(_table(setup.title, BEST, best_rows(contenders)))
        parts.append(_table("Training accuracy", *course_rows(contenders)))
    return Group(*parts, *findings(by_setup(rows)))


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes the same tables and sentences as Markdown."""
    lines = ["# Results", ""]
    for setup, contenders in by_setup(rows).items():
        lines += [f"## {setup.title}", "", *_markdown(BEST, best_rows(contenders)), ""]
        lines += ["Training accuracy:", "", *_markdown(*course_rows(contenders)), ""]
    lines += ["## Beside backpropagation", "", *(f"- {said}" for said in findings(by_setup(rows))), ""]
    return "\n".join(lines)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
