"""The data flow of one call of a network: what its layers and the code between them make of what.

Outputs of layers, parameters, random numbers and the network's floating-point inputs are followed through the code.
Time counts what happens: calls that begin or end, and operations.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ddg.core.pytree import flatten, unflatten
from lightning_ddg.core.tensors import Slot, parameters_replaced
from lightning_ddg.network.layers import Call
from lightning_ddg.network.replay.crossing import ARGUMENT, OUTPUT, RESULT, Path, Sight, arguments_of, outputs_of
from lightning_ddg.network.replay.frames import in_checkpoint
from lightning_ddg.network.replay.layers import Place, Tree
from lightning_ddg.network.replay.module_calls import calls_left, calls_taken, configs_of, plain_calls
from lightning_ddg.network.replay.tracked import Tracked, content_of, replaced
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
        unpicklable: Blocks whose output cannot be described in a message.
        changed: Buffers and numbers of modules outside the layers that each call changes.
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
    unpicklable: frozenset[nn.Module]
    changed: list[Place]


def observe(
    target: nn.Module,
    tree: Tree,
    forward: Callable[..., Any],
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
        calls_taken(watch.handlers()),
        parameters_replaced(watch.stands),
        _derivatives_refused(target),
        _functions_noticed(watch),
        _attributes_kept(target.modules()),
    ):
        state = _OwnState(target, tree)
        inputs = [tensor.detach().clone() for tensor in tensors]
        for index in floating:
            inputs[index] = watch.follow(inputs[index], Value(f"input {index}", 0, input=index))
        args, kwargs = unflatten(form, inputs)
        with torch.enable_grad(), _Draws(watch), _Functions(watch):
            output = forward(*args, **kwargs)
        watch.finished(output)
        changed = state.changed(lambda: forward(*args, **kwargs))
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
        frozenset(watch.unpicklable),
        changed,
    )


@contextmanager
def _derivatives_refused(target: nn.Module) -> Iterator[None]:
    """Refuse derivatives that code takes between layers: they go through all of them."""
    grad = torch.autograd.grad

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{type(target).__name__} takes a derivative (`torch.autograd.grad`) in the forward, through layers that"
            " would be in other stages"
        )

    torch.autograd.grad = refuse
    try:
        yield
    finally:
        torch.autograd.grad = grad


@contextmanager
def _functions_noticed(watch: _Watch) -> Iterator[None]:
    """Tell when autograd functions run: no gradient is noted inside, nor goes through what stands for an argument."""
    apply = vars(torch.autograd.Function)["apply"]

    def noticed(kind: type, *args: Any, **kwargs: Any) -> Any:
        for tensor in arguments_of((args, kwargs)):
            if isinstance(tensor, Tracked):
                tensor.origin.applied = True
        watch.applying += 1
        try:
            return apply.__get__(None, kind)(*args, **kwargs)
        finally:
            watch.applying -= 1

    torch.autograd.Function.apply = classmethod(noticed)
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply


@contextmanager
def _attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Bind the attributes of modules to what they were bound to, and leave in their lists and dicts what was there."""
    saved = [(vars(module), dict(vars(module))) for module in modules]
    held = [value for _, before in saved for name, value in before.items() if name not in _TABLES]
    lists = [(value, list(value)) for value in held if type(value) is list]
    dicts = [(value, dict(value)) for value in held if type(value) is dict]
    try:
        yield
    finally:
        for table, before in saved:
            for name in table.keys() - before.keys():
                del table[name]
            table.update(before)
        for one, items in lists:
            one[:] = items
        for other, entries in dicts:
            other.clear()
            other.update(entries)


_TABLES = ("_parameters", "_buffers", "_modules")


class _OwnState:
    """The buffers and numbers of modules outside the layers: every stage that runs the code there would change them."""

    def __init__(self, target: nn.Module, tree: Tree) -> None:
        held = {part for layer in tree.layers for part in layer.modules()}
        self._modules = [module for module in target.modules() if module not in held]
        self._buffers = [
            (module, name, buffer, buffer._version)
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._before = self._numbers()

    def changed(self, again: Callable[[], object]) -> list[Place]:
        """Return what has changed, and would change once more if the network were called ``again``."""
        found: list[Place] = [(at[0], at[1]) for at in self._buffers if _rewritten(*at)]
        after = self._numbers()
        if after != self._before:
            again()
            found += [place for place, value in self._numbers().items() if value != after.get(place, value)]
        return found

    def _numbers(self) -> dict[Place, float]:
        return {
            (module, name): value
            for module in self._modules
            for name, value in vars(module).items()
            if type(value) in (int, float)
        }


def _rewritten(module: nn.Module, name: str, before: Tensor, version: int) -> bool:
    now = module._buffers.get(name)
    if now is before:
        return before._version != version
    # What is not saved may be made anew, longer than before, as tables of positions are.
    return isinstance(now, Tracked) or name not in module._non_persistent_buffers_set


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
        self._tree = tree
        self._numbers = {module: number for number, module in enumerate(target.modules())}
        self._path: Path = ()
        self._called: Counter[Path] = Counter()
        self._functions: Counter[Path] = Counter()
        self._memory: defaultdict[int, list[Value]] = defaultdict(list)
        self._kept: list[Tensor] = []
        #: What layers have returned, by identity: a hook may put it elsewhere.
        self._returned: dict[int, Value] = {}
        self._own: dict[nn.Module, list[tuple[Slot, Any]]] = {layer: [] for layer in tree.layers}
        self._libraries = _library_state()
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
        self._memory[_address(tensor)].append(value)
        return Tracked(tensor, tensor.device, self, value)

    # ---- the ledger

    def read(self, tensor: Tracked, operation: str) -> None:
        self.reads.append((self.now, self._path, tensor.origin, operation))

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return func(*args, **kwargs)

    def made(self, func: Any, operands: Sequence[Tracked]) -> Value:
        self.now += 1
        values = tuple(tensor.origin for tensor in operands)
        computed = next((value for value in values if value.input is None), values[0])
        return Value(computed.what, self.now, self._path, values, drawn=_draws(func))

    def written(self, func: Any, operands: Sequence[Tracked], into: Sequence[Tracked]) -> None:
        self.now += 1
        values = tuple(tensor.origin for tensor in operands)
        for tensor in into:
            if not isinstance(tensor, Tracked):
                continue
            self._changed(tensor.content)
            tensor.origin = Value(tensor.origin.what, self.now, self._path, values, drawn=_draws(func))
            self._memory[_address(tensor.content)].append(tensor.origin)

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
        arguments = tuple(tensor.origin for tensor in given)
        self.calls.append(LayerCall(layer, self.now, self._path, arguments, in_checkpoint()))
        versions = [tensor.content._version for tensor in given]
        args, kwargs = replaced(content_of, (args, kwargs))
        left = _followed_attributes(layer)
        for module, attribute, stand in left:
            vars(module)[attribute] = stand.content
        before = _held_tensors(layer)
        with calls_left(layer), parameters_replaced(self._own[layer]), torch.no_grad():
            # As in :mod:`~lightning_ddg.network.replay.part`: this is inside the layer's own `__call__`, if any.
            output = nn.Module.__call__(layer, *args, **kwargs)
        self.now += 1
        for tensor, version in zip(given, versions, strict=True):
            if tensor.content._version != version:
                self.written(None, [tensor], [tensor])
                tensor.origin.layer = layer
        form, tensors = flatten(output)
        tracked = [self._returned_by(layer, f"an output of {name!r}", tensor) for tensor in tensors]
        for module, attribute, held in _new_tensors(layer, before):
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
            output = self._end(outer, block, output)
            self.busy = False
            return output

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path:
        self._check_libraries()
        outer = self._path
        call = (*outer, (self._numbers[module], 0))
        self._path = (*outer, (self._numbers[module], self._called[call]))
        self._called[call] += 1
        self.now += 1
        self._see(arguments_of((args, kwargs)), ARGUMENT)
        return outer

    def _end(self, outer: Path, module: nn.Module, output: Any) -> Any:
        self.now += 1
        try:
            self._see(outputs_of(output), OUTPUT)
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
                tensor.origin.sights.append((self.now, (self._path, RESULT + index, place), self.applying > 0))

    def _see(self, tensors: Iterable[Tensor], where: int) -> None:
        for place, tensor in enumerate(tensors):
            if isinstance(tensor, Tracked):
                tensor.origin.sights.append((self.now, (self._path, where, place), self.applying > 0))

    def finished(self, output: Any) -> None:
        """Note what the network returns."""
        self._check_libraries()
        self.now += 1
        for tensor in _leaves(output):
            if isinstance(tensor, Tracked):
                self.output.append(tensor.origin)
            elif id(tensor) in self._returned:
                # A hook has put it there.
                self.output.append(self._returned[id(tensor)])

    # ---- memory and random numbers

    def _changed(self, tensor: Tensor) -> None:
        for value in self._memory[_address(tensor)]:
            value.changed = min(value.changed, self.now)

    def _check_libraries(self) -> None:
        state = _library_state()
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
        return self.follow(tensor, Value("a new tensor", self.now, self._path))


class _Functions(TorchFunctionMode):
    """Counts the torch functions that the code between the layers calls."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        watch = self._watch
        if watch.busy:
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        watch.busy = True
        watch.computed(result)
        watch.busy = False
        return result


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows random tensors that the code between the layers makes."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._watch.draws_torch |= _draws(func) and not self._watch.busy
        if self._watch.busy or not isinstance(result, Tensor) or isinstance(result, Tracked):
            return result
        if _draws(func) and not func._schema.is_mutable:
            return self._watch.drawn(result)
        return self._watch.made_empty(result) if func in _EMPTY else result


_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
}


def _draws(func: Any) -> bool:
    return func is not None and torch.Tag.nondeterministic_seeded in func.tags


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _library_state() -> Any:
    numpy: Any = np.random.get_state(legacy=False)
    return random.getstate(), numpy["state"]["pos"], numpy["state"]["key"].tobytes()


def _held_tensors(layer: nn.Module) -> dict[tuple[nn.Module, str], int]:
    return {
        (module, name): id(value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _followed_attributes(layer: nn.Module) -> list[tuple[nn.Module, str, Tracked]]:
    return [
        (module, name, value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tracked)
    ]


def _new_tensors(layer: nn.Module, before: dict[tuple[nn.Module, str], int]) -> list[tuple[nn.Module, str, Tensor]]:
    """Attributes that a call of a layer has bound to another tensor."""
    return [
        (module, name, value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not isinstance(value, Tracked) and before.get((module, name)) != id(value)
    ]


def _leaves(output: Any) -> Iterable[Tensor]:
    try:
        return outputs_of(output)
    except Exception:  # noqa: BLE001 - whatever pickling says
        return arguments_of(output)
