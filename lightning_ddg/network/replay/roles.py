"""What the modules of a network are to one stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from torch import nn

from lightning_ddg.network.replay.absent import Absent
from lightning_ddg.network.replay.analysis import Analysis
from lightning_ddg.network.replay.crossing import Path
from lightning_ddg.network.replay.shapes import Shapes


class Role(Enum):
    """What a call of a module means in a stage."""

    EARLIER = "earlier"
    OWN = "own"
    LATER = "later"
    OPEN = "open"


#: The name of a module, its call, whether it is the stage's own, and the arguments.
Watch = Callable[[str, Path, bool, Any], None]


class Roles:
    """The modules of a network in the stage of the layers ``start`` to ``stop - 1``.

    Attributes:
        roles: Of each module whose calls are taken over, what they mean.
        own: The stage's own modules that are called as a whole.
        visible: Those modules whose calls the stage meets, with their roles.
        loose: The parameters of the stage outside of its modules: the name of their module relative to the network, the
            module, and their name in it.
        closed: The blocks that end in this stage: the next one does not look into them.
        expected: How many calls of its own modules the stage meets, in evaluation and in training.
        absent: Makes what stands for values of other stages.
        shapes: Says what modules of later stages return.
        watch: Is told of the calls of own and earlier modules.
    """

    def __init__(self, target: nn.Module, found: Analysis, start: int, stop: int) -> None:
        self.found = found
        self.start, self.stop = start, stop
        self.ends_network = stop == len(found.layers)
        self.modules = list(target.modules())
        self.names = {module: name for name, module in target.named_modules()}
        self.numbers = {module: number for number, module in enumerate(self.modules)}
        self.first = found.layers[start][0]
        self.roles = self._all_roles()
        self.own = self._outermost(Role.OWN)
        self.visible = self._visible()
        held = {part for module in self.own for part in module.modules()}
        self.loose = [
            (self.names[m], m, name)
            for (m, name), position in found.loose.items()
            if start <= position < stop and m not in held
        ]
        ended = [block for block, (_, last) in found.blocks.items() if last < stop < len(found.layers)]
        self.closed = frozenset(block for block in ended if self.is_closed(block, stop))
        self.expected = [self._visible_calls(calls) for calls in found.calls]
        self.absent = Absent(found.code, self.names[self.first])
        self.shapes = Shapes()
        self.target = target
        self.watch: Watch | None = None

    def _all_roles(self) -> dict[nn.Module, Role]:
        found = self.found
        spans = {layer: (place, place) for place, (layer, _) in enumerate(found.layers)} | found.blocks
        roles = {}
        for module, (first, last) in spans.items():
            if last < self.start and self.is_closed(module, self.start):
                roles[module] = Role.EARLIER
            elif first >= self.start and (self.ends_network or last < self.stop and self.is_closed(module, self.stop)):
                roles[module] = Role.OWN
            elif first >= self.stop:
                roles[module] = Role.LATER
            else:
                roles[module] = Role.OPEN
        return roles

    def is_closed(self, module: nn.Module, cut: int) -> bool:
        """Return whether no stage after a cut has to look into a module."""
        return not any(part in self.found.open[cut] for part in module.modules())

    def _outermost(self, role: Role) -> list[nn.Module]:
        """The modules of a role that are in no other one of it."""
        have = [module for module, one in self.roles.items() if one is role]
        inner = {part for module in have for part in module.modules() if part is not module}
        return [module for module in have if module not in inner]

    def _visible(self) -> list[tuple[nn.Module, Role]]:
        """The modules that are called from the network's own code, or from a block whose code runs."""
        hidden = {
            part
            for module, role in self.roles.items()
            if role is not Role.OPEN
            for part in module.modules()
            if part is not module
        }
        for path in (path for calls in self.found.calls for path in calls):
            for module in (self.modules[number] for number, _ in path):
                hidden.discard(module)
                if self.roles.get(module) is not Role.OPEN:
                    break
        return [(module, role) for module, role in self.roles.items() if module not in hidden]

    def _visible_calls(self, calls: Iterable[Path]) -> int:
        """How many calls of own modules there are that no other own module makes."""
        seen = set()
        for path in calls:
            roles = [self.roles.get(self.modules[number]) for number, _ in path]
            if Role.OWN in roles:
                seen.add(path[: roles.index(Role.OWN) + 1])
        return len(seen)
