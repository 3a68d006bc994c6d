"""The data flow of one call of a network: what its layers and the code between them make of what.

Outputs of layers, parameters, random numbers and the network's floating-point inputs are followed through the code.
Time counts what happens: calls that begin or end, and operations.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.core.pytree import flatten, map_tensors, tensors_of, unflatten
from lightning_ddg.core.tensors import Slot, parameters_replaced
from lightning_ddg.network.layers import Call
from lightning_ddg.network.replay.code import Code
from lightning_ddg.network.replay.crossing import ARGUMENT, OUTPUT, RESULT, Path, Sight, arguments_of, tensors_in
from lightning_ddg.network.replay.frames import in_checkpoint
from lightning_ddg.network.replay.layers import Place, Tree
from lightning_ddg.network.replay.module_calls import calls_left, calls_taken, configs_of, plain_calls
from lightning_ddg.network.replay.noticing import (
    Draws,
    Functions,
    OwnState,
    derivatives_refused,
    followed_attributes,
    functions_noticed,
    held_tensors,
    library_state,
    new_tensors,
)
from lightning_ddg.network.replay.shapes import Shapes, StandIn
from lightning_ddg.network.replay.tracked import Tracked, address_of, content_of, draws, on_meta, replaced
from lightning_ddg.network.restore import gpus_of, in_mode, trial

NEVER = sys.maxsize


@dataclass(eq=False)
class Value:
    """A tensor between two writes into it.

    Attributes:
        what: Where it comes from, in words.
        time: When it was made.
        path: The calls in which it was made.
        operands: What an operation made it of.
        layer: The layer that returned it.
        parameter: The parameter that it is.
        input: Which of the network's inputs it is.
        drawn: Whether it is random, and made between the layers.
        changed: When something is written into its memory.
        applied: Whether an autograd function is called with it.
        passed: Whether a block returned it that made it of nothing that is followed, such as a mask.
        sights: Where it is seen, each with the time, and whether by code that no gradient goes through.
    """

    what: str
    time: int
    path: Path = ()
    operands: tuple[Value, ...] = ()
    layer: nn.Module | None = None
    parameter: Place | None = None
    input: int | None = None
    drawn: bool = False
    changed: int = NEVER
    applied: bool = False
    passed: bool = False
    sights: list[tuple[int, Sight, bool]] = field(default_factory=list)

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer: when, the call's name, which followed values it was given, and in which checkpointed code."""

    layer: nn.Module
    time: int
    path: Path
    arguments: tuple[Value, ...]
    checkpoint: FrameType | None = None


@dataclass(frozen=True)
class DataFlow:
    """What one call has shown.

    Attributes:
        form: The form of the call.
        followed: Which inputs were followed.
        calls: The calls of layers.
        blocks: The blocks that were called.
        reads: Values that the code between the layers has read: the time, in which calls, the value, and what it did.
        draws: When it has drawn random numbers from Python or NumPy.
        draws_torch: Whether it has drawn any from torch.
        output: The followed values in the network's output, and that of hooks.
        end: When the call was over.
        stand_ins: What finds the shapes of what each call returns, as a stage must that does not run the module.
        unpicklable: Blocks whose output cannot be described in a message.
        changed: Buffers and numbers of modules outside the layers that each call changes.
        rebound: Whether it has bound attributes of these to something else, or made lists and dictionaries there grow.
    """

    form: bytes
    followed: frozenset[int]
    calls: list[LayerCall]
    blocks: frozenset[nn.Module]
    reads: list[tuple[int, Path, Value, str]]
    draws: list[int]
    draws_torch: bool
    output: list[Value]
    end: int
    stand_ins: list[StandIn]
    unpicklable: frozenset[nn.Module]
    changed: list[Place]
    rebound: bool


def observe(
    target: nn.Module,
    tree: Tree,
    code: Code,
    call: Call,
    training: bool,
    *,
    follow_inputs: bool = True,
) -> DataFlow:
    """Run a network once, in training or evaluation, and watch; it is left as it was.

    Without ``follow_inputs``, all inputs are taken to be needed to the end.
    """
    form, tensors = flatten(call)
    watch = _Watch(target, tree)
    # Integers are small, and decide more often what the network does.
    floating = [index for index, tensor in enumerate(tensors) if follow_inputs and tensor.is_floating_point()]
    with (
        in_mode(target, training),
        trial(target.modules(), gpus_of([target], tensors)),
        torch.no_grad(),
        plain_calls(configs_of(target)),
    ):
        state = OwnState(target, tree, metrics=not code.keeps)
        inputs = [tensor.detach().clone() for tensor in tensors]
        for index in floating:
            inputs[index] = watch.follow(inputs[index], Value(f"input {index}", 0, input=index))
        args, kwargs = unflatten(form, inputs)
        with (
            calls_taken(watch.handlers()),
            parameters_replaced(watch.stands),
            derivatives_refused(target),
            functions_noticed(watch),
            torch.enable_grad(),
            Draws(watch),
            Functions(watch),
        ):
            output = code.observed(*args, **kwargs)
        watch.finished(output)
        rebound = state.rebound()
        args, kwargs = unflatten(form, [tensor.detach().clone() for tensor in tensors])
        changed = state.changed(None if code.keeps else lambda: code.observed(*args, **kwargs))
    return DataFlow(
        form,
        frozenset(floating),
        watch.calls,
        frozenset(watch.blocks),
        watch.reads,
        watch.draws,
        watch.draws_torch,
        watch.output,
        watch.now,
        watch.stand_ins,
        frozenset(watch.unpicklable),
        changed,
        rebound,
    )


class _Watch:
    """Notes what happens; keeps all tensors alive, so that no other one gets an id or an address of theirs."""

    def __init__(self, target: nn.Module, tree: Tree) -> None:
        self.now = 0
        self.busy = False
        #: How many autograd functions run.
        self.applying = 0
        self.calls: list[LayerCall] = []
        self.blocks: set[nn.Module] = set()
        self.unpicklable: set[nn.Module] = set()
        self.reads: list[tuple[int, Path, Value, str]] = []
        self.draws: list[int] = []
        self.draws_torch = False
        self.output: list[Value] = []
        self.stands: list[tuple[Slot, Tracked]] = []
        self.stand_ins: list[StandIn] = []
        self._shapes = Shapes()
        self._tree = tree
        #: Whether operations can be done without values.
        self._on_meta: dict[Any, bool] = {}
        self._numbers = {module: number for number, module in enumerate(target.modules())}
        self._path: Path = ()
        self._called: Counter[Path] = Counter()
        self._functions: Counter[Path] = Counter()
        self._memory: defaultdict[int, list[Value]] = defaultdict(list)
        self._writes: dict[int, Value] = {}
        self._kept: list[Tensor] = []
        self._plain: set[int] = set()
        #: What layers have returned, by identity: a hook may put it elsewhere.
        self._returned: dict[int, Value] = {}
        self._own: dict[nn.Module, list[tuple[Slot, Any]]] = {layer: [] for layer in tree.layers}
        self._libraries = library_state()
        owner = {part: layer for layer in tree.layers for part in layer.modules()}
        for path, module in target.named_modules():
            for name, value in module._parameters.items():
                if value is not None:
                    what = f"the parameter {f'{path}.{name}'.lstrip('.')!r}"
                    stand = self.follow(value.detach(), Value(what, 0, parameter=(module, name)))
                    self.stands.append(((module._parameters, name), stand))
                    if module in owner:
                        self._own[owner[module]].append(((module._parameters, name), value))

    def handlers(self) -> dict[nn.Module, Callable[[tuple[Any, ...], dict[str, Any]], Any]]:
        """Return what takes over the calls of layers and blocks."""
        taken: dict[nn.Module, Any] = {layer: partial(self._run_layer, layer) for layer in self._tree.layers}
        return taken | {block: partial(self._run_block, block) for block in self._tree.blocks}

    def follow(self, tensor: Tensor, value: Value) -> Tracked:
        """Return a tensor to be followed."""
        self._kept.append(tensor)
        self._memory[address_of(tensor)].append(value)
        return Tracked(tensor, tensor.device, self, value)

    # ---- the ledger

    def read(self, tensor: Tracked, operation: str) -> None:
        if self.busy:
            self._used_inside([tensor])
        else:
            self.reads.append((self.now, self._path, self._origin(tensor), operation))

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tracked]) -> Any:
        with torch.no_grad():
            if self.busy:
                return func(*args, **kwargs)
            if func not in self._on_meta:
                try:
                    func(*replaced(on_meta, args), **replaced(on_meta, kwargs))
                    self._on_meta[func] = True
                except Exception:  # noqa: BLE001 - each operation says in its own way that it cannot
                    self._on_meta[func] = False
            if not self._on_meta[func]:
                # Without values, not even the shape of the result is known.
                for tensor in operands:
                    self.read(tensor, str(func).removeprefix("aten."))
            return func(*args, **kwargs)

    def made(self, func: Any, operands: Sequence[Tracked]) -> Value:
        self.now += 1
        values = tuple(map(self._origin, operands))
        computed = next((value for value in values if value.input is None), values[0])
        layer = self._used_inside(operands) if self.busy else None
        return Value(computed.what, self.now, self._path, values, layer=layer, drawn=draws(func) and layer is None)

    def written(self, func: Any, operands: Sequence[Tracked], into: Sequence[Tracked]) -> None:
        self.now += 1
        values = tuple(map(self._origin, operands))
        layer = self._used_inside(operands) if self.busy else None
        for tensor in into:
            if not isinstance(tensor, Tracked):
                continue
            self._changed(tensor.content)
            what, drawn = tensor.origin.what, draws(func) and layer is None
            self._plain -= {address_of(tensor.content)} if draws(func) else set()  # Only one stage may know it now.
            tensor.origin = Value(what, self.now, self._path, values, layer=layer, drawn=drawn)
            self._memory[address_of(tensor.content)].append(tensor.origin)
            self._writes[address_of(tensor.content)] = tensor.origin

    def _origin(self, tensor: Tracked) -> Value:
        """Return where a tensor comes from, and what was written into it by another view of its memory since."""
        value = tensor.origin
        last = self._writes.get(address_of(tensor.content))
        if last is not None and last.time > value.time:
            value.changed = min(value.changed, last.time)
            tensor.origin = Value(value.what, last.time, last.path, (value, last))
        return tensor.origin  # type: ignore[no-any-return]

    def _used_inside(self, operands: Sequence[Tracked]) -> nn.Module:
        """Note what the layer that runs uses beside its arguments, as weights of a layer given to it; return it."""
        call = self.calls.pop()
        used = [value for value in map(self._origin, operands) if value.time < call.time]
        arguments = (*call.arguments, *(value for value in used if value not in call.arguments))
        self.calls.append(replace(call, arguments=arguments))
        return call.layer

    # ---- calls

    def _run_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.busy:
            # By another layer, whose output this one so has a part in.
            value = Value(f"a call of {self._tree.layers[layer]!r}", self.now, self._path, layer=layer)
            caller = self.calls.pop()
            self.calls.append(LayerCall(layer, caller.time, caller.path, ()))
            self.calls.append(replace(caller, arguments=(*caller.arguments, value)))
            with calls_left(layer), parameters_replaced(self._own[layer]):
                return nn.Module.__call__(layer, *args, **kwargs)
        self.busy = True
        outer = self._begin(layer, args, kwargs)
        name = self._tree.layers[layer]
        given = [tensor for tensor in arguments_of((args, kwargs)) if isinstance(tensor, Tracked)]
        arguments = tuple(map(self._origin, given))
        self.calls.append(LayerCall(layer, self.now, self._path, arguments, in_checkpoint()))
        versions = [tensor.content._version for tensor in given]
        args, kwargs = replaced(content_of, (args, kwargs))
        left = followed_attributes(layer)
        for module, attribute, stand in left:
            vars(module)[attribute] = stand.content
        before = held_tensors(layer)
        with calls_left(layer), parameters_replaced(self._own[layer]), torch.no_grad():
            # As in :mod:`~lightning_ddg.network.replay.part`: this is inside the layer's own `__call__`, if any.
            output = nn.Module.__call__(layer, *args, **kwargs)
        self.now += 1
        for tensor, version in zip(given, versions, strict=True):
            if tensor.content._version != version:
                self.written(None, [tensor], [tensor])
        form, tensors = flatten(output)
        tracked = [self._returned_by(layer, f"an output of {name!r}", tensor) for tensor in tensors]
        for module, attribute, held in new_tensors(layer, before):
            what = f"what {name!r} leaves in its attribute {attribute!r}"
            vars(module)[attribute] = self._returned_by(layer, what, held)
        for module, attribute, stand in left:
            if vars(module).get(attribute) is stand.content:
                vars(module)[attribute] = stand
        output = self._end(outer, layer, unflatten(form, tracked))
        self.busy = False
        return output

    def _returned_by(self, layer: nn.Module, what: str, tensor: Tensor) -> Tracked:
        value = Value(what, self.now, self._path, layer=layer)
        tensor = content_of(tensor)
        self._returned[id(tensor)] = value
        return self.follow(tensor, value)

    def _run_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with calls_left(block):
            if self.busy:
                return nn.Module.__call__(block, *args, **kwargs)
            self.busy = True
            outer = self._begin(block, args, kwargs)
            self.blocks.add(block)
            self.busy = False
            output = nn.Module.__call__(block, *args, **kwargs)
            self.busy = True
            output = self._end(outer, block, self._passed(block, output))
            self.busy = False
            return output

    def _passed(self, block: nn.Module, output: Any) -> Any:
        """Follow all that a block returns: no stage after it runs its code again."""
        what = f"an output of {self._tree.blocks[block]!r}"

        def follow(tensor: Tensor) -> Tensor:
            if isinstance(tensor, Tracked):
                return tensor
            return self.follow(tensor, Value(what, self.now, self._path, passed=True))

        try:
            if all(isinstance(tensor, Tracked) for tensor in tensors_of(output)):
                return output
            return map_tensors(follow, output)
        except Exception:  # noqa: BLE001 - whatever pickling says
            return output

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path:
        self._check_libraries()
        outer = self._path
        call = (*outer, (self._numbers[module], 0))
        self._path = (*outer, (self._numbers[module], self._called[call]))
        self._called[call] += 1
        self.now += 1
        self._see(arguments_of((args, kwargs)), ARGUMENT)
        self.stand_ins.append(StandIn(module, self.now, self._shapes.later(module, *args, **kwargs)))
        return outer

    def _end(self, outer: Path, module: nn.Module, output: Any) -> Any:
        self.now += 1
        try:
            self._see(tensors_of(output), OUTPUT)
        except Exception:  # noqa: BLE001 - whatever pickling says
            self.unpicklable.add(module)
        self._path = outer
        return output

    def computed(self, result: Any) -> None:
        """Called with what a torch function has returned to the code between the layers."""
        place = self._functions[self._path]
        self._functions[self._path] += 1
        for index, tensor in enumerate(arguments_of(result)):
            if isinstance(tensor, Tracked):
                self._origin(tensor).sights.append((self.now, (self._path, RESULT + index, place), self.applying > 0))

    def _see(self, tensors: Iterable[Tensor], where: int) -> None:
        for place, tensor in enumerate(tensors):
            if isinstance(tensor, Tracked):
                self._origin(tensor).sights.append((self.now, (self._path, where, place), self.applying > 0))

    def finished(self, output: Any) -> None:
        """Note what the network returns."""
        self._check_libraries()
        self.now += 1
        for tensor in tensors_in(output):
            if isinstance(tensor, Tracked):
                self.output.append(self._origin(tensor))
            elif id(tensor) in self._returned:
                # A hook has put it there.
                self.output.append(self._returned[id(tensor)])

    # ---- memory and random numbers

    def _changed(self, tensor: Tensor) -> None:
        for value in self._memory[address_of(tensor)]:
            value.changed = min(value.changed, self.now)

    def _check_libraries(self) -> None:
        state = library_state()
        if state != self._libraries:
            self.draws.append(self.now)
            self._libraries = state

    def drawn(self, tensor: Tensor) -> Tracked:
        """Follow a tensor that an operation on nothing that is followed has made, for what will be drawn into it."""
        self.now += 1
        return self.follow(tensor, Value("random numbers", self.now, self._path, drawn=True))

    def made_empty(self, tensor: Tensor) -> Tracked:
        """Follow a tensor without values, into which random numbers may be drawn."""
        self.now += 1
        self._plain.add(address_of(tensor))
        return self.follow(tensor, Value("a new tensor", self.now, self._path))

    def plain(self, tensor: Tracked) -> bool:
        """See :class:`~lightning_ddg.network.replay.tracked.Ledger`."""
        return address_of(tensor.content) in self._plain
