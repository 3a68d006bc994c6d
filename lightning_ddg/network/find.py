"""Which part of a module is the network, and what are its layers?

A network whose ``configure_stages`` lists them, or that is a plain ``nn.Sequential`` of layers, has them called in
turn; of any other, every stage runs the code. docs/networks.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_ddg.network.layers import Call, Chain, Layers
from lightning_ddg.network.replay.chain import ReplayedChain
from lightning_ddg.network.replay.layers import find_tree, has_forward
from lightning_ddg.network.replay.module_calls import calls_left, calls_taken
from lightning_ddg.network.restore import gpus_of, trial

#: Given a module and its name, returns the arguments of a call of it, if any is known.
Example = Callable[[nn.Module, str], Call | None]


@dataclass(frozen=True)
class Network:
    """The layers of the network found in a root module, the module whose call is its call, and that one's name."""

    chain: Layers
    target: nn.Module
    target_name: str


def find_network(
    root: nn.Module,
    layers: Sequence[nn.Module] | None = None,
    *,
    requirer: str = "DDGStrategy",
    example: Example | None = None,
    points: Collection[str] = (),
) -> Network:
    """Find the network that may be cut, and its layers.

    Without ``layers`` the network is the one child of ``root`` that has parameters, or else what the step calls: the
    root, by its own ``forward``, or the one child with trainable parameters that it calls. If that is not known, it is
    the root if it has a ``forward``, the one child that is an ``nn.Sequential``, or the one that has trainable
    parameters. Other children are left alone. The layers of a plain ``nn.Sequential`` are its modules, unless these
    hold layers themselves; those of anything else are the modules with parameters that its code calls.

    With ``layers`` the network is the innermost module with an own ``forward`` that holds all of them. Sequentials
    inside it are flattened, except those whose call does more than call their layers (an overridden ``forward``,
    hooks, parameters or buffers of their own, a compiled call).

    Args:
        root: The module to search, as a rule the LightningModule.
        layers: What ``configure_stages()`` returned: the layers in the order of the call.
        requirer: Who asks, for the error messages.
        example: Knows how the user's step calls a module. Asked only for a network whose code stages have to run, or if
            several modules may be the network.
        points: The user's split points: a module named here is a layer even if it has no parameters.

    Raises:
        TypeError: No child, or more than one, can be the network; its code cannot be run in parts; or ``layers`` is not
            a list of modules that can be called.
        ValueError: ``layers`` is empty, repeats a layer with parameters, holds ``root`` itself or parameters that
            ``root`` does not have, or leaves out parameters of the target; or a parameter is not initialized yet.
    """
    names: dict[int, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    if layers is None:
        target = called_network(root, requirer, example)
        target_name = names[id(target)][0]
        return Network(_layers_of(root, target, target_name, example, points), target, target_name)
    items = list(_items(_entries(layers, names), names))
    target = _target(root, [item for _, item in items], names)
    found = [leaf for path, item in items for leaf in _leaves(path, item, outermost=item is target)]
    found = _labelled(found, names)
    _check_listed(root, found)
    target_name = names[id(target)][0]
    if target is not root:
        _check_covered(target, target_name, found)
    _check_initialized(found)
    return Network(Chain(found, target.forward), target, target_name)


def _layers_of(
    root: nn.Module,
    target: nn.Module,
    name: str,
    example: Example | None,
    points: Collection[str],
) -> Layers:
    """Return the layers of a network, as fine as they can be told apart."""
    _check_initialized([(name, target)])
    named = [module for path, module in root.named_modules() if path in points]
    if _calls_its_children(target):
        flat = list(_leaves(name, target, outermost=True))
        _check_covered(target, name, flat)
        if {id(layer) for layer in find_tree(target, named).layers} <= {id(layer) for _, layer in flat}:
            return Chain(flat, target.forward)
    call = None if example is None else example(target, name)
    try:
        return ReplayedChain(target, name, call, named)
    except (RuntimeError, ValueError) as error:
        described = f"{type(root).__name__}.forward" if target is root else f"{name!r} ({type(target).__name__})"
        raise TypeError(
            f"The network {described} cannot be run in parts: {error} Return the layers, in the order of the call, from"
            " `configure_stages()`."
        ) from error


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _calls_its_children(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its children in turn; a listed ModuleList can mean nothing else."""
    if isinstance(module, nn.Sequential):
        plain = type(module).forward is nn.Sequential.forward and type(module).__call__ is nn.Module.__call__
        return plain and "forward" not in vars(module)
    return isinstance(module, nn.ModuleList) and not has_forward(module)


def _can_be_flattened(module: nn.Module) -> bool:
    """Whether calling the children in turn does all that the call of ``module`` does, and holds all that it holds."""
    more_than_children = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        module._parameters,
        module._buffers,
        module._compiled_call_impl,
    )
    return _calls_its_children(module) and not any(more_than_children)


def _leaves(path: str, module: nn.Module, *, outermost: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, layer), flattening. Hooks on the outermost module fire around the call of the network as before."""
    if _calls_its_children(module) if outermost else _can_be_flattened(module):
        # Not `named_children()`: it leaves out a module that comes a second time.
        for name, child in module._modules.items():
            if child is not None:
                yield from _leaves(f"{path}.{name}", child)
    else:
        yield path, module


def called_network(root: nn.Module, requirer: str, example: Example | None) -> nn.Module:
    """Return the module whose call is the call of the network."""

    def call_of(module: nn.Module, name: str) -> Call | None:
        with suppress(Exception):
            return None if example is None else example(module, name)
        return None

    children = dict(_that_can_be_called(root, ""))
    # `self.features` and `self.net = nn.Sequential(self.features, ...)` are one network: the outer one.
    inner = {id(part) for child in children.values() for part in child.modules() if part is not child}
    outer = {name: child for name, child in children.items() if id(child) not in inner}
    own_forward = _overrides_forward(root)
    # Steps may call the one child by itself, even if the root's forward does too.
    alone = not (own_forward and any(p is not None for p in root._parameters.values()))
    if len(outer) == 1 and alone:
        return next(iter(outer.values()))
    call = call_of(root, "") if own_forward else None
    if call is not None:
        used = _called_by(root, call, outer.values())
        return used[0] if len(used) == 1 and alone else root
    trained = {name: child for name, child in outer.items() if any(p.requires_grad for p in child.parameters())}
    for kind in (
        # Of several, the others come after the first, and are trained by the last stage.
        [child for name, child in trained.items() if call_of(child, name) is not None][:1],
        [root] if own_forward else [],
        [child for child in outer.values() if isinstance(child, nn.Sequential)],
        list(trained.values()),
    ):
        if len(kind) == 1:
            return kind[0]
    shown = ", ".join(f"{name}: {type(child).__name__}" for name, child in root.named_children())
    some = ", ".join(map(repr, outer)) if outer else "none"
    raise TypeError(
        f"{requirer} cannot tell which part of {type(root).__name__} is the network to be cut: it has no `forward` of "
        f"its own, and the children with parameters are {some} (all children: {shown or 'none'}). Call the network "
        "through `forward`, or return its layers, in the order of the call, from `configure_stages()`."
    )


def _that_can_be_called(root: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children with parameters and their names; for a list or a dictionary of modules, what it holds."""
    for name, child in root.named_children():
        if _has_parameters(child):
            if has_forward(child):
                yield f"{prefix}{name}", child
            else:
                yield from _that_can_be_called(child, f"{prefix}{name}.")


def _called_by(root: nn.Module, call: Call, children: Iterable[nn.Module]) -> list[nn.Module]:
    """Return which children the root's own forward calls; if it fails, all of them."""
    found: dict[nn.Module, None] = {}

    def note(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found[child] = None
        with calls_left(child):
            return child(*args, **kwargs)

    children = list(children)
    handlers = {child: partial(note, child) for child in children}
    with trial(root.modules(), gpus_of([root], ())), torch.no_grad(), calls_taken(handlers), suppress(Exception):
        root.forward(*call[0], **call[1])
        return list(found)
    return children


def _overrides_forward(root: nn.Module) -> bool:
    """Whether the user wrote the root's ``forward``: neither torch's nor Lightning's, which can only raise."""
    return not type(root).forward.__module__.startswith(("torch.", "lightning.", "pytorch_lightning."))


def _entries(layers: Sequence[nn.Module], names: dict[int, list[str]]) -> list[nn.Module]:
    """Return the listed modules, after checking that they are modules."""
    if isinstance(layers, nn.Sequential) and (id(layers) in names or not _can_be_flattened(layers)):
        return [layers]
    if isinstance(layers, str) or not isinstance(layers, Sequence | nn.Sequential | nn.ModuleList):
        raise TypeError(
            f"configure_stages() returned a {type(layers).__name__}: return the layers, in the order of the call, as a "
            "list of modules, an nn.Sequential or an nn.ModuleList."
        )
    entries = list(layers)
    for index, entry in enumerate(entries):
        if not isinstance(entry, nn.Module):
            raise TypeError(
                f"configure_stages() returned a {type(entry).__name__} at index {index}: every layer must be an "
                "nn.Module; wrap a function in a small module with that `forward`."
            )
    return entries


def _items(entries: Sequence[nn.Module], names: dict[int, list[str]]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the listed modules with their place in the list, looking into containers made only for the list."""

    def opened(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, nn.ModuleList) or id(module) not in names and _can_be_flattened(module):
            for name, child in module._modules.items():
                if child is not None:
                    yield from opened(f"{path}.{name}", child)
        else:
            yield path, module

    for index, entry in enumerate(entries):
        yield from opened(f"layers[{index}]", entry)


def _target(root: nn.Module, items: Sequence[nn.Module], names: dict[int, list[str]]) -> nn.Module:
    """Return the innermost module of ``root`` with an own ``forward`` that holds all the listed modules."""
    if len(items) == 1 and id(items[0]) in names and _calls_its_children(items[0]):
        return items[0]
    anchors = {id(anchor) for item in items for anchor in _registered(item, names)}
    if not anchors:
        return root
    # A listed module is only a part of the network, so its call cannot be the network's.
    holders = [
        module
        for module in root.modules()
        if id(module) not in anchors and has_forward(module) and anchors <= {id(part) for part in module.modules()}
    ]
    return min(holders, key=lambda module: sum(1 for _ in module.modules()), default=root)


def _registered(module: nn.Module, names: dict[int, list[str]]) -> Iterator[nn.Module]:
    """Yield ``module`` where the root has it, else those of its descendants that the root has."""
    if id(module) in names:
        yield module
    else:
        for child in module.children():
            yield from _registered(child, names)


def _labelled(found: Sequence[tuple[str, nn.Module]], names: dict[int, list[str]]) -> list[tuple[str, nn.Module]]:
    """Give each layer its first qualified name that is still free, else leave it its place in the list."""
    used: set[str] = set()
    labelled = []
    for path, layer in found:
        label = next((name for name in names.get(id(layer), ()) if name not in used), path)
        used.add(label)
        labelled.append((label, layer))
    return labelled


def _check_listed(root: nn.Module, found: Sequence[tuple[str, nn.Module]]) -> None:
    if not found:
        raise ValueError(
            "configure_stages() returned 0 layers: return the layers in the order of the call, or leave the method out."
        )
    owned = {id(parameter) for parameter in root.parameters()}
    seen: dict[int, str] = {}
    for label, layer in found:
        kind = type(layer).__name__
        if layer is root:
            raise ValueError(
                f"configure_stages() returned the {kind} itself as a layer: return the layers that it consists of."
            )
        if not has_forward(layer):
            raise TypeError(
                f"The layer {label!r} from configure_stages() is a {kind}, which has no `forward`: return the modules "
                "in it, in the order of the call."
            )
        if any(id(parameter) not in owned for parameter in layer.parameters()):
            raise ValueError(
                f"The layer {label!r} ({kind}) from configure_stages() has parameters that {type(root).__name__} does "
                "not have, so no optimizer and no checkpoint would see them: assign it to an attribute in __init__."
            )
        if id(layer) in seen and _has_parameters(layer):
            raise ValueError(
                f"configure_stages() returned the layer {seen[id(layer)]!r} ({kind}) twice: a layer with parameters "
                "that is used twice is tied to itself. Return a module of its own for each use, or put the two uses "
                "and all between them into one module."
            )
        seen.setdefault(id(layer), label)


def _check_covered(target: nn.Module, target_name: str, found: Sequence[tuple[str, nn.Module]]) -> None:
    covered = {id(parameter) for _, layer in found for parameter in layer.parameters()}
    left = [f"{target_name}.{name}" for name, p in target.named_parameters() if id(p) not in covered]
    if left:
        raise ValueError(
            f"No layer of the network {target_name!r} ({type(target).__name__}) holds {_some(left)}: every "
            "parameter of the network must belong to a layer. Return the layers that hold them from "
            "`configure_stages()` too, or move them out of the network."
        )


def _check_initialized(found: Sequence[tuple[str, nn.Module]]) -> None:
    parts = ((f"{label}.{path}".strip("."), part) for label, layer in found for path, part in layer.named_modules())
    for name, part in parts:
        if any(is_lazy(parameter) for parameter in part.parameters(recurse=False)):
            raise ValueError(
                f"The layer {name!r} ({type(part).__name__}) has parameters that are not initialized yet: run the "
                "network once on a sample batch before training, or use the layer that is not lazy."
            )


def _some(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
