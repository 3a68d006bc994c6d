"""A plan: what a network's training would look like in 2, 3, ... stages, from what was measured on one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from lightning_ddg.core.schedule import delay
from lightning_ddg.network.balance import forbidden_cuts
from lightning_ddg.network.cut import CostModel
from lightning_ddg.network.layers import Layers
from lightning_ddg.planning.report import (
    count_of_stages,
    finish_table,
    latency_table,
    print_plan,
    print_table,
    split_table,
)
from lightning_ddg.planning.simulate import Work, simulate, steady_state
from lightning_ddg.planning.stages import CutPlan, plan_cut
from lightning_ddg.planning.timeline import Panel, check_picture, draw_timeline

NUM_STAGES = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Plan:
    """What training in different numbers of stages would look like.

    Attributes:
        rows: By the number of stages K: the plan, or why the network cannot be cut so.
        seconds: What a batch takes on one device with plain backpropagation: all forwards and backwards.
        split: By the numbers of stages and of micro-batches into which a batch is split: the plan of a micro-batch, the
            largest of the batch.
        finish: The last part of a fit that is synchronous, in 0..1; its cost is printed if there is any.
    """

    rows: dict[int, CutPlan | str]
    seconds: float
    split: dict[tuple[int, int], CutPlan] = field(default_factory=dict)
    finish: float = 0.0

    def split_points(self, num_stages: int) -> list[str]:
        """Return the names of the layers that begin stages ``2..K``: :class:`~lightning_ddg.DDGStrategy` takes them.

        Raises:
            ValueError: ``num_stages`` is not in the plan, or the network cannot be cut into so many.
        """
        cut = self.rows.get(num_stages)
        if isinstance(cut, CutPlan):
            return list(cut.split_points)
        if cut is None:
            planned = ", ".join(map(str, self.rows))
            raise ValueError(f"num_stages={num_stages} has not been planned, only {planned}: add it to `num_stages`.")
        raise ValueError(cut)

    def print(self, *, details: bool = True) -> None:
        """Print a row for each number of stages, the line that repeats each cut and, with ``details``, its stages."""
        print_plan(self.rows, self.seconds, details=details)
        if self.split:
            print_table(split_table(self.split, self.seconds))
        cuts = {(number, 1): cut for number, cut in self.rows.items() if isinstance(cut, CutPlan)} | self.split
        if any(cut.work.latency for cut in cuts.values()):
            print_table(latency_table(cuts, self.seconds))
        if self.finish:
            print_table(finish_table(cuts, self.seconds, self.finish))

    def draw(self, path: str | Path) -> None:
        """Draw the simulated timelines below plain backpropagation's, on one scale, from an empty pipeline on.

        Raises:
            ValueError: ``path`` ends otherwise, or no number of stages is possible.
            ImportError: matplotlib is not installed.
        """
        check_picture(path)
        cuts = {num_stages: cut for num_stages, cut in self.rows.items() if isinstance(cut, CutPlan)}
        if not cuts:
            raise ValueError("The network cannot be cut into any of the planned numbers of stages: nothing to draw.")
        # A batch's way through an empty pipeline takes as long as all its work and messages; then it settles.
        latency = max(2 * cut.work.latency * (num_stages - 1) for num_stages, cut in cuts.items())
        stop = self.seconds + latency + 3 * max(cut.steady_state.period for cut in cuts.values())
        forward = sum(next(iter(cuts.values())).work.forward)
        # Not the stages' backwards: these may have forwards in them that are done again.
        whole = Work([forward], [self.seconds - forward], [], [])
        panels = [_panel("plain backpropagation on one device", whole, stop)]
        for num_stages, cut in cuts.items():
            if num_stages > 1:
                speedup, limit = self.seconds / cut.steady_state.period, cut.steady_state.reason
                title = f"{count_of_stages(num_stages)}: {speedup:.2f} times as fast, limited by {limit}"
                panels.append(_panel(title, cut.work, stop))
        draw_timeline(panels, path, span=(0.0, stop))


def make_plan(
    chain: Layers,
    model: CostModel,
    num_stages: Sequence[int],
    split: Mapping[int, CostModel] | None = None,
    finish: float = 0.0,
) -> Plan:
    """Plan cuts of a network, whose layers have been measured, into each of the numbers of stages.

    Args:
        chain: The layers.
        model: What they cost for a batch.
        num_stages: The numbers of stages.
        split: By the number of micro-batches into which a batch is split, what they cost for one of these.
        finish: The last part of a fit that is synchronous.
    """
    forbidden = forbidden_cuts(chain)
    rows: dict[int, CutPlan | str] = {}
    for number in num_stages:
        try:
            starts = model.best_stages(number, forbidden)
        except ValueError as error:
            rows[number] = str(error)
        else:
            rows[number] = plan_cut(chain, model, starts)
    parts = {
        (number, count): plan_cut(chain, one, one.best_stages(number, forbidden))
        for number, row in rows.items()
        for count, one in (split or {}).items()
        if isinstance(row, CutPlan)
    }
    return Plan(rows, sum(model.profile.seconds), parts, finish)


def _panel(title: str, work: Work, stop: float) -> Panel:
    num_stages, period = len(work.forward), steady_state(work).period
    return Panel(title, simulate(work, delay(1, num_stages, work.slack) + ceil(stop / period) + 2), num_stages, period)
