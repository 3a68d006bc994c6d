"""A network as an ordered list of layers, and the modules that run a part of it.

However the layers were found, :class:`Layers` is all that the rest of the package knows of them. Here are the protocol
and its simplest form, layers that are called in turn; the other is in :mod:`~lightning_ddg.network.replay`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn

from lightning_ddg.core.delay_line import run_in_turn
from lightning_ddg.core.rng import Batch

#: Arguments and keyword arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Layers(Protocol):
    """The layers of a network, in order.

    Attributes:
        names: A label for each layer, relative to the root module; it is what a user writes as a split point.
        evaluates: Whether segments can run in evaluation too; else only the layers one by one.
    """

    names: list[str]

    @property
    def evaluates(self) -> bool: ...

    def __len__(self) -> int:
        """How many layers there are."""
        ...

    def segment(self, start: int, stop: int) -> nn.Module:
        """Return the module that runs the layers ``start`` to ``stop - 1``.

        The first takes the network's arguments, every later one what the one before it returned. The layers are the
        user's own modules, not copies, under their own names: parameter ``net.0.weight`` of the root module is
        parameter ``net.0.weight`` of the segment too.

        Raises:
            ValueError: The two positions do not enclose a layer.
        """
        ...

    def modules(self, start: int, stop: int) -> list[nn.Module]:
        """Return the user's modules that are called in the layers ``start`` to ``stop - 1``."""
        ...

    def owners(self, starts: Sequence[int]) -> dict[nn.Module, int]:
        """Return the stage of each module that lies in one, where stages ``2..K`` begin at these positions."""
        ...

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network uncut and without its hooks, and return of its output what its stages can return."""
        ...

    def at_once(
        self, segments: Sequence[nn.Module], batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the network uncut, with the random draws of the stages that it is cut into."""
        ...

    def release(self) -> None:
        """Leave the network's modules as they were before :meth:`at_once`: no backward of it will follow."""
        ...

    def watched(self, begins: Callable[[int, Call], None], *args: Any, **kwargs: Any) -> Any:
        """Run the network uncut; call ``begins`` with a layer's position and arguments when one begins.

        A layer that begins again before the next one does is told of once.
        """
        ...


class Segment(nn.Module):
    """Consecutive layers of a network, (label, module) each, as one module; registered under their labels."""

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
    """Layers, (label, module) each, that are called in turn, each with what the one before it returned.

    ``forward`` is what the network itself does in a call, if it has code of its own.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], forward: Callable[..., Any] | None = None) -> None:
        if not layers:
            raise ValueError("A chain of 0 layers cannot be cut: give it at least one layer.")
        self.names = [name for name, _ in layers]
        self.evaluates = True
        self.layers = [layer for _, layer in layers]
        self._forward = forward
        repeated = next((name for i, name in enumerate(self.names) if name in self.names[:i]), None)
        if repeated is not None:
            raise ValueError(f"Two layers are labelled {repeated!r}: a split point needs labels that differ.")

    def __len__(self) -> int:
        return len(self.layers)

    def segment(self, start: int, stop: int) -> nn.Module:
        """Return a :class:`Segment`; see :meth:`Layers.segment`."""
        check_range(self, start, stop)
        return Segment(list(zip(self.names, self.layers, strict=True))[start:stop])

    def modules(self, start: int, stop: int) -> list[nn.Module]:
        """Return some of the layers."""
        return self.layers[start:stop]

    def owners(self, starts: Sequence[int]) -> dict[nn.Module, int]:
        """Return the stage of each layer; of one that comes twice, the later."""
        return {layer: bisect_right(starts, position) + 1 for position, layer in enumerate(self.layers)}

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network's own code; without such code, the layers in turn."""
        return (self._forward or self.segment(0, len(self)))(*args, **kwargs)

    def at_once(
        self, segments: Sequence[nn.Module], batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the stages in turn; see :meth:`Layers.at_once`."""
        return run_in_turn(segments, batch, args, kwargs)

    def release(self) -> None:
        """Do nothing: the modules are as they were."""

    def watched(self, begins: Callable[[int, Call], None], *args: Any, **kwargs: Any) -> Any:
        """Run the layers in turn; see :meth:`Layers.watched`."""
        value: Any = None
        for position, layer in enumerate(self.layers):
            call = (args, kwargs) if position == 0 else ((value,), {})
            begins(position, call)
            value = layer(*call[0], **call[1])
        return value


def check_range(layers: Layers, start: int, stop: int) -> None:
    """Raise a ValueError if two positions do not enclose a layer."""
    if not 0 <= start < stop <= len(layers):
        raise ValueError(
            f"No segment from position {start} to {stop}: the chain has {len(layers)} layers, "
            f"so 0 <= start < stop <= {len(layers)} must hold."
        )


def namespace(root: nn.Module, path: Sequence[str]) -> nn.Module:
    """Return the submodule of ``root`` at ``path``, adding empty modules on the way."""
    for name in path:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root
