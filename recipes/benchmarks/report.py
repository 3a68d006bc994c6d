"""What a results file says is put into tables here: numbers in, text out, and nothing is measured.

The pictures of the same results are in ``pictures.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from recipes.benchmarks.rounds import Record, best_of_families, measured, period_s, times_as_fast

WORK_COLUMNS = ("contender", "m", "ms a batch", "min-max", "x backprop", "x best of torch", "CPU ms")
DEVICE_COLUMNS = ("K", "schedule", "m", "theory", "ms a batch", "min-max", "efficiency", "x backprop", "CPU ms")
REFERENCES = {"ideal": "ideal: F+B", "backprop": "backprop: (F+B)K", "paper": "paper: FK+B"}


def work_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lists one work's table, the fastest last; the cells are those of ``WORK_COLUMNS``."""
    found = measured(report["contenders"])
    best, backprop = best_of_families(report["contenders"]), found.get("backprop")
    return [
        (
            record["label"],
            _microbatches(record),
            _ms(record),
            _spread(record),
            _ratio(record, backprop),
            _ratio(record, best),
            _cpu_ms(record),
        )
        for record in sorted(found.values(), key=period_s, reverse=True)
    ]


def device_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lists the table of one number of emulated devices; the cells are those of ``DEVICE_COLUMNS``."""
    stages, references = str(report["stages"]), report["references_ms"]

    def against(period_ms: float) -> tuple[str, str]:
        return f"{references['ideal'] / period_ms:.1%}", f"{references['backprop'] / period_ms:.2f}"

    rows: list[tuple[str, ...]] = []
    for name, label in REFERENCES.items():
        rows.append((stages, label, "", f"{references[name]:.1f}", "", "", *against(references[name]), ""))
    for record in measured(report["contenders"]).values():
        theory = "" if record["theory_ms"] is None else f"{record['theory_ms']:.1f}"
        ratios = against(1000 * period_s(record))
        microbatches, cpu = _microbatches(record), _cpu_ms(record)
        rows.append((stages, record["label"], microbatches, theory, _ms(record), _spread(record), *ratios, cpu))
    return rows


def failures(records: Sequence[Record]) -> list[str]:
    """Who failed, with the last line of why."""
    return [
        f"{record['label']}, m = {record['microbatches']}: failed: {record['error'].strip().splitlines()[-1]}"
        for record in records
        if record["error"]
    ]


def tables(report: Mapping[str, Any]) -> RenderableType:
    """Draws all tables of a results file."""
    parts: list[RenderableType] = []
    for work in report["works"]:
        shares = ", ".join(f"{share:.0%}" for share in work.get("shares", {}).get(str(work["processes"]), []))
        title = f"{work['name']}, {work['processes']} processes"
        parts.append(
            _table(f"{title}, stages {shares} of the time" if shares else title, WORK_COLUMNS, work_rows(work))
        )
        parts += map(Text, [work["error"]] if work["error"] else failures(work["contenders"]))
    if report["devices"]:
        rows = [row for devices in report["devices"] for row in device_rows(devices)]
        parts.append(_table("Emulated devices", DEVICE_COLUMNS, rows))
        parts += [Text(line) for devices in report["devices"] for line in failures(devices["contenders"])]
    cost = report.get("cost") or {}
    for name, columns in COST_COLUMNS.items():
        if cost.get(name):
            parts.append(_table(f"Cost: {name}", tuple(columns), [_cost_row(row, columns) for row in cost[name]]))
    parts += map(Text, cost.get("errors", []))
    return Group(*parts)


_ADDED: dict[str, tuple[str, float, int]] = {
    "own, us": ("own_s", 1e-6, 0),
    "bare loop adds": ("bare_s", 1e-6, 0),
    "Trainer adds": ("trainer_s", 1e-6, 0),
    "own, CPU us": ("own_cpu_s", 1e-6, 0),
    "bare loop adds, CPU": ("bare_cpu_s", 1e-6, 0),
    "Trainer adds, CPU": ("trainer_cpu_s", 1e-6, 0),
}

# For each table of costs, the columns: where they come from, divided by what, with how many decimals.
COST_COLUMNS: dict[str, dict[str, tuple[str, float, int]]] = {
    "tensors": {"parameter tensors": ("tensors", 1, 0), **_ADDED},
    "messages": {"message, KiB": ("bytes", 1024, 0), **_ADDED},
    "memory": {
        "layers a stage": ("layers", 1, 0),
        "stage": ("stage", 1, 0),
        "batches in flight": ("in_flight", 1, 0),
        "theory, MiB": ("theory_bytes", 1 << 20, 1),
        "planned, MiB": ("planned_bytes", 1 << 20, 1),
        "measured, MiB": ("measured_bytes", 1 << 20, 1),
        "measured / theory": ("ratio", 1, 3),
        "a message, MiB": ("message_bytes", 1 << 20, 1),
    },
    "flat": {"iterations": ("iterations", 1, 0), "resident, MiB": ("resident_bytes", 1 << 20, 1)},
}


def _cost_row(row: Mapping[str, float], columns: Mapping[str, tuple[str, float, int]]) -> tuple[str, ...]:
    return tuple(f"{row[key] / unit:,.{decimals}f}" for key, unit, decimals in columns.values())


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, box=SIMPLE, collapse_padding=True, pad_edge=False, title_justify="left")
    for column in columns:
        named = column in ("contender", "schedule")
        table.add_column(column, justify="left" if named else "right", no_wrap=named, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _microbatches(record: Record) -> str:
    return str(record["microbatches"]) if record["family"] else ""


def _ms(record: Record) -> str:
    return f"{1000 * period_s(record):.1f}"


def _spread(record: Record) -> str:
    periods = [1000 * figures["period_s"] for figures in record["rounds"]]
    return f"{min(periods):.1f}-{max(periods):.1f}"


def _ratio(record: Record, other: Record | None) -> str:
    return "" if other is None else f"{times_as_fast(record, other):.2f}"


def _cpu_ms(record: Record) -> str:
    """Processor time a batch of all processes together."""
    return f"{1000 * min(sum(figures['cpu_s']) for figures in record['rounds']):.1f}"
