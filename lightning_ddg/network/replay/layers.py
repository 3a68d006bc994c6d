"""Which modules of a network are run as a whole: its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

#: Where a module keeps a parameter, and its name there.
Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class Layer:
    """A module that is run as a whole, by its name in the network; ``entry`` of a list, if that was looked into."""

    name: str
    module: nn.Module
    entry: nn.Module | None = None


def find_layers(target: nn.Module, whole: Collection[nn.Module] = ()) -> Iterator[Layer]:
    """Yield the layers of a network, in the order in which its modules hold them.

    A module that holds, at any depth, a list of two or more modules is looked into, and so is one that has no forward
    of its own; every other one with parameters or saved buffers is a layer. Entries of a list are layers, unless they
    hold a list of blocks that are all alike themselves, as the resolutions of a vision network do. Modules in ``whole``
    are not looked into.
    """
    seen: set[nn.Module] = set()

    def below(prefix: str, module: nn.Module, entry: nn.Module | None) -> Iterator[Layer]:
        for name, child in module.named_children():
            if child in seen or not child.state_dict():
                continue
            seen.add(child)
            inside = child if isinstance(module, nn.ModuleList | nn.Sequential) else entry
            has_forward = type(child).forward is not nn.Module.forward or "forward" in vars(child)
            if child not in whole and (not has_forward or _holds_list(child, blocks=inside is not None)):
                yield from below(f"{prefix}{name}.", child, inside)
            else:
                yield Layer(f"{prefix}{name}", child, entry)

    yield from below("", target, None)


def loose_parameters(target: nn.Module, layers: Sequence[Layer]) -> list[Place]:
    """Return where a network keeps parameters that belong to no layer."""
    inside = {part for layer in layers for part in layer.module.modules()}
    outside = [module for module in target.modules() if module not in inside]
    return [(module, name) for module in outside for name, value in module._parameters.items() if value is not None]


def _holds_list(module: nn.Module, *, blocks: bool) -> bool:
    for part in module.modules():
        if isinstance(part, nn.ModuleList | nn.Sequential):
            entries = [child for child in part.children() if next(child.parameters(), None) is not None]
            alike = len({type(child) for child in entries}) == 1 and all(any(child.children()) for child in entries)
            if len(entries) >= 2 and (alike or not blocks):
                return True
    return False
