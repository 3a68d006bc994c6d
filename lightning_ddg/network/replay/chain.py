"""A network as layers of which each stage runs the network's own code."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import nn

from lightning_ddg.core.rng import Batch
from lightning_ddg.core.tensors import parameters_replaced
from lightning_ddg.network.layers import Call, check_range, namespace
from lightning_ddg.network.replay.analysis import analyse, without_call
from lightning_ddg.network.replay.code import Code, forward_of
from lightning_ddg.network.replay.module_calls import (
    calls_left,
    calls_taken,
    check_call,
    configs_of,
    plain_calls,
)
from lightning_ddg.network.replay.part import Part
from lightning_ddg.network.replay.roles import Role, Watch
from lightning_ddg.network.replay.turns import Turns


class ReplayedChain:
    """The layers of a network whose forward every stage runs; see :class:`~lightning_ddg.network.layers.Layers`.

    A layer is a module with parameters that is run as a whole. The code around the layers runs in every stage: on real
    tensors where they come from the network's inputs, such as masks and positions, or were received; on tensors without
    values where they come from layers of other stages.

    Args:
        target: The network.
        target_name: Its name relative to the root module; ``""`` for the root itself.
        call: Arguments and keyword arguments of an example call, with their values, on the network's device. It is run
            once in training and once in evaluation, to see in which order the layers are called and between which of
            them a cut is possible; the network is left as it was. Without it, the layers are in the order in which the
            network's modules hold them, and what is impossible is said when it is met.
        points: Modules that are layers though they have no parameters.
        code: What is run, if it is not the network's forward.
    """

    def __init__(
        self,
        target: nn.Module,
        target_name: str,
        call: Call | None = None,
        points: Collection[nn.Module] = (),
        code: Code | None = None,
    ) -> None:
        self._target = target
        self._prefix = f"{target_name}." if target_name else ""
        self._code = code or forward_of(target)
        if call is not None:
            check_call(target, configs_of(target), call[1])
        known = without_call(target, self._code, points) if call is None else None
        self._found = known or analyse(target, self._code, call or ((), {}), points)
        if not self._found.layers:
            raise ValueError(
                f"The network {type(target).__name__} calls no module with parameters: there is nothing to cut. Return "
                "its layers from `configure_stages()`."
            )
        self._parts: dict[tuple[int, int], Part] = {}
        self._turns = Turns()
        # A module that cannot begin a stage belongs to the layer before.
        modules = len(self._found.layers)
        self._bounds = [*(place for place in range(modules) if place not in self._found.forbidden), modules]
        self.names = [f"{self._prefix}{self._found.layers[place][1]}" for place in self._bounds[:-1]]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def keeps(self) -> bool:
        """Whether the code leaves something in attributes for its next run, so that each stage needs its own."""
        return self._found.keeps

    @property
    def evaluates(self) -> bool:
        """Whether stages can run in evaluation too; else only the layers one by one."""
        return self._found.evaluates

    @property
    def reasons(self) -> list[str]:
        """Why the network cannot be cut where it cannot."""
        return list(dict.fromkeys(self._found.forbidden.values()))

    def segment(self, start: int, stop: int) -> ReplayedSegment:
        """Return a :class:`ReplayedSegment`; see :meth:`Layers.segment`."""
        check_range(self, start, stop)
        bounds = self._bounds[start], self._bounds[stop]
        if bounds not in self._parts:
            self._parts[bounds] = Part(self._target, self._code, self._found, *bounds)
        return ReplayedSegment(self._parts[bounds], self._prefix)

    def modules(self, start: int, stop: int) -> list[nn.Module]:
        """Return the user's modules that are called in the layers ``start`` to ``stop - 1``."""
        return [layer for layer, _ in self._found.layers[self._bounds[start] : self._bounds[stop]]]

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """Run all the layers as one part, which leaves out what no stage could return, such as caches of all layers."""
        return self.segment(0, len(self))(*args, **kwargs)

    def at_once(
        self, segments: Sequence[nn.Module], batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the network's own code; see :meth:`Layers.at_once`."""
        called = stages_called(segments)
        with plain_calls(configs_of(self._target)), self._turns.taken(called, batch):
            return self._code.whole(*args, **kwargs)

    def release(self) -> None:
        """Leave the calls of modules as they were; see :meth:`Layers.release`."""
        self._turns.release()

    def owners(self, starts: Sequence[int]) -> dict[nn.Module, int]:
        """Return the stage of each layer, and of each block that lies in one stage, where stages ``2..K`` begin."""
        bounds = [self._bounds[start] for start in starts]
        spans = {layer: (place, place) for place, (layer, _) in enumerate(self._found.layers)} | self._found.blocks
        stages = {
            module: (bisect_right(bounds, first), bisect_right(bounds, last)) for module, (first, last) in spans.items()
        }
        return {module: first + 1 for module, (first, last) in stages.items() if first == last}

    def watched(self, begins: Callable[[int, Call], None], *args: Any, **kwargs: Any) -> Any:
        """Run the network's own code; see :meth:`Layers.watched`."""
        last = -1

        def call(position: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal last
            if position != last:
                last = position
                begins(position, (args, kwargs))
            with calls_left(module):
                return nn.Module.__call__(module, *args, **kwargs)

        handlers = {
            module: partial(call, position, module)
            for position in range(len(self))
            for module in self.modules(position, position + 1)
        }
        with plain_calls(configs_of(self._target)), calls_taken(handlers):
            return self._code.whole(*args, **kwargs)


def stages_called(segments: Sequence[nn.Module]) -> dict[nn.Module, int]:
    """Return the modules that the code between the layers calls in replayed segments, with their stages."""
    numbered = enumerate(segments, start=1)
    return {module: stage for stage, segment in numbered for module in cast(ReplayedSegment, segment).called}


class ReplayedSegment(nn.Module):
    """Consecutive layers of a replayed network as one module, with the user's modules under their own names.

    The prefix stands before a name relative to the network in a name relative to the root module.

    Attributes:
        called: The segment's own modules that the network's code, or a block that stages share, calls.
    """

    def __init__(self, part: Part, prefix: str) -> None:
        super().__init__()
        self._part, self._prefix = part, prefix
        # A copy of the segment has copies of them here too.
        self._own = list(part.own)
        self.called = [module for module, role in part.visible if role is Role.OWN]
        for module in part.own:
            *path, leaf = f"{prefix}{part.names[module]}".split(".")
            namespace(self, path).add_module(leaf, module)
        for path_name, module, name in part.loose:
            space = self._space(path_name)
            if not isinstance(space._parameters, _Shared):
                space._parameters = _Shared(module._parameters)
            space.register_parameter(name, module._parameters[name])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers on the network's arguments, or on what the segment before this one returned."""
        # Those of this segment, which may be a copy, in the place of the user's.
        own = [
            ((module._parameters, name), self._space(path)._parameters[name]) for path, module, name in self._part.loose
        ]
        with parameters_replaced(own):
            return self._part.run(self._own, args, kwargs)

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Tell of calls inside; see :data:`~lightning_ddg.network.replay.roles.Watch`."""
        self._part.watch = watch
        try:
            yield
        finally:
            self._part.watch = None

    def _space(self, path: str) -> nn.Module:
        """The module here that has the name of one of the network's."""
        names = f"{self._prefix}{path}".strip(".")
        return namespace(self, names.split(".") if names else [])


class _Shared(dict[str, Any]):
    """Parameters of which another module's table gets every change: whoever stashes weights here changes them there."""

    def __init__(self, other: dict[str, Any]) -> None:
        super().__init__()
        self._other = other

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._other[name] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {name: copy.deepcopy(value, memo) for name, value in self.items()}
