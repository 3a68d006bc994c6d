"""What one symbolic run of a network recorded, and what can be read off it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn


class Untraceable(BaseException):
    """A module cannot be looked into, for a reason; not an Exception: the user's own ``except`` must not catch it."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(reason)
        self.module = module
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Recording:
    """A graph, as it was recorded.

    Attributes:
        nodes: The computation in its order, without inputs and output. The target of a ``call_module`` or a
            ``get_attr`` node is a name relative to the network. ``meta["no_grad"]`` says that gradients were off.
        inputs: Placeholders of the network's inputs.
        output: The output node; its first argument is the pytree of nodes that the network returns.
        here: Stands for the device that the network runs on.
        constants: Tensors that are neither parameters nor buffers, by the placeholder that stands for them.
        reads: The modules' plain attributes that were read, with their values then.
        starts: Where each layer begins among the nodes, by its label.
        programs: Compiled parts, by the positions of their first layer and after their last.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    output: fx.Node
    here: fx.Node
    constants: dict[fx.Node, Tensor]
    reads: list[tuple[nn.Module, str, Any]]
    starts: dict[str, int] = field(default_factory=dict)
    programs: dict[tuple[int, int], Callable[..., Any]] = field(default_factory=dict)

    def holds(self) -> bool:
        """Return whether a run today would record the same."""
        return all(_same(getattr(module, name, None), value) for module, name, value in self.reads)

    def alive(self, position: int) -> list[fx.Node]:
        """Return the values computed before a position among the nodes and needed from there on, in their order."""
        before = {node: None for node in (*self.inputs, *self.nodes[:position]) if node.op != "get_attr"}
        after = (*self.nodes[position:], self.output)
        needed = {source for node in after for source in node.all_input_nodes}
        return [node for node in before if node in needed]

    def names_used(self, first: int, last: int) -> list[str]:
        """Return the names of the modules, parameters and buffers that the nodes ``first`` to ``last - 1`` use."""
        used: dict[str, None] = {}
        for node in (*self.nodes[first:last], *([self.output] if last == len(self.nodes) else ())):
            if node.op == "call_module":
                used[str(node.target)] = None
            if node.op != "get_attr":
                used.update((str(source.target), None) for source in node.all_input_nodes if source.op == "get_attr")
        return list(used)


def read_only(recordings: Sequence[Recording], target: nn.Module) -> set[str]:
    """Return the names of the buffers that the graphs of a network read and that nothing in them writes."""
    buffers = {name for name, _ in target.named_buffers(remove_duplicate=False)}
    nodes = [node for recording in recordings for node in recording.nodes]
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    written = {_origin(node.args[0]) for node in nodes if node.args and _writes(node)}
    read = {str(node.target) for node in nodes if node.op == "get_attr"} & buffers - written
    return {name for name in read if not any(name.startswith(f"{unit}.") for unit in called)}


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


def _same(now: object, then: object) -> bool:
    return now is then or (type(now) is type(then) and now == then)
