"""A run of a network's own code in which only the modules of one stage are real.

Calls of earlier modules return tensors without values, except for those that were received. Calls of later ones do so
too, as long as a call of the stage's own is to come; then the run ends.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_ddg.core.pytree import flatten, map_tensors, tensors_of, unflatten
from lightning_ddg.core.rng import Generators
from lightning_ddg.core.tensors import Slot, parameters_replaced, spec_of
from lightning_ddg.network.layers import Call
from lightning_ddg.network.replay.absent import REMEDY, Absent, StageOver
from lightning_ddg.network.replay.analysis import Analysis, Crosses
from lightning_ddg.network.replay.crossing import (
    ARGUMENT,
    OUTPUT,
    RESULT,
    Crossing,
    Done,
    Path,
    Sight,
    arguments_of,
    form_of,
)
from lightning_ddg.network.replay.module_calls import calls_left, calls_taken, configs_of, plain_calls
from lightning_ddg.network.replay.shapes import Shapes
from lightning_ddg.network.replay.tracked import Tracked, followed, known, replaced


class Role(Enum):
    """What a call of a module means in a stage."""

    EARLIER = "earlier"
    OWN = "own"
    LATER = "later"
    OPEN = "open"


class Part:
    """The layers ``start`` to ``stop - 1`` of a network, as they are called by its forward.

    Attributes:
        roles: Of each module whose calls are taken over, what they mean.
        own: The stage's own modules that are called as a whole.
        loose: The parameters of the part outside of them: the name of their module relative to the network, the module,
            and their name in it.
    """

    def __init__(self, target: nn.Module, forward: Callable[..., Any], found: Analysis, start: int, stop: int) -> None:
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
        self.closed = frozenset(block for block in ended if self._closed(block, stop))
        self.expected = [self._visible_calls(calls) for calls in found.calls]
        self.absent = Absent(type(target).__name__, self.names[self.first])
        self.shapes = Shapes()
        self.target = target
        self._forward = forward
        self._configs = configs_of(target)
        self._stands: list[tuple[Slot, Tracked]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        # A copied segment has other weights, but runs the same code.
        return self

    def run(self, own: Sequence[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the part, calling the given modules in the place of the user's.

        The arguments are the network's, or a :class:`~lightning_ddg.network.replay.crossing.Crossing` that the stage
        before this one returned; so is what is returned.

        Raises:
            RuntimeError: The network's code needs something that no stage can know.
            ValueError: The call asks for what a part of the network cannot give.
        """
        given = None
        if self.start == 0:
            check_call(self.target, self._configs, kwargs)
            form, inputs = flatten((args, kwargs))
            device = _device_of(own, inputs)
        else:
            given = Crossing(*args[0])
            form, device = given.form, _device_of(own, [*given.values.values(), *given.inputs])
            inputs = [
                value if isinstance(value, Tensor) else self.absent.tensor(value, device, f"input {index}")
                for index, value in enumerate(given.inputs)
            ]
            args, kwargs = unflatten(form, inputs)
        run = _Run(self, self._counterparts(own), given, device, form)
        versions = [_version(tensor) for tensor in inputs]
        try:
            with (
                plain_calls(self._configs),
                parameters_replaced(self._absent_parameters(device)),
                calls_taken({module: partial(run.called, module, role) for module, role in self.visible}),
                run.hooks(),
                run.functions(),
            ):
                output = self._forward(*args, **kwargs)
        except StageOver as over:
            if over.absent is not self.absent:
                raise
        else:
            if self.ends_network:
                return run.output(output)
        if versions != [_version(tensor) for tensor in inputs]:
            raise self.absent.error(
                "changes one of its arguments in place, and every stage would do so again. Let it work on a copy"
            ) from None
        return run.crossing(inputs)

    def _counterparts(self, own: Sequence[nn.Module]) -> Mapping[nn.Module, nn.Module]:
        """Which module of a segment, that may be a copy, is called in the place of each own module of the user's."""
        pairs = dict(zip(self.own, own, strict=True))
        if all(mine is theirs for mine, theirs in pairs.items()):
            return _Same()
        for mine, theirs in list(pairs.items()):
            pairs.update(zip(mine.modules(), theirs.modules(), strict=True))
        return pairs

    def _all_roles(self) -> dict[nn.Module, Role]:
        found = self.found
        spans = {layer: (place, place) for place, (layer, _) in enumerate(found.layers)} | found.blocks
        roles = {}
        for module, (first, last) in spans.items():
            if last < self.start and self._closed(module, self.start):
                roles[module] = Role.EARLIER
            elif first >= self.start and (self.ends_network or last < self.stop and self._closed(module, self.stop)):
                roles[module] = Role.OWN
            elif first >= self.stop:
                roles[module] = Role.LATER
            else:
                roles[module] = Role.OPEN
        return roles

    def _closed(self, module: nn.Module, cut: int) -> bool:
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

    def _absent_parameters(self, device: torch.device) -> list[tuple[Slot, Tracked]]:
        """Other stages' parameters: what this process has of them are not their current values."""
        if not self._stands or self._stands[0][1].device != device:
            self._stands = [
                ((module._parameters, name), self.absent.tensor(spec_of(value), device, label, later))
                for module, name, label, later in self._foreign_parameters()
                if (value := module._parameters[name]) is not None
            ]
        return self._stands

    def _foreign_parameters(self) -> Iterable[tuple[nn.Module, str, str, bool]]:
        own = {part for module in self.own for part in module.modules()}
        places = {(module, name) for _, module, name in self.loose}
        owner = {part: at for at, (layer, _) in enumerate(self.found.layers) for part in layer.modules()}
        for path, module in self.target.named_modules():
            if module in own or isinstance(module, torch.jit.ScriptModule):
                continue
            for name in module._parameters:
                if (module, name) not in places:
                    at = owner.get(module, self.found.loose.get((module, name), len(self.found.layers)))
                    yield module, name, f"the parameter {f'{path}.{name}'.lstrip('.')!r}", at >= self.stop


class _Same(dict[nn.Module, nn.Module]):
    def __missing__(self, module: nn.Module) -> nn.Module:
        return module


class _Run:
    """One run of a part."""

    def __init__(
        self,
        part: Part,
        own: Mapping[nn.Module, nn.Module],
        given: Crossing | None,
        device: torch.device,
        form: bytes,
    ) -> None:
        self._part, self._own, self._device, self._form = part, own, device, form
        training = part.target.training
        self._known_form = (form, training) in part.found.crossing
        leaves = Crosses() if part.ends_network else part.found.crosses(form, training, part.stop)
        self._wanted, self._unneeded = leaves.sights, leaves.unneeded
        self._aliases = {} if given is None else part.found.crosses(form, training, part.start).aliases
        self._wanted_calls = {(path, where) for path, where, _ in self._wanted}
        self._given = given.values if given is not None else {}
        # What the code has drawn before the stage's first call was drawn, and used, by the stage before.
        self._begun = False
        self._start = Generators(device) if given is not None and part.found.draws else None
        self._told = {(path, where) for path, where, _ in self._given}
        self._earlier = given.done if given is not None else ()
        self._skipped = self._calls = 0
        self._expected = part.expected[training]
        self._path: Path = ()
        self._called: Counter[Path] = Counter()
        self._done: list[Done] = []
        self._seen: dict[Sight, tuple[Tensor, int]] = {}
        self._functions: Counter[Path] = Counter()
        sights = (*self._wanted, *self._given)
        self._named_results = {(path, place) for path, where, place in sights if where >= RESULT}
        #: Whether this is not the code between the layers.
        self.busy = False
        self._wants_grad = torch.is_grad_enabled()

    def called(self, module: nn.Module, role: Role, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do in the place of a module what its call means for this stage."""
        if self.busy:
            with calls_left(module):
                return module(*args, **kwargs)
        self.busy = True
        try:
            return self._called_now(module, role, args, kwargs)
        finally:
            self.busy = False

    def _called_now(self, module: nn.Module, role: Role, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        part, outer = self._part, self._path
        call = (*outer, (part.numbers[module], 0))
        path = (*outer, (part.numbers[module], self._called[call]))
        self._called[call] += 1
        if (path, ARGUMENT) in self._told:
            self._arrive(path, (args, kwargs))
        if (path, ARGUMENT) in self._wanted_calls:
            self._see(path, ARGUMENT, arguments_of((args, kwargs)))
        if role is Role.OWN:
            output = self._run(module, path, args, kwargs)
        elif role is Role.EARLIER:
            output = self._skip(module, path)
        elif role is Role.LATER:
            output = self._stand_in(module, path, args, kwargs)
        else:
            output = self._open(module, path, args, kwargs)
        if (path, OUTPUT) in self._wanted_calls:
            self._see(path, OUTPUT, tensors_of(output))
        return output

    def functions(self) -> AbstractContextManager[object]:
        """Look at what torch functions return to the code between the layers, if a value is named by that."""
        return _Functions(self) if self._named_results else nullcontext()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Leave hooks on what was received to the stage before, if that runs the code too that registers them."""
        values = [value for value in self._given.values() if value.requires_grad]
        for value in values:
            value.register_hook = partial(self._hook, value)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for value in values:
                vars(value).pop("register_hook", None)

    def _hook(self, value: Tensor, hook: Callable[[Tensor], Any]) -> RemovableHandle:
        if not self._begun:
            return RemovableHandle(OrderedDict())
        return Tensor.register_hook(value, hook)  # type: ignore[no-any-return, no-untyped-call]

    def computed(self, result: Any) -> Any:
        """Called with what a torch function returns; return what the code shall get for it."""
        path, place = self._path, self._functions[self._path]
        self._functions[path] += 1
        if (path, place) not in self._named_results:
            return result
        where = count(RESULT)

        def named(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            sight = path, next(where), place
            leaf = self._given.get(sight, leaf)
            if sight in self._wanted:
                self._seen[sight] = leaf, _version(leaf)
            return leaf

        return replaced(named, result)

    def output(self, output: Any) -> Any:
        """Return what the network returns, which the last stage must know."""
        self._check_done()
        if not any(isinstance(tensor, Tracked) for tensor in _tensors_in(output)):
            return output
        return map_tensors(lambda tensor: self._part.absent.present(tensor, "its output"), output)

    def crossing(self, inputs: Sequence[Tensor]) -> Crossing:
        """Return what the next stage gets."""
        part = self._part
        values: dict[Sight, Tensor] = {}
        for sight in sorted(self._wanted.union(self._seen)):
            tensor = self._given.get(sight)
            if sight in self._seen:
                tensor, version = self._seen[sight]
                if _version(tensor) != version:
                    raise part.absent.error(
                        f"writes into a tensor that a later stage than that of {part.names[part.first]!r} needs as it"
                        f" was. {REMEDY}"
                    )
            if isinstance(tensor, Tracked):
                tensor = tensor.value
            if tensor is not None:
                values[sight] = tensor
        carried = [
            spec_of(tensor) if isinstance(tensor, Tracked) or index in self._unneeded else tensor.detach()
            for index, tensor in enumerate(inputs)
        ]
        return Crossing(self._form, carried, (*self._done, *self._earlier[self._skipped :]), values)

    def _run(self, module: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        part = self._part
        self._calls += 1
        self._begin()
        if followed((args, kwargs)):
            args, kwargs = known((args, kwargs))
        with part.absent.inside(part.names[module]), calls_left(module):
            # Not the module's own `__call__`: if it has one, as Hugging Face's that checkpoint, this is inside it.
            output = nn.Module.__call__(self._own[module], *args, **kwargs)
        if not part.ends_network:
            self._note(path, output)
        return output

    def _begin(self) -> None:
        """Begin with what the stage before has not done: from here on, random numbers are drawn by this stage."""
        self._begun = True
        if self._start is not None:
            self._start.restore()
            self._start = None

    def _open(self, module: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._part.found.blocks[module][0] >= self._part.start:
            # Where the stage before has ended.
            self._begin()
        outer, self._path, mark = self._path, path, len(self._done)
        self.busy = False
        with calls_left(module):
            output = nn.Module.__call__(module, *args, **kwargs)
        self.busy, self._path = True, outer
        if module in self._part.closed:
            # The next stage does not look into it any more.
            del self._done[mark:]
            self._note(path, output)
        return output

    def _skip(self, module: nn.Module, path: Path) -> Any:
        """Return what a module of an earlier stage returned, without values but for those that were received."""
        absent, name = self._part.absent, self._part.names[module]
        if self._skipped == len(self._earlier):
            raise absent.diverges(name)
        done = Done(*self._earlier[self._skipped])
        if done.path != path:
            raise absent.diverges(name)
        self._skipped += 1
        self._done.append(done)
        what = f"an output of {name!r}"
        tensors: list[Tensor] = [absent.tensor(spec, self._device, what) for spec in done.tensors]
        for place, tensor in enumerate(tensors):
            sight = path, OUTPUT, place
            tensors[place] = self._given.get(self._aliases.get(sight, sight), tensor)
        return tensors[0] if done.form is None else unflatten(done.form, tensors)

    def _stand_in(self, module: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a module of a later stage returns, without values, if there is still something to do."""
        part = self._part
        if self._calls >= self._expected:
            if not self._known_form:
                self._see(path, ARGUMENT, arguments_of((args, kwargs)))
            raise StageOver(part.absent)
        try:
            form, specs = part.shapes.of(module, *args, **kwargs)
        except Exception:  # noqa: BLE001 - whatever the module does not bear
            raise StageOver(part.absent) from None
        what = f"an output of {part.names[module]!r}"
        return unflatten(form, [part.absent.tensor(spec, self._device, what, later=True) for spec in specs])

    def _note(self, path: Path, output: Any) -> None:
        form, tensors = form_of(output)
        self._done.append(Done(path, form, tuple(map(spec_of, tensors))))

    def _see(self, path: Path, where: int, tensors: Iterable[Tensor]) -> None:
        for place, tensor in enumerate(tensors):
            if (path, where, place) in self._wanted or not self._known_form:
                self._seen[path, where, place] = tensor, _version(tensor)

    def _arrive(self, path: Path, arguments: Call) -> None:
        """Give absent tensors among a call's arguments the values that were received."""
        absent = self._part.absent
        for place, tensor in enumerate(arguments_of(arguments)):
            value = self._given.get((path, ARGUMENT, place))
            if value is None or not isinstance(tensor, Tracked) or tensor.value is not None:
                continue
            name = self._part.names[self._part.modules[path[-1][0]]]
            if value.shape != tensor.shape:
                raise absent.diverges(name)
            if value.requires_grad:
                if self._wants_grad and not torch.is_grad_enabled():
                    raise absent.error(
                        f"calls {name!r} with gradients switched off, as a reentrant checkpoint does, so that no"
                        f" gradient would be sent to the stage before. Use `use_reentrant=False`. {REMEDY}"
                    )
                # Whatever takes it past `__torch_function__` would end the gradient here, unseen.
                tensor.requires_grad_().register_hook(absent.refuse_gradient)  # type: ignore[no-untyped-call]
            tensor.value = value

    def _check_done(self) -> None:
        if self._skipped < len(self._earlier):
            path = self._earlier[self._skipped][0]
            raise self._part.absent.diverges(self._part.names[self._part.modules[path[-1][0]]])


class _Functions(TorchFunctionMode):
    """Shows a run what torch functions return to the code between the layers."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._run.busy:
            return func(*args, **(kwargs or {}))
        self._run.busy = True
        try:
            return self._run.computed(func(*args, **(kwargs or {})))
        finally:
            self._run.busy = False


def _tensors_in(output: Any) -> Iterable[Tensor]:
    try:
        return tensors_of(output)
    except Exception:  # noqa: BLE001 - whatever pickling says of an object made for the loss alone
        return arguments_of(output)


def _device_of(layers: Iterable[nn.Module], values: Sequence[Any]) -> torch.device:
    own = next((parameter for layer in layers for parameter in layer.parameters()), None)
    tensors = (value for value in (own, *values) if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_WHOLE_ONLY = ("use_cache", "output_hidden_states", "output_attentions")


def check_call(target: nn.Module, configs: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError if a call, or a config, asks Hugging Face networks for what they collect from all layers."""
    for name in _WHOLE_ONLY:
        asked = kwargs.get(name)
        if asked is None and name != "use_cache":
            asked = any(getattr(config, name, None) is True for config in configs)
        if asked is not None and asked is not False:
            raise ValueError(
                f"{name}={asked!r} asks {type(target).__name__} for values of all its layers, of which each stage has "
                f"only its own: set {name}=False in the call and in the network's config."
            )
