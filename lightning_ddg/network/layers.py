"""A network as an ordered list of layers, and the modules that run a part of it.

What a chain may consist of changes here; how its layers are found, costed and cut does not: those parts use only
``names``, ``len`` and ``segment``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn


class Layers(Protocol):
    """The layers of a network, in order, however they were found: all that is needed to cost them and to cut them."""

    names: list[str]

    def __len__(self) -> int:
        """How many layers there are."""
        ...

    def segment(self, start: int, stop: int) -> nn.Module:
        """Return the module that runs the layers ``start`` to ``stop - 1``."""
        ...

    def modules(self, start: int, stop: int) -> list[nn.Module]:
        """Return the user's modules that are called in the layers ``start`` to ``stop - 1``."""
        ...


class Segment(nn.Module):
    """Consecutive layers of a network as one module.

    The layers are the original modules, not copies, and they are registered under their labels: parameter
    ``net.0.weight`` of the root module is parameter ``net.0.weight`` of the segment too.

    Args:
        layers: (label, module) of each layer, in the order of the call.

    Raises:
        ValueError: ``layers`` is empty.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        if not layers:
            raise ValueError("A segment of 0 layers cannot be run: give it at least one layer.")
        self._in_order = [layer for _, layer in layers]
        labels = {label for label, _ in layers}
        for label, layer in layers:
            *path, leaf = label.split(".")
            # A layer inside another layer of the segment is registered with that one.
            if any(".".join(path[:depth]) in labels for depth in range(1, len(path) + 1)):
                continue
            namespace(self, path).add_module(leaf, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the first layer with the arguments, every later one with what the layer before it returned."""
        first, *rest = self._in_order
        value = first(*args, **kwargs)
        for layer in rest:
            value = layer(value)
        return value


class Chain:
    """An ordered list of layers that may be cut at any position between two of them.

    Args:
        layers: (label, module) of each layer, in the order of the call. A label is the layer's name relative to the
            root module; it is what a user writes as a split point.

    Raises:
        ValueError: There are no layers, or two have the same label.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]]) -> None:
        if not layers:
            raise ValueError("A chain of 0 layers cannot be cut: give it at least one layer.")
        self.names = [name for name, _ in layers]
        self.layers = [layer for _, layer in layers]
        repeated = next((name for i, name in enumerate(self.names) if name in self.names[:i]), None)
        if repeated is not None:
            raise ValueError(f"Two layers are labelled {repeated!r}: a split point needs labels that differ.")

    def __len__(self) -> int:
        return len(self.layers)

    def segment(self, start: int, stop: int) -> nn.Module:
        """Return the module that runs the layers ``start`` to ``stop - 1``.

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
        return Segment(list(zip(self.names, self.layers, strict=True))[start:stop])

    def modules(self, start: int, stop: int) -> list[nn.Module]:
        """Return the user's modules that are called in the layers ``start`` to ``stop - 1``."""
        return self.layers[start:stop]


def namespace(root: nn.Module, path: Sequence[str]) -> nn.Module:
    """Return the submodule of ``root`` at ``path``, adding empty modules on the way."""
    for name in path:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root
