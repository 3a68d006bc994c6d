"""A traced network as a chain: the graph of its forward, cut at positions, run part by part.

A cut lies just before the call of a module that has parameters. Whatever has been computed before the cut and is needed
after it crosses as one tuple, so skips, masks and sizes need no special case; what a part only passes on it forwards.
How the graph is recorded is the business of :mod:`~lightning_ddg.network.trace.tracer`.
"""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict, UserList
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_ddg.core.tensors import flatten, unflatten
from lightning_ddg.network.layers import namespace
from lightning_ddg.network.trace.tracer import Recording, Untraceable, record

_MOST_RECORDINGS = 32


class TracedChain:
    """The layers of a network whose forward has been traced.

    A layer is the call of a module with parameters and all that is computed from there to the next such call; what
    comes before the first belongs to the first. The modules are the user's own, under their own names.

    The forward is traced once for every form in which it is called (which arguments there are, the values of those that
    are not tensors) and for every state of the plain attributes that it reads, ``training`` among them. The graphs in
    training and in evaluation are recorded at once; any other when it is met first. Each process does so by itself, and
    all come to the same graph.

    Args:
        target: The network.
        target_name: Its name relative to the root module; ``""`` for the root itself.
        call: Arguments and keyword arguments of an example call; of tensors only the place matters. Without it, every
            argument without a default is taken to be one tensor, or a nest of tensors that the forward takes apart.
        points: Names, relative to the root, of modules that shall begin a layer though they have no parameters.

    Raises:
        Untraceable: The forward cannot be traced.
    """

    def __init__(
        self,
        target: nn.Module,
        target_name: str,
        call: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
        points: Collection[str] = (),
    ) -> None:
        self._target = target
        self._points = frozenset(points)
        self._prefix = f"{target_name}." if target_name else ""
        self._forward: Callable[..., Any] = target.forward
        self._opaque: dict[nn.Module, str] = {}
        self._recordings: OrderedDict[bytes, list[Recording]] = OrderedDict()
        self._starts: dict[int, tuple[Recording, dict[str, int]]] = {}
        self._programs: dict[tuple[int, int, int], tuple[Recording, Callable[..., Any]]] = {}
        self._key = flatten(call if call is not None else _plain_call(target))[0]
        self._modes = self._in_both_modes(self._key)
        self.names = self._common_names()
        self._shared = _read_only(self._modes, target, self._prefix)

    def __len__(self) -> int:
        return len(self.names)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedChain:
        # A copied segment has other weights, but runs the same graphs.
        return self

    @property
    def opaque(self) -> Mapping[nn.Module, str]:
        """Modules that are run as a whole because they cannot be looked into, each with the reason."""
        return self._opaque

    def segment(self, start: int, stop: int) -> nn.Module:
        """Return the module that runs the layers ``start`` to ``stop - 1``.

        The first takes the network's arguments; every other one the tuple that the one before it returns.

        Args:
            start: Position of its first layer, from 0.
            stop: Position after its last layer.

        Raises:
            ValueError: The two positions do not enclose a layer of the chain.
        """
        if not 0 <= start < stop <= len(self):
            raise ValueError(
                f"No segment from position {start} to {stop}: the chain has {len(self)} layers, "
                f"so 0 <= start < stop <= {len(self)} must hold."
            )
        return TracedSegment(self, start, stop)

    def modules(self, start: int, stop: int) -> list[nn.Module]:
        """Return the user's modules that are called in the layers ``start`` to ``stop - 1``."""
        found: dict[nn.Module, None] = {}
        for recording in self._modes:
            for name in self.uses(recording, start, stop):
                owner = self._target.get_submodule(name) if _is_module(self._target, name) else None
                if owner is not None:
                    found[owner] = None
        return list(found)

    # ---- for the segments

    @property
    def modes(self) -> list[Recording]:
        """The recordings in training and in evaluation, of the call the chain was made with."""
        return self._modes

    @property
    def prefix(self) -> str:
        """What stands before a name relative to the network in a name relative to the root."""
        return self._prefix

    @property
    def read_only(self) -> frozenset[str]:
        """Buffers, by their names relative to the root, that the forward reads itself but never writes."""
        return self._shared

    def resolve(self, name: str) -> Any:
        """Return the module, parameter or buffer of that name relative to the network."""
        found: Any = self._target
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def key_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, list[Tensor]]:
        """Take a call apart into its form and its tensors."""
        return flatten((args, kwargs))

    def recording(self, key: bytes) -> Recording:
        """Return the recording of a call of that form, in the state the modules are in.

        Raises:
            TypeError: The forward cannot be traced for this call.
        """
        known = self._recordings.setdefault(key, [])
        self._recordings.move_to_end(key)
        for recording in known:
            if recording.holds():
                return recording
        try:
            known.append(self._record(key))
        except Untraceable as error:
            raise TypeError(
                f"The network {type(self._target).__name__} is called as it has not been before, and cannot be followed"
                f" in this call: {error.reason}. Call it in the same way in all steps, or return its layers from"
                " `configure_stages()`."
            ) from error
        if sum(map(len, self._recordings.values())) > _MOST_RECORDINGS:
            # Graphs are kept for what comes again; a value that is another one in each step never does.
            self._recordings.popitem(last=False)
            self._starts.clear()
            self._programs.clear()
        return known[-1]

    def bounds(self, recording: Recording, start: int, stop: int) -> tuple[int, int]:
        """Return where the layers ``start`` to ``stop - 1`` lie among the nodes of a recording.

        Raises:
            RuntimeError: The recording has no such layer: the network takes another way in this call.
        """
        starts = self._layer_starts(recording)

        def find(position: int) -> int:
            if position == 0:
                return 0
            if position == len(self):
                return len(recording.nodes)
            label = self.names[position]
            if label not in starts:
                raise RuntimeError(
                    f"The network {type(self._target).__name__} was cut before its layer {label!r}, which it does"
                    " not call this time. Cut it elsewhere (`split_points`), or return its layers from"
                    " `configure_stages()`."
                )
            return starts[label]

        return find(start), find(stop)

    def uses(self, recording: Recording, start: int, stop: int) -> list[str]:
        """Return the names, relative to the network, of the modules, parameters and buffers that layers use."""
        first, last = self.bounds(recording, start, stop)
        used: dict[str, None] = {}
        for node in recording.nodes[first:last]:
            if node.op == "call_module":
                used[str(node.target)] = None
            if node.op != "get_attr":
                used.update((str(source.target), None) for source in node.all_input_nodes if source.op == "get_attr")
        if last == len(recording.nodes):
            used.update(
                (str(source.target), None) for source in recording.output.all_input_nodes if source.op == "get_attr"
            )
        return list(used)

    def program(
        self, recording: Recording, start: int, stop: int, make: Callable[[Recording], Callable[..., Any]]
    ) -> Callable[..., Any]:
        """Return the compiled part of a recording, made once."""
        known = self._programs.get((id(recording), start, stop))
        if known is None:
            # Beside its recording, so that no other one gets its id.
            known = self._programs[id(recording), start, stop] = recording, make(recording)
        return known[1]

    # ---- recording

    def _in_both_modes(self, key: bytes) -> list[Recording]:
        modules = list(self._target.modules())
        before = [module.training for module in modules]
        try:
            while True:
                opaque, recordings = len(self._opaque), []
                for mode in (True, False):
                    self._target.train(mode)
                    recordings.append(self._record(key))
                # What is opaque in one mode has to be so in the other: both must have the same layers.
                if len(self._opaque) == opaque:
                    break
        finally:
            for module, training in zip(modules, before, strict=True):
                module.training = training
        self._recordings[key] = list(recordings)
        return recordings

    def _record(self, key: bytes) -> Recording:
        def call(placeholder: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            args, kwargs = unflatten(key, _Placeholders(placeholder))
            return args, kwargs

        while True:
            try:
                return record(self._target, self._forward, call, self._opaque)
            except Untraceable as error:
                if error.module is self._target:
                    raise
                kind = type(error.module)
                alike = [module for module in self._target.modules() if type(module) is kind]
                self._opaque.update((module, error.reason) for module in alike if module is not self._target)

    # ---- layers

    def _layer_starts(self, recording: Recording) -> dict[str, int]:
        known = self._starts.get(id(recording))
        if known is None:
            known = self._starts[id(recording)] = recording, dict(self._labelled(recording))
        return known[1]

    def _labelled(self, recording: Recording) -> Iterator[tuple[str, int]]:
        times: dict[str, int] = {}
        for index, node in enumerate(recording.nodes):
            name = self._module_of(node)
            if name is None:
                continue
            count = times[name] = times.get(name, 0) + 1
            yield f"{self._prefix}{name}" + (f":{count}" if count > 1 else ""), index

    def _module_of(self, node: fx.Node) -> str | None:
        """Name of the module that a node calls, if a layer begins with it."""
        names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        if node.op == "call_module":
            names.insert(0, str(node.target))
        for name in names if node.op != "get_attr" else ():
            if _is_module(self._target, name):
                module = self._target.get_submodule(name)
                if f"{self._prefix}{name}" in self._points or next(module.parameters(), None) is not None:
                    return name
        return None

    def _common_names(self) -> list[str]:
        """Layers of both modes, in the order of both: what comes earlier in evaluation only begins no stage."""
        training, evaluation = (list(self._layer_starts(recording)) for recording in self._modes)
        names: list[str] = []
        passed = 0
        for name in training:
            if name in evaluation[passed:]:
                names.append(name)
                passed = evaluation.index(name) + 1
        if not names:
            raise Untraceable(self._target, "no module with parameters is called")
        return names


class TracedSegment(nn.Module):
    """Consecutive layers of a traced network as one module, with the user's modules under their own names.

    Args:
        chain: The network.
        start: Position of the first layer.
        stop: Position after the last.
    """

    def __init__(self, chain: TracedChain, start: int, stop: int) -> None:
        super().__init__()
        self._chain = chain
        self._start, self._stop = start, stop
        self._registered: set[str] = set()
        names = dict.fromkeys(name for recording in chain.modes for name in chain.uses(recording, start, stop))
        # Outer modules first: what lies inside one of them is registered with it.
        for name in sorted(names, key=lambda name: name.count(".")):
            self._register(name)
        #: Buffers that other segments may hold too.
        self.read_only = frozenset(name for name, _ in self.named_buffers() if name in chain.read_only)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers on the network's arguments, or on what the segment before this one returned."""
        values: Sequence[Any]
        if self._start == 0:
            key, values = self._chain.key_of(args, kwargs)
        else:
            key, *values = args[0]
        recording = self._chain.recording(key)
        program = self._chain.program(recording, self._start, self._stop, self._program)
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            result = program(self, *self._surroundings(recording, values), *values)
        return result if self._stop == len(self._chain) else (key, *result)

    def _register(self, name: str) -> None:
        *path, leaf = f"{self._chain.prefix}{name}".split(".")
        if any(".".join(path[:depth]) in self._registered for depth in range(1, len(path) + 1)):
            return
        value = self._chain.resolve(name)
        space = namespace(self, path)
        if isinstance(value, nn.Module):
            space.add_module(leaf, value)
            self._registered.add(".".join((*path, leaf)))
        elif isinstance(value, nn.Parameter):
            space.register_parameter(leaf, value)
        else:
            space.register_buffer(leaf, value)

    def _surroundings(self, recording: Recording, values: Iterable[Any]) -> list[Any]:
        """The device, and the tensors that are neither parameters nor buffers, on a device where they can be used."""
        tensors = (*self.parameters(), *self.buffers(), *(value for value in values if isinstance(value, Tensor)))
        here = tensors[0].device if tensors else torch.device("cpu")
        return [here, *(tensor.to(here) if here.type == "meta" else tensor for tensor in recording.constants.values())]

    def _program(self, recording: Recording) -> Callable[..., Any]:
        """Compile this segment's part of a recording: (segment, device, *constants, *values) -> values."""
        chain = self._chain
        first, last = chain.bounds(recording, self._start, self._stop)
        inside = recording.nodes[first:last]
        graph = fx.Graph()
        given = recording.inputs if self._start == 0 else alive(recording, first)
        copies = {node: graph.placeholder(node.name) for node in (recording.here, *recording.constants, *given)}

        def copy(node: fx.Node) -> fx.Node:
            if node not in copies:
                # Only attributes are in no order: each segment reads those it needs.
                copies[node] = graph.get_attr(self._own_name(str(node.target)))
            return copies[node]

        without: fx.Node | None = None
        for node in inside:
            if node.op == "get_attr":
                continue
            if node.meta["no_grad"] and without is None:
                without = graph.call_function(_switch_off)
            elif not node.meta["no_grad"] and without is not None:
                graph.call_function(torch.set_grad_enabled, (without,))
                without = None
            new = graph.node_copy(node, copy)
            if node.op == "call_module":
                new.target = self._own_name(str(node.target))
            copies[node] = new
        if without is not None:
            graph.call_function(torch.set_grad_enabled, (without,))
        if self._stop == len(chain):
            graph.output(fx.node.map_arg(recording.output.args[0], copy))
        else:
            graph.output(tuple(copy(value) for value in alive(recording, last)))
        return compile_graph(graph)

    def _own_name(self, name: str) -> str:
        full = f"{self._chain.prefix}{name}"
        try:
            found: Any = self
            for part in full.split("."):
                found = getattr(found, part)
        except AttributeError:
            raise RuntimeError(
                f"The network uses {full!r} in this call, which it did not use in the call that it was cut by, so that"
                " no stage holds it. Call the network in the same way in all steps, or return its layers from"
                " `configure_stages()`."
            ) from None
        return full


def used_names(root: nn.Module) -> set[str]:
    """Return the names of the children and of the own parameters of a module that its forward uses.

    Raises:
        Untraceable: The forward cannot be followed, even if all that it calls is taken as it is.
    """
    key = flatten(_plain_call(root))[0]
    leaves = {module: "of no interest" for module in root.modules() if module is not root}
    recording = record(root, root.forward, lambda make: unflatten(key, _Placeholders(make)), leaves)
    return {str(node.target).split(".")[0] for node in recording.nodes if node.op in ("call_module", "get_attr")}


def alive(recording: Recording, position: int) -> list[fx.Node]:
    """Return the values computed before a position among the nodes and needed from there on, in their order."""
    before = {node: None for node in (*recording.inputs, *recording.nodes[:position]) if node.op != "get_attr"}
    after = (*recording.nodes[position:], recording.output)
    needed = {source for node in after for source in node.all_input_nodes}
    return [node for node in before if node in needed]


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """Return the Python function that a graph says; its first argument is the module that holds the attributes."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<a segment of a traced network>", "exec"), names)  # noqa: S102
    function: Callable[..., Any] = names["forward"]
    return function


class _Placeholders(UserList[Any]):
    """Stands for the list of a call's tensors, each made when it is asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self._make = make

    def __getitem__(self, index: Any) -> Any:
        while len(self.data) <= index:
            self.data.append(self._make())
        return self.data[index]


def _plain_call(target: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with a tensor for each argument that has no default."""
    needed = [p for p in inspect.signature(target.forward).parameters.values() if p.default is p.empty]
    args = tuple(torch.empty(0) for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return args, {p.name: torch.empty(0) for p in needed if p.kind is p.KEYWORD_ONLY}


def _is_module(root: nn.Module, name: str) -> bool:
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True


def _read_only(recordings: Sequence[Recording], target: nn.Module, prefix: str) -> frozenset[str]:
    """Names, relative to the root, of the buffers that the graphs read and that nothing in them writes."""
    buffers = {name for name, _ in target.named_buffers(remove_duplicate=False)}
    nodes = [node for recording in recordings for node in recording.nodes]
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    written = {_origin(node.args[0]) for node in nodes if node.args and _writes(node)}
    read = {str(node.target) for node in nodes if node.op == "get_attr"} & buffers - written
    return frozenset(f"{prefix}{name}" for name in read if not any(name.startswith(f"{unit}.") for unit in called))


def _writes(node: fx.Node) -> bool:
    """Whether a node may write into its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") or name.startswith("i") and hasattr(operator, name)
    return in_place or name == "setitem" or bool(node.kwargs.get("inplace"))


def _origin(argument: Any) -> str | None:
    """Name of the attribute that a value may be a view of."""
    while isinstance(argument, fx.Node):
        if argument.op == "get_attr":
            return str(argument.target)
        argument = argument.args[0] if argument.args else None
    return None


def _switch_off() -> bool:
    """Switch gradients off; return whether they were on."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    return before
