"""The graphs of one network: one for each way in which it is called, recorded when that is first met."""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from lightning_ddg.core.pytree import flatten
from lightning_ddg.network.layers import Call
from lightning_ddg.network.restore import in_mode
from lightning_ddg.network.trace.recording import Recording, Untraceable
from lightning_ddg.network.trace.tracer import record

_MOST_RECORDINGS = 32


class Recordings:
    """Records a network's forward, and labels the layers.

    The forward is traced once for every form in which it is called (which arguments there are, the values of those that
    are not tensors) and for every state of the plain attributes that it reads, ``training`` among them. The graphs in
    training and in evaluation are recorded at once; any other when it is met first. Each process does so by itself, and
    all come to the same graph.

    Args:
        target: The network.
        prefix: What stands before a name relative to the network in a name relative to the root module.
        call: An example call; of tensors only the place matters. Without it, every argument without a default is taken
            to be one tensor, or a pytree of tensors that the forward takes apart.
        points: Names, relative to the root, of modules that shall begin a layer though they have no parameters.

    Attributes:
        modes: The recordings in training and in evaluation, of the call it was made with.
        names: The labels of the layers that both have.
        opaque: Modules that are run as a whole because they cannot be looked into, each with the reason.
    """

    def __init__(self, target: nn.Module, prefix: str, call: Call | None, points: Collection[str]) -> None:
        self.prefix = prefix
        self.opaque: dict[nn.Module, str] = {}
        self._target = target
        self._forward: Callable[..., Any] = target.forward
        self._points = frozenset(points)
        self._known: OrderedDict[bytes, list[Recording]] = OrderedDict()
        key = flatten(call if call is not None else _plain_call(target))[0]
        self.modes = self._in_both_modes(key)
        self._known[key] = list(self.modes)
        self.names = _common_names(*(list(recording.starts) for recording in self.modes))
        if not self.names:
            raise Untraceable(target, "no module with parameters is called")

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        # A copied segment has other weights, but runs the same graphs.
        return self

    def of(self, key: bytes) -> Recording:
        """Return the recording of a call of a form, in the state the modules are in, made if there is none."""
        known = self._known.setdefault(key, [])
        self._known.move_to_end(key)
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
        if sum(map(len, self._known.values())) > _MOST_RECORDINGS:
            # Graphs are kept for what comes again; a value that is another one in each step never does.
            self._known.popitem(last=False)
        return known[-1]

    def bounds(self, recording: Recording, start: int, stop: int) -> tuple[int, int]:
        """Return where the layers ``start`` to ``stop - 1`` lie among a recording's nodes, if it has such layers."""
        return self._start(recording, start), self._start(recording, stop)

    def names_used(self, recording: Recording, start: int, stop: int) -> list[str]:
        """Return the names, relative to the network, of the modules, parameters and buffers that layers use."""
        return recording.names_used(*self.bounds(recording, start, stop))

    def module(self, name: str) -> nn.Module | None:
        """Return the module of that name relative to the network, if it is one."""
        try:
            return self._target.get_submodule(name)
        except AttributeError:
            return None

    def resolve(self, name: str) -> Any:
        """Return the module, parameter or buffer of that name relative to the network."""
        return find(self._target, name)

    def _start(self, recording: Recording, position: int) -> int:
        if position == 0:
            return 0
        if position == len(self.names):
            return len(recording.nodes)
        label = self.names[position]
        if label not in recording.starts:
            raise RuntimeError(
                f"The network {type(self._target).__name__} was cut before its layer {label!r}, which it does"
                " not call this time. Cut it elsewhere (`split_points`), or return its layers from"
                " `configure_stages()`."
            )
        return recording.starts[label]

    def _in_both_modes(self, key: bytes) -> list[Recording]:
        opaque = -1
        # What is opaque in one mode has to be so in the other: both must have the same layers.
        while opaque != len(self.opaque):
            opaque, recordings = len(self.opaque), []
            for training in (True, False):
                with in_mode(self._target, training):
                    recordings.append(self._record(key))
        return recordings

    def _record(self, key: bytes) -> Recording:
        while True:
            try:
                recording = record(self._target, self._forward, key, self.opaque)
            except Untraceable as error:
                if error.module is self._target:
                    raise
                kind = type(error.module)
                alike = [module for module in self._target.modules() if type(module) is kind]
                self.opaque.update((module, error.reason) for module in alike if module is not self._target)
            else:
                recording.starts.update(self._labelled(recording))
                return recording

    def _labelled(self, recording: Recording) -> Iterator[tuple[str, int]]:
        times: dict[str, int] = {}
        for index, node in enumerate(recording.nodes):
            name = self._begun_by(node)
            if name is not None:
                count = times[name] = times.get(name, 0) + 1
                yield f"{self.prefix}{name}" + (f":{count}" if count > 1 else ""), index

    def _begun_by(self, node: fx.Node) -> str | None:
        """Name of the module that a node calls, if a layer begins with it."""
        names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        if node.op == "call_module":
            names.insert(0, str(node.target))
        for name in names if node.op != "get_attr" else ():
            module = self.module(name)
            if module is not None and (
                f"{self.prefix}{name}" in self._points or next(module.parameters(), None) is not None
            ):
                return name
        return None


def used_names(root: nn.Module) -> set[str]:
    """Return the names of a module's children and own parameters that its forward uses, or raise an Untraceable."""
    leaves = {module: "of no interest" for module in root.modules() if module is not root}
    recording = record(root, root.forward, flatten(_plain_call(root))[0], leaves)
    return {str(node.target).split(".")[0] for node in recording.nodes if node.op in ("call_module", "get_attr")}


def find(root: nn.Module, name: str) -> Any:
    """Return what a module has under a qualified name, or raise an AttributeError."""
    return operator.attrgetter(name)(root)


def _common_names(training: Sequence[str], evaluation: Sequence[str]) -> list[str]:
    """Layers of both modes, in the order of both: what comes earlier in evaluation only begins no stage."""
    names: list[str] = []
    passed = 0
    for name in training:
        if name in evaluation[passed:]:
            names.append(name)
            passed = evaluation.index(name) + 1
    return names


def _plain_call(target: nn.Module) -> Call:
    """A call with a tensor for each argument that has no default."""
    needed = [p for p in inspect.signature(target.forward).parameters.values() if p.default is p.empty]
    args = tuple(torch.empty(0) for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return args, {p.name: torch.empty(0) for p in needed if p.kind is p.KEYWORD_ONLY}
