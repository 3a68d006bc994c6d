"""A traced network as layers, and as segments: parts of the recorded graph, compiled to Python functions.

The graph is cut just before calls of modules that have parameters. Whatever has been computed before the cut and is
needed after it crosses as one tuple, so skips, masks and sizes need no special case; what a part only passes on it
forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_ddg.core.pytree import flatten
from lightning_ddg.network.layers import Call, check_range, namespace
from lightning_ddg.network.trace.recording import Recording, read_only
from lightning_ddg.network.trace.recordings import Recordings, find


class TracedChain:
    """The layers of a network whose forward has been traced; see :class:`~lightning_ddg.network.layers.Layers`.

    A layer is the call of a module with parameters and all that is computed from there to the next such call; what
    comes before the first belongs to the first.

    Args:
        target: The network.
        target_name: Its name relative to the root module; ``""`` for the root itself.
        call: An example call, if one is known; see :class:`~lightning_ddg.network.trace.recordings.Recordings`.
        points: Names, relative to the root, of modules that shall begin a layer though they have no parameters.

    Attributes:
        opaque: Modules that are run as a whole because they cannot be looked into, each with the reason.
    """

    compilable = True

    def __init__(
        self, target: nn.Module, target_name: str, call: Call | None = None, points: Collection[str] = ()
    ) -> None:
        self._forward = target.forward
        self._recordings = Recordings(target, f"{target_name}." if target_name else "", call, points)
        self.names = self._recordings.names
        self.opaque = self._recordings.opaque
        names = read_only(self._recordings.modes, target)
        self.read_only = frozenset(f"{self._recordings.prefix}{name}" for name in names)

    def __len__(self) -> int:
        return len(self.names)

    def segment(self, start: int, stop: int) -> nn.Module:
        """Return a :class:`TracedSegment`; see :meth:`Layers.segment`."""
        check_range(self, start, stop)
        return TracedSegment(self._recordings, start, stop)

    def modules(self, start: int, stop: int) -> list[nn.Module]:
        """Return the user's modules that are called in the layers ``start`` to ``stop - 1``."""
        recordings = self._recordings
        names = [name for recording in recordings.modes for name in recordings.names_used(recording, start, stop)]
        return [module for name in dict.fromkeys(names) if (module := recordings.module(name)) is not None]

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network's own forward."""
        return self._forward(*args, **kwargs)


class TracedSegment(nn.Module):
    """Consecutive layers of a traced network as one module, with the user's modules under their own names."""

    def __init__(self, recordings: Recordings, start: int, stop: int) -> None:
        super().__init__()
        self._recordings = recordings
        self._start, self._stop = start, stop
        self._registered: set[str] = set()
        names = dict.fromkeys(
            name for recording in recordings.modes for name in recordings.names_used(recording, start, stop)
        )
        # Outer modules first: what lies inside one of them is registered with it.
        for name in sorted(names, key=lambda name: name.count(".")):
            self._register(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers on the network's arguments, or on what the segment before this one returned."""
        values: Sequence[Any]
        if self._start == 0:
            key, values = flatten((args, kwargs))
        else:
            key, *values = args[0]
        recording = self._recordings.of(key)
        part = (self._start, self._stop)
        program = recording.programs.get(part)
        if program is None:
            program = recording.programs[part] = self._program(recording)
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            result = program(self, *self._surroundings(recording, values), *values)
        return result if self._stop == len(self._recordings.names) else (key, *result)

    def _register(self, name: str) -> None:
        *path, leaf = f"{self._recordings.prefix}{name}".split(".")
        if any(".".join(path[:depth]) in self._registered for depth in range(1, len(path) + 1)):
            return
        value = self._recordings.resolve(name)
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
        first, last = self._recordings.bounds(recording, self._start, self._stop)
        inside = recording.nodes[first:last]
        graph = fx.Graph()
        given = recording.inputs if self._start == 0 else recording.alive(first)
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
        if self._stop == len(self._recordings.names):
            graph.output(fx.node.map_arg(recording.output.args[0], copy))
        else:
            graph.output(tuple(copy(value) for value in recording.alive(last)))
        return compile_graph(graph)

    def _own_name(self, name: str) -> str:
        full = f"{self._recordings.prefix}{name}"
        try:
            find(self, full)
        except AttributeError:
            raise RuntimeError(
                f"The network uses {full!r} in this call, which it did not use in the call that it was cut by, so that"
                " no stage holds it. Call the network in the same way in all steps, or return its layers from"
                " `configure_stages()`."
            ) from None
        return full


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """Return the Python function that a graph says; its first argument is the module that holds the attributes."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, "<a segment of a traced network>", "exec"), names)  # noqa: S102
    function: Callable[..., Any] = names["forward"]
    return function


def _switch_off() -> bool:
    """Switch gradients off; return whether they were on."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    return before
