"""One observed call of a network that cannot be traced: its layers, their order, and where it can be cut.

The rules by which a module is taken for a layer change here, and those by which a cut is possible. How a part of the
network is run is the business of :mod:`~lightning_ddg.network.replay.part`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.core.tensors import Slot, flatten, parameters_replaced, unflatten
from lightning_ddg.network.replay.module_calls import caching_configs, calls_left, calls_taken, places, plain_calls
from lightning_ddg.network.replay.tracked import Origin, Tracked, replaced

Call = tuple[tuple[Any, ...], dict[str, Any]]
#: A layer, and which of the tensors in its output.
Output = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A module that is run as a whole.

    Attributes:
        name: Its name relative to the network.
        module: The module.
        entry: The entry of a list that it lies in, if the list's entries were looked into.
    """

    name: str
    module: nn.Module
    entry: nn.Module | None = None


@dataclass
class Survey:
    """What is known of a network.

    Attributes:
        layers: Its layers, in the order of their first calls.
        loose: For each parameter that belongs to no layer, by its module and name, the layer whose stage has it.
        forbidden: Positions before which the network cannot be cut, each with the reason.
        crossing: For each position and each form of the call of the layer there, which of the tensors in its arguments
            a later stage cannot compute by itself.
        outputs: For each position, the outputs of earlier layers that are used after it without being such an argument:
            the position of the layer, and which of the tensors in its output.
        unneeded: For each form of the network's call, the inputs that nothing uses from each position on.
    """

    layers: list[Layer]
    loose: dict[tuple[nn.Module, str], int]
    forbidden: dict[int, str] = field(default_factory=dict)
    crossing: list[dict[bytes, frozenset[int]]] = field(default_factory=list)
    outputs: list[frozenset[Output]] = field(default_factory=list)
    unneeded: dict[bytes, list[frozenset[int]]] = field(default_factory=dict)


def registered(target: nn.Module) -> Survey:
    """Return what can be said without a call: the layers in the order in which the network's modules hold them."""
    layers = list(find_layers(target, set()))
    return Survey(
        layers,
        dict.fromkeys(_loose(target, layers), 0),
        crossing=[{} for _ in layers],
        outputs=[frozenset()] * len(layers),
    )


def survey(target: nn.Module, forward: Callable[..., Any], call: Call) -> Survey:
    """Call a network, in training and in evaluation, and watch; everything is left as it was.

    Args:
        target: The network, on the device of the call.
        forward: Its forward.
        call: Arguments and keyword arguments.

    Raises:
        RuntimeError: The network's code failed.
    """
    whole: set[nn.Module] = set()
    while True:
        layers = list(find_layers(target, whole))
        training, evaluation = (_observed(target, layers, forward, call, mode) for mode in (True, False))
        found = _combined(target, training, evaluation)
        # Parts of a block are no layers where no cut is possible between them, or if they are called as the data will
        # have it, such as experts.
        uneven = {
            layer.entry
            for watch in (training, evaluation)
            for index, layer in enumerate(layers)
            if layer.entry is not None and watch.calls.count(index) != 1
        }
        inner = Counter(layer.entry for layer in found.layers if layer.entry is not None)
        inside = [
            position for position in found.forbidden if found.layers[position - 1].entry is found.layers[position].entry
        ]
        stuck = Counter(found.layers[position].entry for position in inside)
        uneven |= {entry for entry, parts in inner.items() if stuck[entry] >= parts - 1 > 0}
        if not uneven:
            return found
        whole |= uneven


def _observed(
    target: nn.Module, layers: Sequence[Layer], forward: Callable[..., Any], call: Call, training: bool
) -> _Watch:
    try:
        return _Watch(target, layers).observe(forward, call, training)
    except Exception:  # noqa: BLE001 - code that does not bear such inputs; they are always sent then
        try:
            return _Watch(target, layers).observe(forward, call, training, follow_inputs=False)
        except Exception as error:
            raise RuntimeError(
                f"The forward of {type(target).__name__} failed when its layers were looked for "
                f"({type(error).__name__}: {error}). If it runs otherwise, return its layers from `configure_stages()`."
            ) from error


# ---- layers


def find_layers(target: nn.Module, whole: set[nn.Module]) -> Iterator[Layer]:
    """Yield the layers of a network, in the order in which its modules hold them.

    A module that holds, at any depth, a list of two or more modules is looked into, and so is one that has no forward
    of its own; every other one with parameters or saved buffers is a layer. Entries of a list are layers, unless they
    hold a list of blocks that are all alike themselves, as the resolutions of a vision network do.

    Args:
        target: The network.
        whole: Modules not to be looked into.
    """
    seen: set[nn.Module] = set()

    def below(prefix: str, module: nn.Module, entry: nn.Module | None) -> Iterator[Layer]:
        for name, child in module.named_children():
            if child in seen or not child.state_dict():
                continue
            seen.add(child)
            inside = child if isinstance(module, nn.ModuleList | nn.Sequential) else entry
            if child not in whole and (_cannot_be_called(child) or _holds_list(child, blocks=inside is not None)):
                yield from below(f"{prefix}{name}.", child, inside)
            else:
                yield Layer(f"{prefix}{name}", child, entry)

    yield from below("", target, None)


def _cannot_be_called(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def _holds_list(module: nn.Module, *, blocks: bool) -> bool:
    for part in module.modules():
        if isinstance(part, nn.ModuleList | nn.Sequential):
            entries = [child for child in part.children() if next(child.parameters(), None) is not None]
            alike = len({type(child) for child in entries}) == 1 and all(any(child.children()) for child in entries)
            if len(entries) >= 2 and (alike or not blocks):
                return True
    return False


def _loose(target: nn.Module, layers: Sequence[Layer]) -> list[tuple[nn.Module, str]]:
    inside = {part for layer in layers for part in layer.module.modules()}
    outside = [module for module in target.modules() if module not in inside]
    return [(module, name) for module in outside for name, value in module._parameters.items() if value is not None]


# ---- watching


class _Watch:
    """The ledger of one call. Times count the calls of layers that have begun.

    A cut at ``p`` lies just before the ``p``-th call: what exists by then is known after it only if it is an argument
    of that call, or what a layer returned, or made from the network's inputs alone.
    """

    def __init__(self, target: nn.Module, layers: Sequence[Layer]) -> None:
        self.now = 0
        self.layers = layers
        self.calls: list[int] = []
        self.crossing: list[dict[bytes, frozenset[int]]] = [{} for _ in layers]
        self.bad: dict[int, str] = {}
        self.later: dict[int, set[Output]] = {}
        self.form = b""
        self._target = target
        self._arguments: list[set[int]] = []
        self._reads: list[tuple[int, str]] = []
        self._needs: list[tuple[int, frozenset[int]]] = []
        self._uses: dict[tuple[nn.Module, str], list[int]] = {}
        self._stands: dict[int, tuple[nn.Module, str]] = {}
        self._made: dict[int, Tracked] = {}
        self._outputs: dict[int, Output] = {}
        self._alive: list[Any] = []
        self._followed: frozenset[int] = frozenset()
        self._owner = {part: index for index, layer in enumerate(layers) for part in layer.module.modules()}

    def observe(self, forward: Callable[..., Any], call: Call, training: bool, *, follow_inputs: bool = True) -> _Watch:
        """Run the network once."""
        self.form, tensors = flatten(call)
        slots: dict[tuple[nn.Module, str], tuple[Slot, Any, Tracked]] = {}
        for name, module in self._target.named_modules():
            for own, value in module._parameters.items():
                if value is not None:
                    label = f"the parameter {f'{name}.{own}'.lstrip('.')!r}"
                    stand = Tracked(value.detach(), value.device, self, Origin(label))
                    slots[module, own] = (module._parameters, own), value, stand
                    self._stands[id(stand)] = module, own
        own_slots = [
            [(slot, value) for (module, _), (slot, value, _) in slots.items() if self._owner.get(module) == index]
            for index in range(len(self.layers))
        ]

        def taker(index: int) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
            module = self.layers[index].module

            def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                args, kwargs = self._called(index, args, kwargs)
                with calls_left(module), parameters_replaced(own_slots[index]):
                    # As in :mod:`~lightning_ddg.network.replay.part`: this is inside the layer's own `__call__`, if
                    # any.
                    return self._returned(index, nn.Module.__call__(module, *args, **kwargs))

            return run

        handlers = {layer.module: taker(index) for index, layer in enumerate(self.layers)}
        with (
            _left_as_it_is(self._target, training, tensors),
            plain_calls(caching_configs(self._target)),
            calls_taken(handlers),
            parameters_replaced((slot, stand) for slot, _, stand in slots.values()),
        ):
            inputs = [tensor.detach().clone() for tensor in tensors]
            args, kwargs = unflatten(
                self.form, list(map(self._input, range(len(inputs)), inputs)) if follow_inputs else inputs
            )
            self._finished(forward(*args, **kwargs))
        self._close()
        return self

    def _input(self, index: int, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            # Integers are small, and decide more often what the network does.
            return tensor
        self._followed |= {index}
        return Tracked(tensor, tensor.device, self, Origin(f"input {index}", False, frozenset([index])))

    def used(self, tensor: Tracked) -> None:
        """See :class:`~lightning_ddg.network.replay.tracked.Ledger`."""
        self._use(tensor, "the network's own code")
        if not tensor.origin.computed:
            self._needs.append((self.now - 1, tensor.origin.inputs))

    def read(self, tensor: Tracked, operation: str) -> None:
        """See :class:`~lightning_ddg.network.replay.tracked.Ledger`."""
        if tensor.origin.computed:
            self._reads.append(
                (self.now, f"the network's own code reads the values of {tensor.origin.what} ({operation})")
            )
        else:
            self._needs.append((sys.maxsize, tensor.origin.inputs))

    def _use(self, tensor: Tracked, user: str) -> None:
        # Alive, so that no other one gets its id.
        self._alive.append(tensor)
        key = self._stands.get(id(tensor))
        if key is not None:
            self._uses.setdefault(key, []).append(max(self.now - 1, 0))
        elif tensor.origin.computed:
            for cut in range(tensor.born, self.now):
                if id(tensor) in self._arguments[cut]:
                    continue
                if id(tensor) in self._outputs:
                    self.later.setdefault(cut, set()).add(self._outputs[id(tensor)])
                else:
                    self.bad.setdefault(cut, f"what was computed from {tensor.origin.what} is used later, by {user}")

    def _called(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        form, tensors = places((args, kwargs))
        tracked = {place: tensor for place, tensor in enumerate(tensors) if isinstance(tensor, Tracked)}
        name = self.layers[index].name
        for tensor in tracked.values():
            self._use(tensor, f"{name!r}")
            if not tensor.origin.computed:
                self._needs.append((self.now, tensor.origin.inputs))
        self._arguments.append(set(map(id, tracked.values())))
        if index not in self.calls:
            computed = frozenset(place for place, tensor in tracked.items() if tensor.origin.computed)
            self.crossing[index][form] = computed
        self.calls.append(index)
        self.now += 1
        args, kwargs = replaced(lambda leaf: leaf.content if isinstance(leaf, Tracked) else leaf, (args, kwargs))
        return args, kwargs

    def _returned(self, index: int, output: Any) -> Any:
        form, tensors = flatten(output)
        origin = Origin(f"an output of {self.layers[index].name!r}")
        tracked = [Tracked(tensor, tensor.device, self, origin) for tensor in tensors]
        for place, tensor in enumerate(tracked):
            self._made[id(tensor.content)] = tensor
            self._outputs[id(tensor)] = index, place
        return unflatten(form, tracked)

    def _finished(self, output: Any) -> None:
        for tensor in flatten(output)[1]:
            made = self._made.get(id(tensor))
            if isinstance(tensor, Tracked):
                self._use(tensor, "the network's output")
                self._needs.append((self.now, tensor.origin.inputs))
            elif made is not None:
                for cut in range(made.born, self.now):
                    self.bad.setdefault(cut, f"a hook puts {made.origin.what} into the network's output")

    # ---- conclusions

    def _close(self) -> None:
        for time, reason in self._reads:
            for cut in range(time, self.now):
                self.bad.setdefault(cut, reason)
        for (module, name), uses in self._uses.items():
            owner = self._owner.get(module)
            if owner is not None and owner in self.calls:
                uses = [*uses, self.calls.index(owner)]
            for cut in range(min(uses) + 1, max(uses) + 1):
                self.bad.setdefault(cut, f"the parameter {name!r} of a {type(module).__name__} is used on both sides")
        for index in set(self.calls):
            first, last = self.calls.index(index), self.now - 1 - self.calls[::-1].index(index)
            for cut in range(first + 1, last + 1):
                self.bad.setdefault(cut, f"{self.layers[index].name!r} is called on both sides")
            if first != last:
                # Which of its outputs is meant could not be said.
                for cut, outputs in self.later.items():
                    if any(layer == index for layer, _ in outputs):
                        self.bad.setdefault(cut, f"an output of {self.layers[index].name!r} is used later")

    @property
    def order(self) -> list[int]:
        """The layers that were called, by their first calls."""
        return list(dict.fromkeys(self.calls))

    @property
    def slots(self) -> Mapping[tuple[nn.Module, str], int]:
        """For each parameter used outside its layer's call, the layer after whose call it is first used."""
        return {key: self.calls[min(uses)] for key, uses in self._uses.items()}

    def forbidden(self) -> dict[int, str]:
        """The layers before which there can be no cut, with the reasons."""
        return {index: self.bad[first] for index in self.order if (first := self.calls.index(index)) in self.bad}

    def later_outputs(self, index: int) -> set[Output]:
        """Outputs of earlier layers, which do not reach a layer's first call but are used later."""
        return self.later.get(self.calls.index(index), set()) if index in self.calls else set()

    def unneeded_from(self, index: int) -> frozenset[int]:
        """The inputs that nothing uses from a layer's first call on."""
        first = self.calls.index(index) if index in self.calls else 0
        return self._followed.difference(*(inputs for last, inputs in self._needs if last >= first))


def _combined(target: nn.Module, training: _Watch, evaluation: _Watch) -> Survey:
    order = training.order
    layers = [training.layers[index] for index in order]
    last = len(order) - 1
    first_uses = {**evaluation.slots, **training.slots}
    held = {id(parameter) for layer in layers for parameter in layer.module.parameters()}
    loose = {
        (module, name): order.index(first_uses[module, name]) if first_uses.get((module, name)) in order else last
        for module, name in _loose(target, layers)
        # Not another name of a layer's parameter, if the network does not go by it.
        if (module, name) in first_uses or id(module._parameters[name]) not in held
    }
    reasons = {**evaluation.forbidden(), **training.forbidden()}
    crossing = []
    for index in order:
        forms = dict(training.crossing[index])
        for form, which in evaluation.crossing[index].items():
            forms[form] = forms.get(form, frozenset()) | which
        crossing.append(forms)
    outputs = [
        frozenset(
            (order.index(layer), place)
            for layer, place in training.later_outputs(index) | evaluation.later_outputs(index)
            if layer in order
        )
        for index in order
    ]
    unneeded = [training.unneeded_from(index) & evaluation.unneeded_from(index) for index in order]
    return Survey(
        layers,
        loose,
        {position: reasons[index] for position, index in enumerate(order) if position and index in reasons},
        crossing,
        outputs,
        {training.form: unneeded},
    )


@contextmanager
def _left_as_it_is(target: nn.Module, training: bool, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the mode, the buffers and torch's generators back."""
    modes = [(module, module.training) for module in target.modules()]
    tables = [(module._buffers, dict(module._buffers)) for module, _ in modes]
    values = [(buffer, buffer.clone()) for buffer in target.buffers()]
    devices = sorted({tensor.device for tensor in (*tensors, *target.parameters()) if tensor.is_cuda}, key=str)
    try:
        target.train(training)
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for table, before in tables:
            # A forward may also have bound another tensor to the name.
            table.clear()
            table.update(before)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
