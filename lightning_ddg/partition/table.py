"""Show a cut to a person: one row per stage, and the line that repeats the cut from a YAML file.

What the table says changes here; nothing else prints a cut.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_ddg.partition.chain import Chain


def cut_table(chain: Chain, starts: Sequence[int], costs: Sequence[float], unit: str) -> Table:
    """Lay out a cut as a table: stage, layers, parameters, share of the cost, delay.

    Args:
        chain: The layers.
        starts: The start positions of stages 2 to K.
        costs: Cost of each layer.
        unit: What the costs count, as it stands after "share of", e.g. ``"measured time"``.
    """
    num_stages = len(starts) + 1
    total = sum(costs)
    table = Table()
    table.add_column("stage", justify="right")
    table.add_column("layers", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    # Two lines of header leave the room to the names of the layers.
    table.add_column(f"share of {unit}", justify="right", max_width=max(len("share of"), len(unit)))
    table.add_column("delay", justify="right")
    for stage, (start, stop) in enumerate(pairwise([0, *starts, len(chain)]), start=1):
        names = chain.names[start:stop]
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        parameters = sum(parameter.numel() for parameter in chain.segment(start, stop).parameters())
        share = sum(costs[start:stop]) / total if total else 0.0
        table.add_row(
            str(stage),
            # Not a str: rich would read a label such as "layers[x]" as markup.
            Text(f"{span} ({len(names)})"),
            f"{parameters:,}",
            f"{share:.1%}",
            str(num_stages - stage),
        )
    return table


def print_cut(chain: Chain, starts: Sequence[int], costs: Sequence[float], unit: str) -> None:
    """Print a cut on the standard output: a title, the table, and the ``split_points`` that repeat it.

    Args:
        chain: The layers.
        starts: The start positions of stages 2 to K.
        costs: Cost of each layer.
        unit: What the costs count, as in :func:`cut_table`.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    num_stages = len(starts) + 1
    table = cut_table(chain, starts, costs, unit)
    table.title = f"Network cut into {num_stages} stage{'s' if num_stages > 1 else ''}"
    console.print(table)
    # JSON is YAML whatever the names hold; soft wrap, because a line that is broken cannot be pasted.
    points = json.dumps([chain.names[start] for start in starts], ensure_ascii=False)
    console.print(f"split_points: {points}", markup=False, highlight=False, soft_wrap=True)
