"""The data flow of one observed call of a network: what it says about the cuts between the network's layers.

Outputs of layers, parameters and the network's floating-point inputs are followed through the code between the layers.
Times count the calls of layers that have begun. A cut at time ``p`` lies just before the ``p``-th call: what exists by
then is known after it only if it is an argument of that call, or what a layer returned, or made from the network's
inputs alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_ddg.core.pytree import flatten, unflatten
from lightning_ddg.core.tensors import Slot, parameters_replaced
from lightning_ddg.network.layers import Call
from lightning_ddg.network.replay.crossing import Output, places
from lightning_ddg.network.replay.layers import Layer, Place
from lightning_ddg.network.replay.module_calls import caching_configs, calls_left, calls_taken, plain_calls
from lightning_ddg.network.replay.tracked import Origin, Tracked, content_of, replaced
from lightning_ddg.network.restore import gpus_of, in_mode, trial


@dataclass(frozen=True)
class DataFlow:
    """What one call has shown. Layers are given by their numbers.

    Attributes:
        form: The form of the call.
        calls: The layers, as they were called.
        crossing: By layer and form of its first call: which tensors in the arguments a stage cannot compute by itself.
        forbidden: The layers before which there can be no cut, each with the reason.
        outputs: By layer, the outputs of earlier ones that do not reach its first call but are used later.
        unneeded: By layer, the inputs that nothing uses from its first call on.
        parameters: For each parameter used outside its layer's calls, the layer after whose call it is first used.
    """

    form: bytes
    calls: list[int]
    crossing: dict[int, dict[bytes, frozenset[int]]]
    forbidden: dict[int, str]
    outputs: dict[int, frozenset[Output]]
    unneeded: dict[int, frozenset[int]]
    parameters: dict[Place, int]

    @property
    def order(self) -> list[int]:
        """The layers that were called, by their first calls."""
        return list(dict.fromkeys(self.calls))


def observe(
    target: nn.Module,
    layers: Sequence[Layer],
    forward: Callable[..., Any],
    call: Call,
    training: bool,
    *,
    follow_inputs: bool = True,
) -> DataFlow:
    """Run a network once, in training or evaluation, and watch; it is left as it was.

    Without ``follow_inputs``, all inputs are taken to be needed to the end.
    """
    log = _Log()
    form, tensors = flatten(call)
    owner = {part: index for index, layer in enumerate(layers) for part in layer.module.modules()}
    own: list[list[tuple[Slot, Any]]] = [[] for _ in layers]
    stands: list[tuple[Slot, Tracked]] = []
    for path, module in target.named_modules():
        for name, value in module._parameters.items():
            if value is not None:
                origin = Origin(f"the parameter {f'{path}.{name}'.lstrip('.')!r}", parameter=(module, name))
                stands.append(((module._parameters, name), Tracked(value.detach(), value.device, log, origin)))
                if module in owner:
                    own[owner[module]].append(((module._parameters, name), value))

    def run(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, name = layers[index].module, layers[index].name
        args, kwargs = log.called(index, name, args, kwargs)
        with calls_left(module), parameters_replaced(own[index]):
            # As in :mod:`~lightning_ddg.network.replay.part`: this is inside the layer's own `__call__`, if any.
            return log.returned(index, name, nn.Module.__call__(module, *args, **kwargs))

    # Integers are small, and decide more often what the network does.
    floating = [index for index, tensor in enumerate(tensors) if follow_inputs and tensor.is_floating_point()]
    with (
        in_mode(target, training),
        trial(target.modules(), gpus_of([target], tensors)),
        torch.no_grad(),
        plain_calls(caching_configs(target)),
        calls_taken({layer.module: partial(run, index) for index, layer in enumerate(layers)}),
        parameters_replaced(stands),
    ):
        inputs = [tensor.detach().clone() for tensor in tensors]
        for index in floating:
            origin = Origin(f"input {index}", computed=False, inputs=frozenset([index]))
            inputs[index] = Tracked(inputs[index], inputs[index].device, log, origin)
        args, kwargs = unflatten(form, inputs)
        log.finished(forward(*args, **kwargs))
    return _conclusions(log, form, layers, owner, frozenset(floating))


class _LayerCall(NamedTuple):
    layer: int
    form: bytes
    arguments: dict[int, Tracked]


class _Use(NamedTuple):
    time: int
    tensor: Tracked
    user: str


class _Log:
    """Notes what happens to the tensors that are followed; keeps them alive, so that no other one gets an id of theirs.

    ``needs`` says of inputs that something made from them is needed in the stage that runs the ``p``-th call.
    """

    def __init__(self) -> None:
        self.calls: list[_LayerCall] = []
        self.uses: list[_Use] = []
        self.reads: list[tuple[int, str]] = []
        self.needs: list[tuple[int, frozenset[int]]] = []
        #: Outputs of layers, and those of them that a hook has put into the network's output.
        self.outputs: list[Tracked] = []
        self.hooked: list[Tracked] = []

    @property
    def now(self) -> int:
        return len(self.calls)

    def used(self, tensor: Tracked) -> None:
        self.uses.append(_Use(self.now, tensor, "the network's own code"))
        if not tensor.origin.computed:
            self.needs.append((self.now - 1, tensor.origin.inputs))

    def read(self, tensor: Tracked, operation: str) -> None:
        if tensor.origin.computed:
            what = f"the network's own code reads the values of {tensor.origin.what} ({operation})"
            self.reads.append((self.now, what))
        else:
            self.needs.append((sys.maxsize, tensor.origin.inputs))

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def called(self, index: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Note the call of a layer; return what it is really called with."""
        form, tensors = places((args, kwargs))
        tracked = {place: tensor for place, tensor in enumerate(tensors) if isinstance(tensor, Tracked)}
        for tensor in tracked.values():
            self.uses.append(_Use(self.now, tensor, repr(name)))
            if not tensor.origin.computed:
                self.needs.append((self.now, tensor.origin.inputs))
        self.calls.append(_LayerCall(index, form, tracked))
        args, kwargs = replaced(content_of, (args, kwargs))
        return args, kwargs

    def returned(self, index: int, name: str, output: Any) -> Any:
        """Follow what a layer returns."""
        form, tensors = flatten(output)
        tracked = [
            Tracked(tensor, tensor.device, self, Origin(f"an output of {name!r}", output=(index, place)))
            for place, tensor in enumerate(tensors)
        ]
        self.outputs += tracked
        return unflatten(form, tracked)

    def finished(self, output: Any) -> None:
        """Note what the network returns."""
        made = {id(tensor.content): tensor for tensor in self.outputs}
        for tensor in flatten(output)[1]:
            if isinstance(tensor, Tracked):
                self.uses.append(_Use(self.now, tensor, "the network's output"))
                self.needs.append((self.now, tensor.origin.inputs))
            elif id(tensor) in made:
                self.hooked.append(made[id(tensor)])


def _conclusions(
    log: _Log, form: bytes, layers: Sequence[Layer], owner: dict[nn.Module, int], followed: frozenset[int]
) -> DataFlow:
    calls = [call.layer for call in log.calls]
    first = {layer: calls.index(layer) for layer in dict.fromkeys(calls)}
    arguments = [set(map(id, call.arguments.values())) for call in log.calls]
    later: dict[int, set[Output]] = {}
    for use in log.uses:
        if use.tensor.origin.output is not None:
            for cut in _missed_by(use, arguments):
                later.setdefault(cut, set()).add(use.tensor.origin.output)
    parameters = _parameter_uses(log)
    reasons: dict[int, str] = {}
    for cuts, reason in (
        *_lost_values(log, arguments),
        *_shared_parameters(parameters, {module: first[index] for module, index in owner.items() if index in first}),
        *_repeated_layers(calls, layers, later),
    ):
        for cut in cuts:
            reasons.setdefault(cut, reason)
    crossing = {}
    for layer, time in first.items():
        computed = [place for place, tensor in log.calls[time].arguments.items() if tensor.origin.computed]
        crossing[layer] = {log.calls[time].form: frozenset(computed)}
    unneeded = {}
    for index in range(len(layers)):
        time = first.get(index, 0)
        unneeded[index] = followed.difference(*(inputs for last, inputs in log.needs if last >= time))
    return DataFlow(
        form,
        calls,
        crossing,
        {layer: reasons[time] for layer, time in first.items() if time in reasons},
        {layer: frozenset(later.get(time, ())) for layer, time in first.items()},
        unneeded,
        {place: calls[min(times)] for place, times in parameters.items() if calls},
    )


def _missed_by(use: _Use, arguments: Sequence[set[int]]) -> list[int]:
    """The cuts that a tensor would have to cross to where it is used, and does not cross as an argument."""
    return [cut for cut in range(use.tensor.born, use.time) if id(use.tensor) not in arguments[cut]]


def _parameter_uses(log: _Log) -> dict[Place, list[int]]:
    """After which calls each parameter is used by the network's own code or passed to a layer."""
    uses: dict[Place, list[int]] = {}
    for use in log.uses:
        if use.tensor.origin.parameter is not None:
            uses.setdefault(use.tensor.origin.parameter, []).append(max(use.time - 1, 0))
    return uses


def _lost_values(log: _Log, arguments: Sequence[set[int]]) -> Iterator[tuple[Iterable[int], str]]:
    """Yield cuts behind which a value would be missing, with the reason."""
    for use in log.uses:
        what, computed, _, parameter, output = use.tensor.origin
        if computed and parameter is None and output is None:
            yield _missed_by(use, arguments), f"what was computed from {what} is used later, by {use.user}"
    for tensor in log.hooked:
        yield range(tensor.born, log.now), f"a hook puts {tensor.origin.what} into the network's output"
    for time, reason in log.reads:
        yield range(time, log.now), reason


def _shared_parameters(
    uses: dict[Place, list[int]], own_call: dict[nn.Module, int]
) -> Iterator[tuple[Iterable[int], str]]:
    """Yield cuts between two uses of a parameter, with the reason."""
    for (module, name), times in uses.items():
        all_times = [*times, own_call[module]] if module in own_call else times
        reason = f"the parameter {name!r} of a {type(module).__name__} is used on both sides"
        yield range(min(all_times) + 1, max(all_times) + 1), reason


def _repeated_layers(
    calls: Sequence[int], layers: Sequence[Layer], later: dict[int, set[Output]]
) -> Iterator[tuple[Iterable[int], str]]:
    """Yield cuts between two calls of a layer, and those that its output would cross, with the reason."""
    for index in dict.fromkeys(calls):
        first, last = calls.index(index), len(calls) - 1 - calls[::-1].index(index)
        if first != last:
            name = layers[index].name
            yield range(first + 1, last + 1), f"{name!r} is called on both sides"
            # Which of its outputs is meant could not be said.
            crossed = [cut for cut, outputs in later.items() if any(layer == index for layer, _ in outputs)]
            yield crossed, f"an output of {name!r} is used later"
