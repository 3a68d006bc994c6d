"""What each cut of an observed call needs, or why it cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from lightning_ddg.network.replay.crossing import ARGUMENT, OUTPUT, RESULT, Path, Sight, around
from lightning_ddg.network.replay.dataflow import NEVER, DataFlow, LayerCall, Value
from lightning_ddg.network.replay.layers import Place
from lightning_ddg.network.replay.shapes import StandIn


@dataclass
class Needs:
    """What the stages after a cut need, or the reason why they cannot have it."""

    sights: set[Sight] = field(default_factory=set)
    aliases: dict[Sight, Sight] = field(default_factory=dict)
    open: set[nn.Module] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)
    draws: bool = False
    reason: str | None = None


class Cuts:
    """Says of one observed call what each cut needs."""

    def __init__(
        self,
        flow: DataFlow,
        position: dict[nn.Module, int],
        loose: dict[Place, int],
        blocks: dict[nn.Module, tuple[int, int]],
        modules: list[nn.Module],
    ) -> None:
        self._flow, self._modules, self._blocks = flow, modules, blocks
        self._loose = loose
        # What training does not call is in the last stage.
        self._position = {call.layer: position.get(call.layer, len(position) - 1) for call in flow.calls}
        self._owner = {part: place for layer, place in self._position.items() for part in layer.modules()}
        self._lowest: dict[int, int] = {}
        self._shaped: dict[int, bool] = {}
        self._repeated = {modules[number] for call in flow.calls for number, before in call.path if before}
        self._span: dict[int, tuple[int, int]] = {}
        for call in flow.calls:
            for value in call.arguments:
                self._lower(value, self._position[call.layer])

    def needs(self, cut: int) -> Needs:
        """Return what stages after a cut need."""
        found = Needs()
        early = [call for call in self._flow.calls if self._position[call.layer] < cut]
        late = [call for call in self._flow.calls if self._position[call.layer] >= cut]
        last = max((call.time for call in early), default=0)
        # The stage before ends with this call, whose arguments it still sees.
        end = min((call.time for call in late if call.time > last), default=self._flow.end)
        heads = [(value, call.time, self._name(call)) for call in late for value in call.arguments]
        heads += [(value, time, f"its own code ({what})") for time, _, value, what in self._flow.reads]
        heads += [(value, self._flow.end, "its output") for value in self._flow.output]
        known: dict[int, bool] = {}
        for value, time, user in heads:
            reason = self._need(value, time, cut, end, found, known)
            if reason is not None:
                found.reason = f"{reason}, and {user} needs that later"
                return found
        again = {call.checkpoint for call in early} & {call.checkpoint for call in late} - {None}
        if again:
            found.reason = "a checkpoint around both sides runs them again"
        else:
            found.reason = self._too_early(cut, end, early) or self._shapeless(cut, last)
        return found

    def _shapeless(self, cut: int, last: int) -> str | None:
        """Say for which call of a later module, before an earlier one's, not even the output's shape would be known."""
        for call in self._flow.stand_ins:
            begins = self._position.get(call.module, self._blocks.get(call.module, (0, 0))[0])
            if call.time < last and begins >= cut and not self._has_shapes(call):
                kind = type(call.module).__name__
                return f"a {kind} of a later stage is called before, and the shape of its output depends on values"
        return None

    def _has_shapes(self, call: StandIn) -> bool:
        if id(call) not in self._shaped:
            try:
                call.shapes()
            except Exception:  # noqa: BLE001 - whatever the module does not bear
                self._shaped[id(call)] = False
            else:
                self._shaped[id(call)] = True
        return self._shaped[id(call)]

    def _too_early(self, cut: int, end: int, early: list[LayerCall]) -> str | None:
        """Say why the stages before a cut cannot do without those after it."""
        for call in early:
            for value in call.arguments:
                if self._sources(value)[1] >= cut:
                    return f"{self._name(call)} is called with what {value} has a part in, which is in a later stage"
        for time, _, value, what in self._flow.reads:
            if time < end and self._sources(value)[1] >= cut:
                return f"its own code reads the values of {value} ({what}) before"
        if any(time < end for time in self._flow.draws):
            return "its own code draws random numbers from Python or NumPy before, in each stage others"
        return None

    def _need(self, value: Value, time: int, cut: int, end: int, found: Needs, known: dict[int, bool]) -> str | None:
        """Note what has to be sent so that a value is known at a time; return why it cannot be."""
        if id(value) in known:
            return None
        first, last = self._sources(value)
        if value.input is not None:
            found.inputs.add(value.input)
        elif value.parameter is not None:
            if first < cut:
                return f"{value} is used on both sides"
        elif value.layer is not None and first >= cut:
            pass
        elif first < NEVER and last < cut or value.drawn or value.passed or value.layer is not None:
            sight = self._sight(value, time, cut, end)
            if sight is not None:
                found.sights.add(sight)
                found.draws |= value.drawn and first == NEVER
                outputs = (other for _, other, _ in value.sights if other[1] == OUTPUT and other != sight)
                found.aliases.update((other, sight) for other in outputs)
                found.open.update(self._inside_done(around(sight), cut))
            elif value.layer is not None:
                return f"{value} is not seen after its call, or is written into"
            elif value.drawn and self._lowest.get(id(value), NEVER) < cut:
                return "random numbers are used on both sides"
            else:
                reason = self._operands(value, cut, end, found, known)
                if reason is not None:
                    return reason
        else:
            reason = self._operands(value, cut, end, found, known)
            if reason is not None:
                return reason
        known[id(value)] = True
        return None

    def _operands(self, value: Value, cut: int, end: int, found: Needs, known: dict[int, bool]) -> str | None:
        found.open.update(self._inside_done(value.path, cut))
        for operand in value.operands:
            reason = self._need(operand, value.time, cut, end, found, known)
            if reason is not None:
                return reason
        return None

    def _sight(self, value: Value, time: int, cut: int, end: int) -> Sight | None:
        """Choose where a value is seen in time, before it is written into; rather not inside what is over by then.

        Among arguments, something stands for it, through which an autograd function sends no gradient; and what every
        stage draws for itself is not exchanged there.
        """
        usable = [
            (
                (value.applied or value.drawn) and sight[1] == ARGUMENT,
                bool(self._inside_done(around(sight), cut)),
                sight[1] >= RESULT,
                when,
                sight,
            )
            for when, sight, blind in value.sights
            if when <= min(time, end)
            and value.changed > end
            and not blind
            and self._begun(around(sight), cut)
            # What such a block returns, called more than once, the stage after finds by its code.
            and not (sight[1] == OUTPUT and self._is_open(sight, cut))
        ]
        best = min(usable)[-1] if usable else None
        return None if value.drawn and best is not None and best[1] == ARGUMENT else best

    def _inside_done(self, path: Path, cut: int) -> list[nn.Module]:
        """Which of the calls in a path are of modules that need not be looked into after a cut."""
        modules = [self._modules[number] for number, _ in path]
        return [module for module in modules if module in self._blocks and self._blocks[module][1] < cut]

    def _begun(self, path: Path, cut: int) -> bool:
        """Whether the calls in a path begin before a cut: the stage before it makes no others."""
        modules = [self._modules[number] for number, _ in path]
        return all(self._blocks[module][0] < cut for module in modules if module in self._blocks)

    def _is_open(self, sight: Sight, cut: int) -> bool:
        """Whether a sight is of a block that is called more than once, before a cut and after it."""
        module = self._modules[sight[0][-1][0]]
        return module in self._repeated and module in self._blocks and self._blocks[module][1] >= cut

    def _name(self, call: LayerCall) -> str:
        return f"a {type(call.layer).__name__}"

    def _lower(self, value: Value, position: int) -> None:
        """Note that a layer's arguments depend on a value, back to the outputs of layers."""
        queue = [value]
        while queue:
            one = queue.pop()
            if self._lowest.get(id(one), NEVER) <= position:
                continue
            self._lowest[id(one)] = position
            if one.layer is None:
                queue.extend(one.operands)

    def _sources(self, value: Value) -> tuple[int, int]:
        """The first and the last layer that has a part in a value; the later of them none, if none has."""
        known = self._span.get(id(value))
        if known is not None:
            return known
        stack = [value]
        while stack:
            one = stack[-1]
            if id(one) in self._span:
                stack.pop()
                continue
            if one.layer is not None:
                place = self._position.get(one.layer, NEVER - 1)
                self._span[id(one)] = (place, place)
            elif one.parameter is not None:
                module = one.parameter[0]
                place = self._loose.get(one.parameter, self._owner.get(module, 0))
                self._span[id(one)] = (place, place)
            else:
                missing = [operand for operand in one.operands if id(operand) not in self._span]
                if missing:
                    stack.extend(missing)
                    continue
                spans = [self._span[id(operand)] for operand in one.operands]
                self._span[id(one)] = (
                    min((first for first, _ in spans), default=NEVER),
                    max((last for _, last in spans), default=-1),
                )
            stack.pop()
        return self._span[id(value)]
