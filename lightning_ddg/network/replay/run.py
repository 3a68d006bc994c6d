"""What happens in one run of a stage: whose calls are real, what is received, and what is kept for the next."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_ddg.core.pytree import map_tensors, tensors_of, unflatten
from lightning_ddg.core.rng import Generators
from lightning_ddg.core.tensors import spec_of
from lightning_ddg.network.layers import Call
from lightning_ddg.network.replay.absent import StageOver
from lightning_ddg.network.replay.analysis import Crosses
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
    tensors_in,
)
from lightning_ddg.network.replay.module_calls import calls_left
from lightning_ddg.network.replay.roles import Role, Roles
from lightning_ddg.network.replay.tracked import Tracked, followed, known, replaced


class StageRun:
    """One run of a part: does in the place of modules what their calls mean."""

    def __init__(
        self,
        part: Roles,
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
        if part.watch is not None and role in (Role.OWN, Role.EARLIER):
            part.watch(part.names[module], path, role is Role.OWN, (args, kwargs))
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
                self._seen[sight] = leaf, version_of(leaf)
            return leaf

        return replaced(named, result)

    def output(self, output: Any) -> Any:
        """Return what the network returns, which the last stage must know."""
        self._check_done()
        if not any(isinstance(tensor, Tracked) for tensor in tensors_in(output)):
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
                if version_of(tensor) != version:
                    raise part.absent.error(
                        f"writes into a tensor that a later stage than that of {part.names[part.first]!r} needs as it"
                        f" was. {part.absent.remedy}"
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
            if not part.found.runs_on:
                raise StageOver(part.absent)
            part.absent.over = True
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
                self._seen[path, where, place] = tensor, version_of(tensor)

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
                        f" gradient would be sent to the stage before. Use `use_reentrant=False`. {absent.remedy}"
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

    def __init__(self, run: StageRun) -> None:
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


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written into."""
    return 0 if tensor.is_inference() else tensor._version
