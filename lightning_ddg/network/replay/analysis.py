"""Where a network may be cut, and what crosses there, by the data flow of its calls in training and evaluation.

A cut at position ``p`` lies before the ``p``-th layer, by the order of their first calls. Every stage runs the code
between the layers again; whatever it cannot compute must be sent to it. A value can be sent that is seen among the
arguments or in the output of a call before the next stage begins; if it is not, it can be computed again from what is.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from lightning_ddg.network.layers import Call
from lightning_ddg.network.replay.code import Code
from lightning_ddg.network.replay.crossing import RESULT, Path, Sight
from lightning_ddg.network.replay.cuts import Cuts
from lightning_ddg.network.replay.dataflow import NEVER, DataFlow, Value, observe
from lightning_ddg.network.replay.layers import Place, Tree, find_tree, inside, loose_parameters

_log = logging.getLogger(__name__)


class Crosses(NamedTuple):
    """What crosses a cut in one form of the network's call.

    Attributes:
        sights: Which values computed before the cut are needed after it.
        unneeded: Which inputs are not.
        aliases: Outputs of calls that are such a value too, each with the sight that it is sent by.
        draws: Whether there are random numbers among the values, of which no layer has a part.
    """

    sights: frozenset[Sight] = frozenset()
    unneeded: frozenset[int] = frozenset()
    aliases: Mapping[Sight, Sight] = MappingProxyType({})
    draws: bool = False


@dataclass
class Analysis:
    """What is known of a network. Layers are given by their positions.

    Attributes:
        code: Its code.
        layers: Its layers with their names, in the order of their first calls.
        blocks: The modules that hold layers, and the positions of the first and the last.
        loose: For each parameter that belongs to no layer, the layer whose stage has it.
        calls: The calls of layers, in evaluation and in training.
        forbidden: Positions before which the network cannot be cut, each with the reason.
        open: For each position, the modules whose own code has to be run again after it.
        crossing: For each form of the network's call, in evaluation and in training: what crosses at each position.
        draws: Whether the code between the layers draws random numbers.
        keeps: Whether the code leaves something in attributes for its next run.
        runs_on: Whether each stage goes on to the end of the code, without the values of later ones.
        evaluates: Whether an evaluation can be cut as the training can.
    """

    code: Code
    layers: list[tuple[nn.Module, str]]
    blocks: dict[nn.Module, tuple[int, int]]
    loose: dict[Place, int]
    calls: tuple[list[Path], list[Path]]
    forbidden: dict[int, str] = field(default_factory=dict)
    open: list[frozenset[nn.Module]] = field(default_factory=list)
    crossing: dict[tuple[bytes, bool], list[Crosses]] = field(default_factory=dict)
    draws: bool = True
    keeps: bool = False
    runs_on: bool = False
    evaluates: bool = True

    def crosses(self, form: bytes, training: bool, cut: int) -> Crosses:
        """Return what :attr:`crossing` says, or, for a form that was not seen, all that may be of use.

        How many functions are called is then not known, and so nothing is named by that.

        Raises:
            RuntimeError: Random numbers that several stages use could then not be sent.
        """
        if (form, training) in self.crossing:
            return self.crossing[form, training][cut]
        if training and any(cuts[cut].draws for (_, mode), cuts in self.crossing.items() if mode):
            raise RuntimeError(
                f"{self.code.label} is called in another form than in the first batch, and draws random numbers between"
                " its layers, which it can then not send from stage to stage. Call it in one form."
            )
        known = [cuts[cut] for cuts in self.crossing.values()]
        sights = {sight for crosses in known for sight in crosses.sights if sight[1] < RESULT}
        aliases = {alias: sight for crosses in known for alias, sight in crosses.aliases.items() if sight in sights}
        return Crosses(frozenset(sights), aliases=aliases)


def without_call(target: nn.Module, code: Code, points: Collection[nn.Module] = ()) -> Analysis:
    """Return what can be said without a call: the layers in the order in which the network's modules hold them."""
    tree = find_tree(target, points)
    layers = list(tree.layers.items())
    position = {layer: place for place, (layer, _) in enumerate(layers)}
    blocks = {}
    for block in tree.blocks:
        held = [position[layer] for layer in inside(block, tree.layers)]
        blocks[block] = (min(held), max(held))
    loose = dict.fromkeys(loose_parameters(target, tree.layers), 0)
    nothing = [frozenset[Any]()] * len(layers)
    return Analysis(code, layers, blocks, loose, ([], []), open=nothing)


def analyse(
    target: nn.Module,
    code: Code,
    call: Call,
    points: Collection[nn.Module] = (),
    whole: frozenset[nn.Module] = frozenset(),
) -> Analysis:
    """Call a network, in training and in evaluation, and watch; everything is left as it was.

    Modules in ``points`` are layers though they have no parameters; those in ``whole`` are not looked into.

    Raises:
        RuntimeError: The network's code failed in training.
    """
    tree = find_tree(target, points, whole)
    training, evaluation = _observed(target, tree, code, call, True), None
    try:
        evaluation = _observed(target, tree, code, call, False)
    except RuntimeError:
        # What is called in training only, as a loss that holds the network, need not bear the other mode.
        _log.debug("%s: cannot be cut in evaluation", type(target).__name__, exc_info=True)
    flows = [flow for flow in (training, evaluation) if flow is not None]
    closed = frozenset[nn.Module]().union(*(_to_be_closed(target, tree, flow) for flow in flows))
    if closed - whole:
        return analyse(target, code, call, points, whole | closed)
    found = _combined(target, tree, code, training, evaluation)
    stuck = _never_cut_inside(found)
    if stuck - whole:
        return analyse(target, code, call, points, whole | stuck)
    for position, reason in found.forbidden.items():
        _log.debug("%s: no stage can begin with %r: %s", type(target).__name__, found.layers[position][1], reason)
    return found


def _observed(target: nn.Module, tree: Tree, code: Code, call: Call, training: bool) -> DataFlow:
    try:
        return observe(target, tree, code, call, training)
    except Exception:  # noqa: BLE001 - code that does not bear such inputs; they are always sent then
        try:
            return observe(target, tree, code, call, training, follow_inputs=False)
        except Exception as error:
            raise RuntimeError(
                f"{code.label} failed when its layers were looked for "
                f"({type(error).__name__}: {error}). If it runs otherwise, return its layers from `configure_stages()`."
            ) from error


def _to_be_closed(target: nn.Module, tree: Tree, flow: DataFlow) -> Iterator[nn.Module]:
    """Blocks that call none of their layers, change what they keep, or decide by computed values, as experts do."""
    called = {call.layer for call in flow.calls}
    for block in tree.blocks:
        if block in flow.blocks and not any(layer in called for layer in inside(block, tree.layers)):
            yield block
    for module, _ in flow.changed:
        around_it = [block for block in tree.blocks if module in inside(block, [module])]
        if around_it:
            yield min(around_it, key=lambda block: len(list(block.modules())))
    modules = list(target.modules())
    for _, path, value, _ in flow.reads:
        if path and any(source.layer is not None for source in ancestors([value])):
            yield modules[path[-1][0]]


def _combined(target: nn.Module, tree: Tree, code: Code, training: DataFlow, evaluation: DataFlow | None) -> Analysis:
    observed = [(training, True)] + ([] if evaluation is None else [(evaluation, False)])
    watched = [flow for flow, _ in observed]
    order = list(dict.fromkeys(call.layer for call in training.calls))
    position = {layer: place for place, layer in enumerate(order)}
    loose = _loose(target, position, watched)
    blocks = {}
    for block in frozenset[nn.Module]().union(*(flow.blocks for flow in watched)):
        parts = set(block.modules())
        held = [place for layer, place in position.items() if layer in parts]
        held += [place for (module, _), place in loose.items() if module in parts]
        if held:
            blocks[block] = (min(held), max(held))
    modules = list(target.modules())
    flows = [Cuts(flow, position, loose, blocks, modules) for flow in watched]
    found = Analysis(
        code,
        [(layer, tree.layers[layer]) for layer in order],
        blocks,
        loose,
        ([call.path for call in evaluation.calls] if evaluation else [], [call.path for call in training.calls]),
        open=[frozenset()],
    )
    crossings = [found.crossing.setdefault((flow.form, mode), [Crosses()]) for flow, mode in observed]
    found.keeps = code.keeps and (training.rebound or bool(training.changed))
    found.runs_on = code.runs_on or found.keeps
    found.draws = any(flow.draws_torch for flow in watched)
    closed = frozenset[nn.Module]().union(*(flow.unpicklable for flow in watched))
    changes = next(
        (
            f"its own code changes {name!r}, in each stage again"
            for flow in watched
            for _, name in flow.changed
            if not code.keeps
        ),
        None,
    )
    trains: dict[int, str] = {}
    for cut in range(1, len(order)):
        needs = [flow.needs(cut) for flow in flows]
        reasons = [need.reason or changes for need in needs]
        if reasons[0] is not None:
            trains[cut] = reasons[0]
        if any(reasons):
            found.forbidden[cut] = next(reason for reason in reasons if reason is not None)
        found.open.append(closed.union(*(need.open for need in needs)))
        for crossing, need, (flow, _) in zip(crossings, needs, observed, strict=True):
            crossing.append(Crosses(frozenset(need.sights), flow.followed - need.inputs, need.aliases, need.draws))
    # A step that is cut itself is never evaluated so; a network need not be. What its forward leaves in attributes for
    # the evaluation step, each process has only if it runs all of the forward.
    whole = code.keeps or evaluation is None or evaluation.rebound
    if whole or len(trains) < len(order) - 1 == len(found.forbidden):
        found.forbidden, found.evaluates = trains, False
    return found


def _loose(target: nn.Module, position: dict[nn.Module, int], flows: list[DataFlow]) -> dict[Place, int]:
    """Where parameters outside the layers belong: to the stage that uses them first, else to the last."""
    held = {id(parameter) for layer in position for parameter in layer.parameters()}
    first: dict[Place, int] = {}
    for flow in reversed(flows):
        first |= _first_uses(flow, position)
    return {
        (module, name): first.get((module, name), len(position) - 1)
        for module, name in loose_parameters(target, position)
        # Not another name of a layer's parameter, if the network does not go by it.
        if (module, name) in first or id(module._parameters[name]) not in held
    }


def _first_uses(flow: DataFlow, position: dict[nn.Module, int]) -> dict[Place, int]:
    """The layer called last before each parameter is first used outside of its own layer; the first, if none is."""
    used: dict[Place, int] = {}
    heads = [value for call in flow.calls for value in call.arguments] + [value for *_, value, _ in flow.reads]
    for value in ancestors(heads + flow.output):
        for operand in value.operands:
            if operand.parameter is not None:
                used[operand.parameter] = min(used.get(operand.parameter, NEVER), value.time)
    for call in flow.calls:
        for value in call.arguments:
            if value.parameter is not None:
                used[value.parameter] = min(used.get(value.parameter, NEVER), call.time)
    times = [(call.time, position[call.layer]) for call in flow.calls if call.layer in position]
    return {place: max((at for when, at in times if when <= time), default=0) for place, time in used.items()}


def ancestors(values: Iterable[Value]) -> list[Value]:
    """Return values and all that they were made of."""
    seen = {id(value): value for value in values}
    queue = list(seen.values())
    while queue:
        for operand in queue.pop().operands:
            if id(operand) not in seen:
                seen[id(operand)] = operand
                queue.append(operand)
    return list(seen.values())


def _never_cut_inside(found: Analysis) -> frozenset[nn.Module]:
    """Blocks of several layers between none of which a cut is possible."""
    return frozenset(
        block
        for block, (first, last) in found.blocks.items()
        if last > first and all(place in found.forbidden for place in range(first + 1, last + 1))
    )
