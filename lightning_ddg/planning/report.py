"""Every table that is printed: of a cut, of a plan, of what a fit's stages have measured."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_ddg.core.schedule import delay, delay_in_updates
from lightning_ddg.network.balance import forbidden_cuts
from lightning_ddg.network.cut import Cut
from lightning_ddg.planning.simulate import slack_needed, steady_state, synchronous_period
from lightning_ddg.planning.stages import CutPlan, work_of
from lightning_ddg.planning.tally import Tally
from lightning_ddg.planning.units import show_bytes, show_ms

_UNEVEN = 1.2  # of the mean: what a slowest stage may have without a word
_SLOW = 1.05  # of the least period: what a link may cost without a word
_WIDTH = 120  # of what is printed elsewhere than on a terminal


def print_cut(cut: Cut, unit: str = "batch", slack: int = 0) -> None:
    """Print a cut on the standard output: a title, the table, and the ``split_points`` that repeat it."""
    table = cut_table(cut, unit, slack)
    table.title = f"Network cut into {count_of_stages(len(cut.starts) + 1)}"
    print_table(table)
    for line in textwrap.wrap(uneven_line(cut) or "", _WIDTH - 20):
        _print_line(line)
    if (link := link_line(cut, unit)) is not None:
        _print_line(link)
    _print_line(split_points_line(cut.split_points))


def link_line(cut: Cut, unit: str = "batch") -> str | None:
    """Say how long a message takes one way, and which slack hides that if it costs much; ``None`` if not measured."""
    model = cut.costs.model
    if model is None or not model.latency:
        return None
    rate = f", {show_bytes(round(1 / model.seconds_per_byte))}/s" if model.seconds_per_byte else ""
    text, work = f"link: {show_ms(model.latency)} one way{rate}", work_of(model, cut.starts)
    needed = slack_needed(work)
    now, then = (steady_state(work._replace(slack=slack)).period for slack in (work.slack, needed))
    hidden = f"; slack={needed} would hide it: {show_ms(then)} per {unit} instead of {show_ms(now)}"
    return text + hidden * (now > _SLOW * then)


def uneven_line(cut: Cut) -> str | None:
    """Say why a measured cut is far from even and what would help; ``None`` if it is not far."""
    loads, num_stages = _loads(cut), len(cut.starts) + 1
    slowest = max(range(num_stages), key=loads.__getitem__)
    if cut.costs.unit == "parameters" or loads[slowest] * num_stages <= _UNEVEN * sum(loads):
        return None
    places = len(cut.chain) - 1 - len(forbidden_cuts(cut.chain))
    dearest = cut.chain.names[max(range(len(cut.chain)), key=cut.costs.of_layers.__getitem__)]
    return (
        f"Stage {slowest + 1} has {loads[slowest] / sum(loads):.0%} of the {cut.costs.unit} and sets the pace of all:"
        f" {'one place' if places == 1 else f'{places} places'} to cut, and the dearest layer is {dearest!r}. Smaller"
        " layers from `configure_stages()`, or fewer stages, would help."
    )


def _loads(cut: Cut) -> list[float]:
    if cut.costs.model is not None:
        return list(work_of(cut.costs.model, cut.starts).busy)
    return [sum(cut.costs.of_layers[start:stop]) for start, stop in pairwise(cut.bounds)]


def cut_table(cut: Cut, travels: str = "batch", slack: int = 0) -> Table:
    """Lay out a cut as a table: stage, layers, parameters, share of the cost, delay; measured: bytes sent, memory.

    ``travels`` is what was measured, and what the delay counts: a batch, or a micro-batch; ``slack`` makes it longer.
    """
    model, unit, num_stages = cut.costs.model, cut.costs.unit, len(cut.starts) + 1
    table = Table()
    table.add_column("stage", justify="right")
    table.add_column("layers", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    # Two lines of header leave the room to the names of the layers.
    table.add_column(f"share of {unit}", justify="right", max_width=max(len("share of"), len(unit)))
    late = "delay" if travels == "batch" else f"delay in {travels}es"
    table.add_column(late, justify="right", max_width=max(map(len, late.split())))
    loads = _loads(cut)
    sizes: list[list[str]] = [[] for _ in loads]
    if model is not None:
        both = zip(model.stage_sends(cut.starts), model.stage_memory(cut.starts), strict=True)
        sizes = [[show_bytes(sends), show_bytes(memory)] for sends, memory in both]
        table.add_column(f"sends per {travels}", justify="right", max_width=len(f"per {travels}"))
        table.add_column("memory", justify="right", no_wrap=True)
    rows = zip(pairwise(cut.bounds), cut.segments(), loads, sizes, strict=True)
    for stage, ((start, stop), segment, load, shown) in enumerate(rows, start=1):
        count = sum(parameter.numel() for parameter in segment.parameters())
        share = load / sum(loads) if load else 0.0
        figures = f"{count:,}", f"{share:.1%}", str(delay(stage, num_stages, slack)), *shown
        table.add_row(str(stage), _span(cut.chain.names[start:stop]), *figures)
    return table


def print_plan(rows: Mapping[int, CutPlan | str], seconds: float, *, details: bool) -> None:
    """Print a plan on the standard output: a row for each number of stages, then each cut, or why there is none."""
    print_table(_summary(rows, seconds))
    for num_stages, cut in rows.items():
        if isinstance(cut, str):
            _print_line(f"{num_stages} stages: {cut}")
        elif details:
            _print_line("")
            print_table(_details(cut))
            _print_line(split_points_line(cut.split_points))
        else:
            _print_line(f"{split_points_line(cut.split_points)}  # {count_of_stages(num_stages)}")


def split_table(rows: Mapping[tuple[int, int], CutPlan], seconds: float) -> Table:
    """Lay out what micro-batches cost and give: by the numbers of stages and micro-batches, the plan of one of these.

    A batch is all its micro-batches, the smaller ones counted as the largest; the pipeline is not emptied between them.
    """
    table = Table(title="A batch in micro-batches, one update for all")
    for name in (
        "stages",
        "micro-batches",
        "per batch",
        "speed-up",
        "efficiency",
        "delay in updates",
        "largest memory",
    ):
        table.add_column(name, justify="right")
    for (num_stages, count), cut in rows.items():
        period, memory = count * cut.steady_state.period, max(stage.memory for stage in cut.stages)
        speedup, late = seconds / period, delay_in_updates(num_stages, count, cut.work.slack)
        figures = show_ms(period), f"{speedup:.2f}x", f"{speedup / num_stages:.0%}", str(late), show_bytes(memory)
        table.add_row(str(num_stages), str(count), *figures)
    return table


def finish_table(rows: Mapping[tuple[int, int], CutPlan], seconds: float, finish: float) -> Table:
    """Lay out what a synchronous finish costs: by the numbers of stages and micro-batches, the plan of one of these.

    Batches of the finish are flushed one by one, those before it are not; emptying the pipeline once is left out.
    """
    table = Table(title=f"The last {finish:.3g} of a fit synchronous")
    for name in ("stages", "micro-batches", "per batch", "per synchronous batch", "mean", "speed-up"):
        table.add_column(name, justify="right")
    for (num_stages, count), cut in sorted(rows.items()):
        period, flushed = count * cut.steady_state.period, synchronous_period(cut.work, count)
        mean = (1 - finish) * period + finish * flushed
        figures = show_ms(period), show_ms(flushed), show_ms(mean), f"{seconds / mean:.2f}x"
        table.add_row(str(num_stages), str(count), *figures)
    return table


def latency_table(rows: Mapping[tuple[int, int], CutPlan], seconds: float) -> Table:
    """Lay out what links with a latency cost, and the least slack that hides it, for a plan whose slack is another.

    Rows are as those of :func:`finish_table`.
    """
    table = Table()
    with_it = ("slack that\nhides it", "per batch\nwith it", "speed-up\nwith it", "delay in updates\nwith it")
    for name in ("stages", "micro-batches", "per batch", "speed-up", *with_it):
        table.add_column(name, justify="right", no_wrap=True)
    for (num_stages, count), cut in sorted(rows.items()):
        table.title = f"Links of {show_ms(cut.work.latency)} one way, slack={cut.work.slack}"
        needed = slack_needed(cut.work)
        now, then = count * cut.steady_state.period, count * steady_state(cut.work._replace(slack=needed)).period
        figures = [text for time in (now, then) for text in (show_ms(time), f"{seconds / time:.2f}x")]
        late = delay_in_updates(num_stages, count, needed)
        table.add_row(str(num_stages), str(count), *figures[:2], str(needed), *figures[2:], str(late))
    return table


def summary_table(totals: Mapping[int, Tally], waits: bool) -> Table:
    """Lay out the means over a fit, a row for each stage; ``waits``: whether the stages have others to wait for."""
    timed = [tally for tally in totals.values() if tally.batches]
    period = f", {show_ms(max(tally.seconds / tally.batches for tally in timed))} per batch" if timed else ""
    table = Table(title=f"DDGMonitor: {len(totals)} stages{period}")
    table.add_column("stage", justify="right")
    columns = {
        "waits_activations": ("waits for\nactivations", "{:.1%}"),
        "waits_gradients": ("waits for\ngradients", "{:.1%}"),
        "delay": ("delay in\nbatches", "{:.3g}"),
        "delay_updates": ("delay in\nupdates", "{:.3g}"),
        "staleness": ("staleness\n‖w(t) − w(t−d)‖ / ‖w(t)‖", "{:.2g}"),
        "cosine": ("cosine of applied\nand own gradient", "{:.3f}"),
    }
    rows = {stage: tally.figures(waits) for stage, tally in sorted(totals.items())}
    shown = [name for name in columns if any(name in row for row in rows.values())]
    for name in shown:
        table.add_column(columns[name][0], justify="right", no_wrap=True)
    for stage, row in rows.items():
        table.add_row(str(stage), *(columns[name][1].format(row[name]) if name in row else "-" for name in shown))
    return table


def print_table(table: Table) -> None:
    """Print a table on the standard output, as wide as the terminal, or 120 characters where there is none."""
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)


def split_points_line(names: Sequence[str]) -> str:
    """Return the line of a YAML file that repeats a cut, from the layers that begin stages ``2..K``."""
    # JSON is YAML whatever the names hold.
    return f"split_points: {json.dumps(list(names), ensure_ascii=False)}"


def count_of_stages(num_stages: int) -> str:
    """Return ``"1 stage"``, ``"2 stages"``, and so on."""
    return f"{num_stages} stage{'s' if num_stages > 1 else ''}"


def _print_line(text: str) -> None:
    # Soft wrap, because a line that is broken cannot be pasted.
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _span(names: Sequence[str]) -> Text:
    span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    # Not a str: rich would read a label such as "layers[x]" as markup.
    return Text(f"{span} ({len(names)})")


def _summary(rows: Mapping[int, CutPlan | str], seconds: float) -> Table:
    table = Table(title=f"Plain backpropagation on one device: {show_ms(seconds)} per batch")
    for name in ("stages", "per batch", "speed-up", "efficiency"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("limited by")
    table.add_column("largest memory", justify="right", no_wrap=True)
    slack = max((cut.work.slack for cut in rows.values() if not isinstance(cut, str)), default=0)
    if slack:
        table.add_column(f"delay, slack={slack}", justify="right", no_wrap=True)
    for num_stages, cut in rows.items():
        late = [str(delay(1, num_stages, slack))] if slack else []
        if isinstance(cut, str):
            table.add_row(str(num_stages), "-", "-", "-", "cannot be cut, see below", "-", *late)
            continue
        period, reason = cut.steady_state.period, cut.steady_state.reason
        speedup, memory = seconds / period, max(stage.memory for stage in cut.stages)
        figures = show_ms(period), f"{speedup:.2f}x", f"{speedup / num_stages:.0%}", reason, show_bytes(memory)
        table.add_row(str(num_stages), *figures, *late)
    return table


def _details(cut: CutPlan) -> Table:
    table = Table(title=count_of_stages(len(cut.stages)), title_justify="left")
    table.add_column("stage", justify="right")
    table.add_column("layers", overflow="fold")
    for name in ("parameters", "time", "share", "sends", "in flight", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, stage in enumerate(cut.stages, start=1):
        sizes = map(show_bytes, (stage.sends, stage.in_flight, stage.memory))
        figures = f"{stage.parameters:,}", show_ms(stage.seconds), f"{stage.share:.1%}", *sizes
        table.add_row(str(number), _span(stage.layers), *figures)
    return table
