"""A traced network as layers: its graph is recorded, and cut just before calls of modules that have parameters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_ddg.network.layers import Call, check_range
from lightning_ddg.network.trace.recording import read_only
from lightning_ddg.network.trace.recordings import Recordings
from lightning_ddg.network.trace.segment import TracedSegment


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

    Raises:
        Untraceable: The forward cannot be traced.
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
        """Return a :class:`~lightning_ddg.network.trace.segment.TracedSegment`; see :meth:`Layers.segment`."""
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
