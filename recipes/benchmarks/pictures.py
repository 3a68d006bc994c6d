"""The charts of a results file are drawn here; nothing is measured. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.benchmarks.rounds import Record, measured, period_s

OURS, THEIRS = "#c44e52", "#8c9db5"
#: On emulated devices, where colours tell contenders apart: one device alone, torch's schedules, this package.
FAMILIES = {
    "backprop": "0.35",
    "trainer": "0.6",
    "gpipe": "#cfe0ee",
    "1f1b": "#9dc1de",
    "interleaved": "#5c96c6",
    "zero bubble": "#2a5f92",
    "ddg": OURS,
    "ddg-bare": "#e3a5a7",
}


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws a chart of every part that has figures.

    Args:
        report: What the results file says.
        folder: Where the PNG files go; made if it does not exist.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Pictures are drawn with matplotlib: install it (`pip install matplotlib`).") from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_work(work, folder) for work in report["works"] if measured(work["contenders"])]
    devices = [one for one in report["devices"] if measured(one["contenders"])]
    if devices:
        drawn.append(_devices(devices, folder))
    cost = report.get("cost") or {}
    curves = {"tensors": ("tensors", "parameter tensors of a stage"), "messages": ("bytes", "bytes of a message")}
    for name, (key, label) in curves.items():
        if cost.get(name):
            drawn.append(_added(cost[name], key, label, folder / f"cost-{name}.png"))
    if cost.get("memory"):
        drawn.append(_memory(cost["memory"], folder / "cost-memory.png"))
    return drawn


def _label(record: Record) -> str:
    return f"{record['label']}, m = {record['microbatches']}" if record["family"] else record["label"]


def _colour(record: Record) -> str:
    return OURS if record["name"].startswith("ddg") else THEIRS


def _work(work: Mapping[str, Any], folder: Path) -> Path:
    """Bars of the time a batch, the spread of the rounds as a line."""
    records = sorted(measured(work["contenders"]).values(), key=period_s, reverse=True)
    figure, axes = _figure(0.4 * len(records) + 1.4)
    milliseconds = [1000 * period_s(record) for record in records]
    rounds = [[1000 * figures["period_s"] for figures in record["rounds"]] for record in records]
    below = [middle - min(all_) for middle, all_ in zip(milliseconds, rounds, strict=True)]
    above = [max(all_) - middle for middle, all_ in zip(milliseconds, rounds, strict=True)]
    colours = [_colour(record) for record in records]
    bars = axes.barh([_label(record) for record in records], milliseconds, xerr=[below, above], color=colours)
    axes.bar_label(bars, fmt="%.0f", padding=4)
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds a batch")
    axes.set_title(f"{work['name']}, {work['processes']} processes")
    return _save(figure, folder / f"work-{_slug(work['name'])}.png")


def _devices(devices: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Bars of the efficiency, a group for each number of devices."""
    groups = [measured(one["contenders"]) for one in devices]
    names = list(dict.fromkeys(name for group in groups for name in group))
    figure, axes = _figure(4.2)
    width = 0.85 / len(names)
    for number, name in enumerate(names):
        places, heights, label = [], [], f"torch, {name}"
        for place, (one, group) in enumerate(zip(devices, groups, strict=True)):
            if name in group:
                places.append(place + (number - (len(names) - 1) / 2) * width)
                heights.append(100 * one["references_ms"]["ideal"] / (1000 * period_s(group[name])))
                label = f"torch, {name}" if group[name]["family"] else group[name]["label"]
        axes.bar(places, heights, width, label=label, color=FAMILIES.get(name, THEIRS))
    axes.set_xticks(range(len(devices)), [f"K = {one['stages']}" for one in devices])
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_ylabel("efficiency: ideal / measured period, %")
    figure.legend(fontsize=8, ncols=3, loc="outside lower center")
    times = devices[0]["times"]
    axes.set_title("Emulated devices: forward {forward_ms:g} ms, backward {backward_ms:g} ms".format(**times))
    return _save(figure, folder / "devices.png")


def _added(rows: Sequence[Mapping[str, float]], key: str, label: str, path: Path) -> Path:
    """What the package adds to an iteration, against one property of the stage."""
    figure, axes = _figure(4.0)
    sizes = [row[key] for row in rows]
    for column, name, marker in (("bare_s", "the bare loop adds", "o"), ("trainer_s", "the Trainer adds", "s")):
        axes.plot(sizes, [1e6 * row[column] for row in rows], marker=marker, label=name)
    axes.plot(sizes, [1e6 * row["own_s"] for row in rows], color="0.6", linestyle="--", label="the stage's own compute")
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("microseconds an iteration")
    axes.legend()
    return _save(figure, path)


def _memory(rows: Sequence[Mapping[str, float]], path: Path) -> Path:
    """What each stage holds, beside the theory."""
    figure, axes = _figure(4.0)
    places = range(len(rows))
    axes.bar(places, [row["measured_bytes"] / 2**20 for row in rows], color=OURS, width=0.5, label="measured")
    theory = [row["theory_bytes"] / 2**20 for row in rows]
    axes.plot(places, theory, color="black", marker="_", markersize=30, linestyle="none", label="theory")
    axes.set_xticks(places, [f"{row['in_flight']}\n{row['layers']} layers" for row in rows])
    axes.set_xlabel("batches in flight, d + 1, and layers of the stage")
    axes.set_ylabel("MiB of a stage")
    axes.legend()
    return _save(figure, path)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
