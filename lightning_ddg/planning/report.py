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

from lightning_ddg.core.schedule import delay
from lightning_ddg.network.cut import stage_memory, stage_seconds
from lightning_ddg.network.layers import Layers
from lightning_ddg.network.profile import Profile
from lightning_ddg.planning.units import show_bytes


def cut_table(
    chain: Layers,
    starts: Sequence[int],
    costs: Sequence[float],
    unit: str,
    profile: Profile | None = None,
    optimizer_copies: int = 2,
) -> Table:
    """Lay out a cut as a table: stage, layers, parameters, share of the cost, delay; measured: bytes sent, memory.

    Args:
        chain: The layers.
        starts: The start positions of stages 2 to K.
        costs: Cost of each layer.
        unit: What the costs count, as it stands after "share of", e.g. ``"measured time"``.
        profile: What was measured, if it was.
        optimizer_copies: Tensors of a parameter's size that the optimizer keeps for it.
    """
    num_stages = len(starts) + 1
    bounds = [0, *starts, len(chain)]
    shares = [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
    if profile is not None:
        shares = stage_seconds(profile, starts)
    total = sum(shares)
    table = Table()
    table.add_column("stage", justify="right")
    table.add_column("layers", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    # Two lines of header leave the room to the names of the layers.
    table.add_column(f"share of {unit}", justify="right", max_width=max(len("share of"), len(unit)))
    table.add_column("delay", justify="right")
    memory = None if profile is None else stage_memory(profile, starts, optimizer_copies)
    if profile is not None:
        table.add_column("sends per batch", justify="right", max_width=len("per batch"))
        table.add_column("memory", justify="right", no_wrap=True)
    for stage, (start, stop) in enumerate(pairwise(bounds), start=1):
        names = chain.names[start:stop]
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        parameters = sum(parameter.numel() for parameter in chain.segment(start, stop).parameters())
        share = shares[stage - 1] / total if total else 0.0
        table.add_row(
            str(stage),
            # Not a str: rich would read a label such as "layers[x]" as markup.
            Text(f"{span} ({len(names)})"),
            f"{parameters:,}",
            f"{share:.1%}",
            str(delay(stage, num_stages)),
            *_measured(profile, memory, stage, start, stop),
        )
    return table


def _measured(profile: Profile | None, memory: list[int] | None, stage: int, start: int, stop: int) -> list[str]:
    if profile is None or memory is None:
        return []
    # Activations go on to the next stage, gradients back to the one before.
    sent = profile.crossing_grad[start] + (profile.crossing[stop] if stop < len(profile.crossing) else 0)
    return [show_bytes(sent), show_bytes(memory[stage - 1])]


def print_cut(
    chain: Layers,
    starts: Sequence[int],
    costs: Sequence[float],
    unit: str,
    profile: Profile | None = None,
    optimizer_copies: int = 2,
) -> None:
    """Print a cut on the standard output: a title, the table, and the ``split_points`` that repeat it.

    Args:
        chain: The layers.
        starts: The start positions of stages 2 to K.
        costs: Cost of each layer.
        unit: What the costs count, as in :func:`cut_table`.
        profile: What was measured, if it was.
        optimizer_copies: Tensors of a parameter's size that the optimizer keeps for it.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    num_stages = len(starts) + 1
    table = cut_table(chain, starts, costs, unit, profile, optimizer_copies)
    table.title = f"Network cut into {num_stages} stage{'s' if num_stages > 1 else ''}"
    console.print(table)
    # JSON is YAML whatever the names hold; soft wrap, because a line that is broken cannot be pasted.
    points = json.dumps([chain.names[start] for start in starts], ensure_ascii=False)
    console.print(f"split_points: {points}", markup=False, highlight=False, soft_wrap=True)
