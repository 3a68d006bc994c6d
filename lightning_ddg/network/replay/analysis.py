"""Where a network whose code cannot be recorded may be cut: the data flow of its calls in training and evaluation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_ddg.network.layers import Call
from lightning_ddg.network.replay.crossing import Output
from lightning_ddg.network.replay.dataflow import DataFlow, observe
from lightning_ddg.network.replay.layers import Layer, Place, find_layers, loose_parameters

_log = logging.getLogger(__name__)


@dataclass
class Analysis:
    """What is known of a network. Layers are given by their positions.

    Attributes:
        layers: Its layers, in the order of their first calls.
        loose: For each parameter that belongs to no layer, the layer whose stage has it.
        forbidden: Positions before which the network cannot be cut, each with the reason.
        crossing: For each position and each form of the call of the layer there, which of the tensors in its arguments
            a later stage cannot compute by itself.
        outputs: For each position, the outputs of earlier layers that are used after it without being such an argument.
        unneeded: For each form of the network's call, the inputs that nothing uses from each position on.
    """

    layers: list[Layer]
    loose: dict[Place, int]
    forbidden: dict[int, str] = field(default_factory=dict)
    crossing: list[dict[bytes, frozenset[int]]] = field(default_factory=list)
    outputs: list[frozenset[Output]] = field(default_factory=list)
    unneeded: dict[bytes, list[frozenset[int]]] = field(default_factory=dict)


def without_call(target: nn.Module) -> Analysis:
    """Return what can be said without a call: the layers in the order in which the network's modules hold them."""
    layers = list(find_layers(target))
    return Analysis(
        layers,
        dict.fromkeys(loose_parameters(target, layers), 0),
        crossing=[{} for _ in layers],
        outputs=[frozenset()] * len(layers),
    )


def analyse(
    target: nn.Module, forward: Callable[..., Any], call: Call, whole: frozenset[nn.Module] = frozenset()
) -> Analysis:
    """Call a network, in training and in evaluation, and watch; everything is left as it was.

    The parts of modules in ``whole`` are not taken for layers.

    Raises:
        RuntimeError: The network's code failed.
    """
    layers = list(find_layers(target, whole))
    training, evaluation = (_observed(target, layers, forward, call, mode) for mode in (True, False))
    found = _combined(target, layers, training, evaluation)
    closed = _unevenly_called(layers, training) | _unevenly_called(layers, evaluation) | _never_cut_inside(found)
    if closed:
        # Parts of these blocks are no layers.
        return analyse(target, forward, call, whole | closed)
    for position, reason in found.forbidden.items():
        _log.debug("%s: no stage can begin with %r: %s", type(target).__name__, found.layers[position].name, reason)
    return found


def _unevenly_called(layers: Sequence[Layer], flow: DataFlow) -> set[nn.Module]:
    """Blocks with parts that are not called once, but as the data will have it, such as experts."""
    times = Counter(flow.calls)
    return {layer.entry for index, layer in enumerate(layers) if layer.entry is not None and times[index] != 1}


def _never_cut_inside(found: Analysis) -> set[nn.Module]:
    """Blocks of several layers between none of which a cut is possible."""
    entries = [layer.entry for layer in found.layers]
    stuck = Counter(entries[position] for position in found.forbidden if entries[position - 1] is entries[position])
    parts = Counter(entries)
    return {entry for entry in parts if entry is not None and stuck[entry] >= parts[entry] - 1 > 0}


def _observed(
    target: nn.Module, layers: Sequence[Layer], forward: Callable[..., Any], call: Call, training: bool
) -> DataFlow:
    try:
        return observe(target, layers, forward, call, training)
    except Exception:  # noqa: BLE001 - code that does not bear such inputs; they are always sent then
        try:
            return observe(target, layers, forward, call, training, follow_inputs=False)
        except Exception as error:
            raise RuntimeError(
                f"The forward of {type(target).__name__} failed when its layers were looked for "
                f"({type(error).__name__}: {error}). If it runs otherwise, return its layers from `configure_stages()`."
            ) from error


def _combined(target: nn.Module, known: Sequence[Layer], training: DataFlow, evaluation: DataFlow) -> Analysis:
    order = training.order
    position = {index: place for place, index in enumerate(order)}
    layers = [known[index] for index in order]
    reasons = {**evaluation.forbidden, **training.forbidden}
    outputs = (training.outputs[index] | evaluation.outputs.get(index, frozenset()) for index in order)
    return Analysis(
        layers,
        _loose(target, layers, position, {**evaluation.parameters, **training.parameters}),
        {place: reasons[index] for place, index in enumerate(order) if place and index in reasons},
        [_either(training.crossing[index], evaluation.crossing.get(index, {})) for index in order],
        [frozenset((position[layer], which) for layer, which in some if layer in position) for some in outputs],
        {training.form: [training.unneeded[index] & evaluation.unneeded[index] for index in order]},
    )


def _loose(
    target: nn.Module, layers: Sequence[Layer], position: dict[int, int], first_uses: dict[Place, int]
) -> dict[Place, int]:
    """Where parameters outside the layers belong: to the stage that uses them first, else to the last."""
    held = {id(parameter) for layer in layers for parameter in layer.module.parameters()}
    return {
        (module, name): position.get(first_uses.get((module, name), -1), len(layers) - 1)
        for module, name in loose_parameters(target, layers)
        # Not another name of a layer's parameter, if the network does not go by it.
        if (module, name) in first_uses or id(module._parameters[name]) not in held
    }


def _either(one: dict[bytes, frozenset[int]], other: dict[bytes, frozenset[int]]) -> dict[bytes, frozenset[int]]:
    return {form: one.get(form, frozenset()) | other.get(form, frozenset()) for form in (*one, *other)}
