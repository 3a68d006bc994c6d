"""Which modules of a network can be told apart: its layers, and the blocks that hold them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

#: Where a module keeps a parameter, and its name there.
Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class Tree:
    """The modules of a network that have weights or saved buffers and can be called.

    Attributes:
        layers: Those that are run as a whole, with their names, in the order in which the network's modules hold them.
        blocks: Those that hold layers, and whose own code is run where they belong to several stages.
    """

    layers: dict[nn.Module, str]
    blocks: dict[nn.Module, str]


def find_tree(target: nn.Module, points: Collection[nn.Module] = (), whole: Collection[nn.Module] = ()) -> Tree:
    """Return the layers and blocks of a network.

    A layer is a module with weights or saved buffers inside which there is no other such module that could be called,
    or one in ``points`` without any. Modules in ``whole``, scripted and compiled ones, and those with hooks for the
    backward, are not looked into.
    """
    layers: dict[nn.Module, str] = {}
    blocks: dict[nn.Module, str] = {}

    def below(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if is_metric(child):
                continue
            if child in layers or child in blocks:
                continue
            if not _has_state(child):
                if child in points:
                    layers[child] = path
                continue
            if child in whole or _opaque(child) or not _holds_layers(child):
                if has_forward(child):
                    layers[child] = path
                continue
            if has_forward(child):
                blocks[child] = path
            below(f"{path}.", child)

    below("", target)
    return Tree(layers, blocks)


def has_forward(module: nn.Module) -> bool:
    """Return whether a module can be called."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def loose_parameters(target: nn.Module, layers: Collection[nn.Module]) -> list[Place]:
    """Return where a network keeps parameters that belong to no layer."""
    inside = {part for layer in layers for part in layer.modules()}
    outside = [module for module in target.modules() if module not in inside]
    return [(module, name) for module in outside for name, value in module._parameters.items() if value is not None]


def inside(module: nn.Module, others: Collection[nn.Module]) -> Sequence[nn.Module]:
    """Return which of some modules are a module, or part of it."""
    return [part for part in module.modules() if part in others]


def is_metric(module: nn.Module) -> bool:
    """Return whether a module is a metric, which counts what it is given, in the process that logs it."""
    return any(kind.__module__.partition(".")[0] == "torchmetrics" for kind in type(module).__mro__)


def _has_state(module: nn.Module) -> bool:
    saved = (part._buffers.keys() - part._non_persistent_buffers_set for part in module.modules())
    return next(module.parameters(), None) is not None or any(saved)


def _holds_layers(module: nn.Module) -> bool:
    return any(part is not module and has_forward(part) and _has_state(part) for part in module.modules())


def _opaque(module: nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule)
    compiled = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
    # These are given the gradients of the module's input, which nobody has who runs only a part of it.
    watched = bool(module._backward_hooks) or bool(module._backward_pre_hooks)
    return scripted or compiled or watched
