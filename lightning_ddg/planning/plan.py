"""A plan: what a module's training would look like in 2, 3, ... stages, measured on one batch without training.

What a plan says of a cut, and how, changes here; where the cuts lie is decided in :mod:`~lightning_ddg.network`, and
when what happens in :mod:`~lightning_ddg.planning.simulate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_ddg.core.tensors import map_tensors
from lightning_ddg.network.cut import best_stages, forbidden_cuts, stage_memory
from lightning_ddg.network.find import find_network
from lightning_ddg.network.layers import Layers
from lightning_ddg.network.profile import NotTheSame, Profile, check_same, measure_profile, parameter_costs
from lightning_ddg.network.restore import in_mode
from lightning_ddg.planning.simulate import SECONDS_PER_BYTE, Prediction, Work, predict, simulate
from lightning_ddg.planning.timeline import Panel, check_picture, draw_timeline
from lightning_ddg.planning.units import show_bytes, show_ms
from lightning_ddg.plugin.measure import NotCalled, call_of_network

NUM_STAGES = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class StagePlan:
    """One stage of a planned cut.

    Attributes:
        layers: The names of its layers, in order.
        parameters: The number of its parameters.
        seconds: What its forward and backward take.
        share: Its part of the time of all stages, in 0..1.
        sends: Bytes it sends per batch: activations on, gradients back.
        in_flight: Bytes of the batches between forward and backward: activations, the weights stashed for them, and the
            messages that wait for their turn.
        memory: Bytes of all it holds: weights, their gradients, optimizer state, and what is in flight.
    """

    layers: list[str]
    parameters: int
    seconds: float
    share: float
    sends: int
    in_flight: int
    memory: int


@dataclass(frozen=True)
class CutPlan:
    """A network in K stages.

    Attributes:
        stages: The stages, input side first.
        split_points: Names of the layers that begin stages ``2..K``.
        work: How long the work and the messages take.
        prediction: What follows from it.
    """

    stages: list[StagePlan]
    split_points: list[str]
    work: Work
    prediction: Prediction


@dataclass(frozen=True)
class Plan:
    """What training in different numbers of stages would look like.

    Attributes:
        rows: By the number of stages K: the plan, or why the network cannot be cut so.
        seconds: What a batch takes on one device with plain backpropagation: all forwards and backwards.
    """

    rows: dict[int, CutPlan | str]
    seconds: float

    def split_points(self, num_stages: int) -> list[str]:
        """Names of the layers that begin stages ``2..K``: an argument of :class:`~lightning_ddg.DDGStrategy`.

        Raises:
            ValueError: ``num_stages`` is not in the plan, or the network cannot be cut into so many.
        """
        return list(self._cut(num_stages).split_points)

    def print(self, *, details: bool = True) -> None:
        """Prints a row for each number of stages, the line that repeats each cut, and a table of each one's stages.

        Args:
            details: Whether to print the tables of the stages.
        """
        console = Console()
        if not console.is_terminal:
            console = Console(width=120)
        console.print(self._summary())
        for num_stages, cut in self.rows.items():
            if isinstance(cut, str):
                console.print(f"{num_stages} stages: {cut}", markup=False, highlight=False, soft_wrap=True)
                continue
            if details:
                console.print()
                console.print(_details(cut))
            # JSON is YAML whatever the names hold; soft wrap, because a line that is broken cannot be pasted.
            points = json.dumps(cut.split_points, ensure_ascii=False)
            line = f"split_points: {points}"
            if not details:
                line += f"  # {_count(num_stages)}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def draw(self, path: str | Path) -> None:
        """Draws the predicted timelines below plain backpropagation's, on one scale, from an empty pipeline on.

        Args:
            path: Where to write the picture; ``.png`` or ``.svg`` by its suffix.

        Raises:
            ValueError: ``path`` ends otherwise, or no number of stages is possible.
            ImportError: matplotlib is not installed.
        """
        check_picture(path)
        cuts = {num_stages: cut for num_stages, cut in self.rows.items() if isinstance(cut, CutPlan)}
        if not cuts:
            raise ValueError("The network cannot be cut into any of the planned numbers of stages: nothing to draw.")
        # A batch's way through an empty pipeline takes as long as all its work; then the schedule settles.
        stop = self.seconds + 3 * max(cut.prediction.period for cut in cuts.values())
        alone = next(iter(cuts.values())).work
        # The stages' backwards have forwards in them that are done again.
        whole = Work([sum(alone.forward)], [self.seconds - sum(alone.forward)], [], [])
        panels = [_panel("plain backpropagation on one device", whole, predict(*whole), stop)]
        for num_stages, cut in cuts.items():
            got = cut.prediction
            if num_stages > 1:
                title = f"{_count(num_stages)}: {self.seconds / got.period:.2f} times as fast, limited by {got.reason}"
                panels.append(_panel(title, cut.work, got, stop))
        draw_timeline(panels, path, span=(0.0, stop))

    def _cut(self, num_stages: int) -> CutPlan:
        cut = self.rows.get(num_stages)
        if isinstance(cut, CutPlan):
            return cut
        if cut is None:
            planned = ", ".join(map(str, self.rows))
            raise ValueError(f"num_stages={num_stages} has not been planned, only {planned}: add it to `num_stages`.")
        raise ValueError(cut)

    def _summary(self) -> Table:
        table = Table(title=f"Plain backpropagation on one device: {show_ms(self.seconds)} per batch")
        for name in ("stages", "per batch", "speed-up", "efficiency"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("limited by")
        table.add_column("largest memory", justify="right", no_wrap=True)
        for num_stages, cut in self.rows.items():
            if isinstance(cut, str):
                table.add_row(str(num_stages), "-", "-", "-", "cannot be cut, see below", "-")
                continue
            got = cut.prediction
            largest = max(stage.memory for stage in cut.stages)
            speedup = self.seconds / got.period
            figures = (f"{speedup:.2f}x", f"{speedup / num_stages:.0%}")
            table.add_row(str(num_stages), show_ms(got.period), *figures, got.reason, show_bytes(largest))
        return table


def make_plan(chain: Layers, profile: Profile, num_stages: Sequence[int], optimizer_copies: int = 2) -> Plan:
    """Plans cuts of a measured network.

    Args:
        chain: Its layers.
        profile: What they take.
        num_stages: The numbers of stages to plan.
        optimizer_copies: Tensors of a parameter's size that the optimizer will keep for it.
    """
    forbidden = forbidden_cuts(chain)
    rows: dict[int, CutPlan | str] = {}
    for number in num_stages:
        try:
            starts = best_stages(profile, number, forbidden, seconds_per_byte=SECONDS_PER_BYTE)
        except ValueError as error:
            rows[number] = str(error)
        else:
            rows[number] = _plan_cut(chain, profile, starts, optimizer_copies)
    return Plan(rows, sum(profile.forward) + sum(profile.backward))


def plan_module(
    module: LightningModule,
    batch: Any,
    num_stages: int | Sequence[int] = NUM_STAGES,
    *,
    optimizer_copies: int = 2,
    recompute: bool = False,
    stash: bool = True,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Plan:
    """Finds a module's network, measures it on a batch, and plans cuts of it; leaves the module as it was.

    Args:
        module: The module, on the device on which it shall be measured.
        batch: What its ``training_step`` takes, on the same device.
        num_stages: One number of stages, or several.
        optimizer_copies: Tensors of a parameter's size that the optimizer will keep for it.
        recompute: Whether stages shall run forwards again instead of keeping activations.
        stash: Whether stages shall keep the weights of batches in flight.
        context: Entered around each forward, e.g. autocast.

    Raises:
        TypeError: If the network cannot be found.
        ValueError: If ``num_stages`` is empty, or the network cannot be cut at all.
        RuntimeError: If the training step does not call the network, or it or the layers fail, or the layers one after
            the other compute something else than the network.
    """
    numbers = [num_stages] if isinstance(num_stages, int) else list(dict.fromkeys(num_stages))
    if not numbers:
        raise ValueError(f"num_stages={num_stages!r} names no number of stages: give one, or several, such as [2, 4].")
    configure = getattr(module, "configure_stages", None)
    layers = configure() if callable(configure) else None

    def example(target: nn.Module, name: str) -> Any:
        call = _call_of_network(module, target, name, batch, context)
        return map_tensors(torch.Tensor.detach, call)

    with in_mode(module, training=True):
        network = find_network(module, layers, example=example)
        args, kwargs = _call_of_network(module, network.target, network.target_name, batch, context)
        try:
            check_same(network.chain, args, kwargs, context)
            profile = measure_profile(network.chain, args, kwargs, context=context)
        except NotTheSame:
            raise
        except Exception as error:
            raise RuntimeError(
                f"The layers could not be measured one after the other ({type(error).__name__}: {error}). They must"
                " run so for training in stages too; return others from `configure_stages()`."
            ) from error
    return make_plan(network.chain, replace(profile, recompute=recompute, stash=stash), numbers, optimizer_copies)


def work_of(profile: Profile, starts: Sequence[int], seconds_per_byte: float = SECONDS_PER_BYTE) -> Work:
    """How long the work of each stage of a cut and its messages take; a forward that is done again is its backward's.

    Args:
        profile: What the layers take.
        starts: The start positions of stages 2 to K.
        seconds_per_byte: For a message from one stage to the next.
    """
    bounds = [0, *starts, len(profile.forward)]
    forward, backward = (
        [sum(values[start:stop]) for start, stop in pairwise(bounds)] for values in (profile.forward, profile.backward)
    )
    if profile.recompute:
        backward = backward_with_forward(forward, backward)
    send, send_grad = (
        [sizes[start] * seconds_per_byte for start in starts] for sizes in (profile.crossing, profile.crossing_grad)
    )
    return Work(forward, backward, send, send_grad)


def backward_with_forward(forward: Sequence[float], backward: Sequence[float]) -> list[float]:
    """Seconds of each stage's backward where it does its forward again: all stages do but the last, without a delay.

    Args:
        forward: Seconds of each stage's forward.
        backward: Seconds of each stage's backward alone.
    """
    return [back + again for back, again in zip(backward, [*forward[:-1], 0.0], strict=True)]


def _plan_cut(chain: Layers, profile: Profile, starts: Sequence[int], optimizer_copies: int) -> CutPlan:
    bounds = [0, *starts, len(chain)]
    work = work_of(profile, starts)
    whole = sum(work.forward) + sum(work.backward)
    memory, counts = stage_memory(profile, starts, optimizer_copies), parameter_costs(chain)
    stages = []
    for stage, (start, stop) in enumerate(pairwise(bounds), start=1):
        seconds = work.forward[stage - 1] + work.backward[stage - 1]
        at_rest = (2 + optimizer_copies) * sum(profile.parameters[start:stop]) + sum(profile.frozen[start:stop])
        stages.append(
            StagePlan(
                layers=chain.names[start:stop],
                parameters=int(sum(counts[start:stop])),
                seconds=seconds,
                share=seconds / whole,
                sends=(profile.crossing[stop] if stop < len(chain) else 0) + profile.crossing_grad[start],
                in_flight=memory[stage - 1] - at_rest,
                memory=memory[stage - 1],
            )
        )
    return CutPlan(stages, [chain.names[start] for start in starts], work, predict(*work))


def _call_of_network(
    module: LightningModule,
    target: nn.Module,
    name: str,
    batch: Any,
    context: Callable[[], AbstractContextManager[object]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the training step passes to the network, the module ``target``."""
    try:
        # A copy: the step may change its batch in place.
        return call_of_network(module, target, name, map_tensors(torch.clone, batch), context)
    except NotCalled:
        raise
    except Exception as error:
        raise RuntimeError(
            f"`training_step` failed before it called the network ({type(error).__name__}: {error}). Give the batch as"
            " the training step takes it, on the module's device."
        ) from error


def _panel(title: str, work: Work, prediction: Prediction, stop: float) -> Panel:
    num_stages = len(work.forward)
    batches = num_stages + ceil(stop / prediction.period) + 1
    return Panel(title, simulate(*work, batches), num_stages, prediction.period)


def _details(cut: CutPlan) -> Table:
    num_stages = len(cut.stages)
    table = Table(title=_count(num_stages), title_justify="left")
    table.add_column("stage", justify="right")
    table.add_column("layers", overflow="fold")
    for name in ("parameters", "time", "share", "sends", "in flight", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, stage in enumerate(cut.stages, start=1):
        names = stage.layers
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        sizes = (show_bytes(size) for size in (stage.sends, stage.in_flight, stage.memory))
        # Not a str: rich would read a label such as "layers[x]" as markup.
        label = Text(f"{span} ({len(names)})")
        table.add_row(str(number), label, f"{stage.parameters:,}", show_ms(stage.seconds), f"{stage.share:.1%}", *sizes)
    return table


def _count(num_stages: int) -> str:
    return f"{num_stages} stage{'s' if num_stages > 1 else ''}"
