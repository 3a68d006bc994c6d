"""A network as a chain of which each stage runs the network's own code, but only its own layers.

This is for networks whose code cannot be recorded as a graph. What travels between two stages changes here; which
modules are the layers, and where there can be a cut, is decided in :mod:`~lightning_ddg.network.replay.survey`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ddg.core.tensors import (
    Slot,
    TensorSpec,
    allocate,
    flatten,
    map_tensors,
    parameters_replaced,
    spec_of,
    tensors_of,
    unflatten,
)
from lightning_ddg.network.layers import namespace
from lightning_ddg.network.replay.module_calls import caching_configs, calls_left, calls_taken, places, plain_calls
from lightning_ddg.network.replay.survey import Call, Output, Survey, registered, survey
from lightning_ddg.network.replay.tracked import Origin, Tracked, followed, known

_REMEDY = "Cut elsewhere (`split_points`), or return the network's layers from `configure_stages()`."


class Done(NamedTuple):
    """A call of a layer that is over: the layer's position, the form of its output, and its tensors' descriptions."""

    position: int
    form: bytes
    tensors: tuple[TensorSpec, ...]


class Crossing(NamedTuple):
    """What travels from one stage to the next.

    Attributes:
        form: The form of the network's call.
        inputs: Its tensors; of those that nothing uses from here on, the description.
        done: The calls of layers so far.
        position: The layer that is called next.
        arguments: The tensors in its arguments; ``None`` for those that every stage has by itself.
        outputs: Tensors that layers have returned and that are needed later.
    """

    form: bytes
    inputs: list[Tensor | TensorSpec]
    done: tuple[Done, ...]
    position: int
    arguments: list[Tensor | None]
    outputs: dict[Output, Tensor]


class ReplayedChain:
    """The layers of a network whose forward every stage runs by itself.

    A layer is a module that is run as a whole: an entry of a ``ModuleList``, an embedding, a head. The code around the
    layers runs in every stage: on real tensors where they come from the network's inputs, such as masks and positions;
    on tensors without values where they come from layers of earlier stages. The arguments of a stage's first layer are
    received. Other values of earlier stages are not there: a layer that needs one must be in the stage that made it.

    Args:
        target: The network.
        target_name: Its name relative to the root module; ``""`` for the root itself.
        call: Arguments and keyword arguments of an example call, with their values, on the network's device. It is run
            once in training and once in evaluation, to see in which order the layers are called and between which of
            them a cut is possible; the network is left as it was. Without it, the layers are in the order in which the
            network's modules hold them, and what is impossible is said when it is met.

    Raises:
        ValueError: The network has no layers, or the call asks for what a part of the network cannot give.
    """

    compilable = False
    read_only: frozenset[str] = frozenset()

    def __init__(self, target: nn.Module, target_name: str, call: Call | None = None) -> None:
        self._target = target
        self._prefix = f"{target_name}." if target_name else ""
        self._forward: Callable[..., Any] = target.forward
        if call is not None:
            _check_call(target, call[1])
        found = registered(target) if call is None else survey(target, self._forward, call)
        if not found.layers:
            raise ValueError(
                f"The network {type(target).__name__} calls no module with parameters: there is nothing to cut. Return "
                "its layers from `configure_stages()`."
            )
        self._survey: Survey = found
        self._parts: dict[tuple[int, int], _Part] = {}
        self._paths = {module: name for name, module in target.named_modules()}
        # A layer that cannot begin a stage belongs to the one before.
        self._starts = [position for position in range(len(found.layers)) if position not in found.forbidden]
        self.names = [self._label(position) for position in self._starts]

    def __len__(self) -> int:
        return len(self.names)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayedChain:
        # A copied segment has other weights, but runs the same code.
        return self

    @property
    def forbidden(self) -> dict[str, str]:
        """Modules that the network calls like layers but that cannot begin a stage, each with the reason."""
        return {self._label(position): reason for position, reason in self._survey.forbidden.items()}

    def segment(self, start: int, stop: int) -> nn.Module:
        """Return the module that runs the layers ``start`` to ``stop - 1``.

        The first takes the network's arguments; every other one what the one before it returns.

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
        return ReplayedSegment(self, *self._positions(start, stop))

    def modules(self, start: int, stop: int) -> list[nn.Module]:
        """Return the user's modules that are called in the layers ``start`` to ``stop - 1``."""
        return [layer.module for layer in self._survey.layers[slice(*self._positions(start, stop))]]

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """Run all the layers as one part, which leaves out what no stage could return, such as caches of all layers."""
        return self.segment(0, len(self))(*args, **kwargs)

    def _positions(self, start: int, stop: int) -> tuple[int, int]:
        ends = [*self._starts, len(self._survey.layers)]
        return ends[start], ends[stop]

    def _label(self, position: int) -> str:
        return f"{self._prefix}{self._survey.layers[position].name}"

    # ---- for the segments: positions among the modules called like layers

    def part(self, start: int, stop: int) -> _Part:
        """Return what runs a part of the network, made once."""
        if (start, stop) not in self._parts:
            self._parts[start, stop] = _Part(self._target, self._forward, self._survey, start, stop)
        return self._parts[start, stop]

    def own_modules(self, start: int, stop: int) -> dict[str, nn.Module]:
        """Return the modules of a part, by their names relative to the root."""
        return {self._label(position): self._survey.layers[position].module for position in range(start, stop)}

    def own_parameters(self, start: int, stop: int) -> list[tuple[nn.Module, str, str]]:
        """Return the parameters of a part outside these modules: their module, its name from the root, their name."""
        return [
            (module, f"{self._prefix}{self._paths[module]}".strip("."), name)
            for (module, name), position in self._survey.loose.items()
            if start <= position < stop
        ]


class ReplayedSegment(nn.Module):
    """Consecutive layers of a replayed network as one module, with the user's modules under their own names.

    Args:
        chain: The network.
        start: Position of the first of its modules.
        stop: Position after the last.
    """

    def __init__(self, chain: ReplayedChain, start: int, stop: int) -> None:
        super().__init__()
        self._chain = chain
        self._start, self._stop = start, stop
        self._names = list(chain.own_modules(start, stop))
        for label, module in chain.own_modules(start, stop).items():
            *path, leaf = label.split(".")
            namespace(self, path).add_module(leaf, module)
        for module, path_name, name in chain.own_parameters(start, stop):
            space = namespace(self, path_name.split(".") if path_name else [])
            if not isinstance(space._parameters, _Shared):
                space._parameters = _Shared(module._parameters)
            space.register_parameter(name, module._parameters[name])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layers on the network's arguments, or on what the segment before this one returned."""
        layers = [self.get_submodule(name) for name in self._names]
        # Those of this segment, which may be a copy, in the place of the user's.
        own = [
            ((module._parameters, name), self.get_submodule(path)._parameters[name])
            for module, path, name in self._chain.own_parameters(self._start, self._stop)
        ]
        part = self._chain.part(self._start, self._stop)
        with parameters_replaced(own):
            return part.run(layers, args, kwargs)


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


class _Reached(BaseException):
    """The network calls a layer of a later stage: this stage is done."""

    def __init__(self, part: _Part, position: int, arguments: Call) -> None:
        super().__init__()
        self.part = part
        self.position = position
        self.arguments = arguments


class _Part:
    """Runs a network's forward with some of its layers only; the ledger of the tensors that are absent meanwhile.

    Args:
        target: The network.
        forward: Its forward.
        found: What is known of it.
        start: Position of the first layer that is run.
        stop: Position after the last.
    """

    def __init__(self, target: nn.Module, forward: Callable[..., Any], found: Survey, start: int, stop: int) -> None:
        self.now = 0
        self._target, self._forward, self._survey = target, forward, found
        self._start, self._stop = start, stop
        self._names = [layer.name for layer in found.layers]
        self._modules = [layer.module for layer in found.layers]
        self._configs = caching_configs(target)
        self._handlers = {module: partial(self._called, position) for position, module in enumerate(self._modules)}
        self._foreign = self._foreign_slots()
        self._wanted = frozenset[Output]().union(*found.outputs)
        self._stands: list[tuple[Slot, Tracked]] = []
        # Of the run in progress:
        self._layers: Sequence[nn.Module] = ()
        self._given: Crossing | None = None
        self._device = torch.device("cpu")
        self._done: list[Done] = []
        self._outputs: dict[Output, Tensor] = {}
        self._skipped = 0
        self._live = False
        self._wants_grad = False
        self._inside: str | None = None

    def run(self, layers: Sequence[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the layers.

        Args:
            layers: The modules to call in the place of the user's.
            args: The network's arguments, or what the stage before this one returned.
            kwargs: The network's keyword arguments.

        Returns:
            The network's output, or a :class:`Crossing`.

        Raises:
            RuntimeError: The network's code needs something that no stage can know.
            ValueError: The call asks for what a part of the network cannot give.
        """
        self._layers, self._outputs, self._skipped, self._inside = layers, {}, 0, None
        self._live, self._wants_grad = self._start == 0, torch.is_grad_enabled()
        if self._start == 0:
            _check_call(self._target, kwargs)
            form, inputs = flatten((args, kwargs))
            self._given, self._done, self._device = None, [], self._device_of(inputs)
        else:
            given = self._given = Crossing(*args[0])
            form, self._done = given.form, list(given.done)
            self._device = self._device_of([*given.arguments, *given.inputs])
            inputs = [self._input(index, value) for index, value in enumerate(given.inputs)]
            args, kwargs = unflatten(form, inputs)
        versions = [_version(tensor) for tensor in inputs]
        try:
            with (
                plain_calls(self._configs),
                parameters_replaced(self._absent_parameters()),
                calls_taken(self._handlers),
            ):
                output = self._forward(*args, **kwargs)
        except _Reached as reached:
            if reached.part is not self:
                raise
            if versions != [_version(tensor) for tensor in inputs]:
                raise self._error(
                    "changes one of its arguments in place, and every stage would do so again. Let it work on a copy"
                ) from None
            return self._crossing(form, inputs, reached.position, reached.arguments)
        finally:
            self._layers, self._given, self._outputs = (), None, {}
        return self._finished(output)

    # ---- what the network's code meets

    def _called(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._live:
            if position < self._start:
                return self._skip(position)
            self._arrive(position, (args, kwargs))
        if position >= self._stop:
            raise _Reached(self, position, (args, kwargs))
        if position < self._start:
            raise self._error(
                f"calls {self._names[position]!r} again after {self._names[self._start]!r}, which is in a later stage. "
                + _REMEDY
            )
        if followed((args, kwargs)):
            args, kwargs = known((args, kwargs))
        outer, self._inside = self._inside, self._names[position]
        with calls_left(self._modules[position]):
            # Not the layer's own `__call__`: if it has one, as Hugging Face's that checkpoint, this is inside it.
            output = nn.Module.__call__(self._layers[position - self._start], *args, **kwargs)
        self._inside = outer
        if self._stop < len(self._names):
            shape, tensors = flatten(output)
            self._done.append(Done(position, shape, tuple(map(spec_of, tensors))))
            self._remember(position, tensors)
        return output

    def _skip(self, position: int) -> Any:
        """Return what a layer of an earlier stage returned there, without values."""
        assert self._given is not None
        done = self._given.done[self._skipped] if self._skipped < len(self._given.done) else None
        if done is None or done.position != position:
            raise self._diverges(position)
        self._skipped += 1
        origin = Origin(f"an output of {self._names[position]!r}")
        tensors = [self._absent(spec, origin) for spec in done.tensors]
        self._remember(position, tensors)
        return unflatten(done.form, tensors)

    def _remember(self, position: int, tensors: Sequence[Tensor]) -> None:
        if self._wanted:
            for place, tensor in enumerate(tensors):
                if (position, place) in self._wanted:
                    self._outputs[position, place] = tensor

    def _arrive(self, position: int, arguments: Call) -> None:
        """Give absent tensors among the arguments the values that were received."""
        assert self._given is not None
        found, received = places(arguments)[1], self._given.arguments
        if (position, self._skipped, len(found)) != (self._given.position, len(self._given.done), len(received)) or any(
            value is not None and value.shape != tensor.shape for tensor, value in zip(found, received, strict=True)
        ):
            raise self._diverges(position)
        if (
            self._wants_grad
            and not torch.is_grad_enabled()
            and any(v is not None and v.requires_grad for v in received)
        ):
            raise self._error(
                f"calls {self._names[position]!r} with gradients switched off, as a reentrant checkpoint does, so that "
                f"no gradient would be sent to the stage before. Use `use_reentrant=False`. {_REMEDY}"
            )
        if not self._given.outputs.keys() <= self._outputs.keys():
            raise self._diverges(position)
        outputs = [(self._outputs[key], value) for key, value in self._given.outputs.items()]
        for tensor, value in [*zip(found, received, strict=True), *outputs]:
            if isinstance(tensor, Tracked) and tensor.value is None and value is not None:
                if value.requires_grad:
                    # Whatever takes it past `__torch_function__` would end the gradient here, unseen.
                    tensor.requires_grad_().register_hook(self._refuse_gradient)  # type: ignore[no-untyped-call]
                tensor.value = value
        self._live = True

    def _crossing(self, form: bytes, inputs: Sequence[Tensor], position: int, call: Call) -> Crossing:
        shape, tensors = places(call)
        which = self._survey.crossing[position].get(shape)
        arguments: list[Tensor | None] = [
            self._present(tensor, f"an argument of {self._names[position]!r}")
            if which is None or place in which
            else None
            for place, tensor in enumerate(tensors)
        ]
        outputs = {
            key: self._present(self._outputs[key], "what is used later")
            for key in sorted(self._survey.outputs[position])
            if key in self._outputs
        }
        unneeded = self._survey.unneeded[form][position] if form in self._survey.unneeded else ()
        carried = [
            spec_of(tensor) if isinstance(tensor, Tracked) or index in unneeded else tensor.detach()
            for index, tensor in enumerate(inputs)
        ]
        return Crossing(form, carried, tuple(self._done), position, arguments, outputs)

    def _finished(self, output: Any) -> Any:
        missing = self._stop if self._stop < len(self._names) else self._start
        if not self._live or self._stop < len(self._names):
            raise self._error(
                f"did not call {self._names[missing]!r} this time, nor any layer after it, but was cut there. "
                + _REMEDY
            )
        if any(isinstance(tensor, Tracked) for tensor in tensors_of(output)):
            return map_tensors(lambda tensor: self._present(tensor, "its output"), output)
        return output

    def _present(self, tensor: Tensor, where: str) -> Tensor:
        if not isinstance(tensor, Tracked):
            return tensor
        if tensor.value is None:
            raise self._unknown(tensor, where)
        return tensor.value

    # ---- absent tensors

    def used(self, tensor: Tracked) -> None:
        """See :class:`~lightning_ddg.network.replay.tracked.Ledger`."""
        if self._inside is not None:
            raise self._unknown(tensor, f"the layer {self._inside!r}")

    def read(self, tensor: Tracked, operation: str) -> None:
        """See :class:`~lightning_ddg.network.replay.tracked.Ledger`."""
        raise self._error(
            f"goes on by the values of {tensor.origin.what} ({operation}), which is not in the stage of "
            f"{self._names[self._start]!r}. " + _REMEDY
        )

    def _input(self, index: int, value: Tensor | TensorSpec) -> Tensor:
        return value if isinstance(value, Tensor) else self._absent(value, Origin(f"input {index}"))

    def _absent(self, spec: TensorSpec, origin: Origin) -> Tracked:
        return Tracked(allocate(spec, "meta"), self._device, self, origin)

    def _absent_parameters(self) -> list[tuple[Slot, Tracked]]:
        """Other stages' parameters: what this process has of them are not their current values."""
        if not self._stands or self._stands[0][1].device != self._device:
            self._stands = [
                ((module._parameters, name), self._absent(spec_of(value), Origin(label)))
                for module, name, label in self._foreign
                if (value := module._parameters[name]) is not None
            ]
        return self._stands

    def _foreign_slots(self) -> list[tuple[nn.Module, str, str]]:
        layers = self._survey.layers[self._start : self._stop]
        own = {part for layer in layers for part in layer.module.modules()}
        loose = self._survey.loose
        return [
            (module, name, f"the parameter {f'{path}.{name}'.lstrip('.')!r}")
            for path, module in self._target.named_modules()
            if module not in own
            for name, value in module._parameters.items()
            if value is not None and not self._start <= loose.get((module, name), -1) < self._stop
        ]

    def _device_of(self, values: Sequence[Any]) -> torch.device:
        own = next((parameter for layer in self._layers for parameter in layer.parameters()), None)
        tensors = [own, *values] if own is not None else values
        return next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), torch.device("cpu"))

    # ---- errors

    def _error(self, what: str) -> RuntimeError:
        return RuntimeError(f"The forward of {type(self._target).__name__} {what}")

    def _unknown(self, tensor: Tracked, where: str) -> RuntimeError:
        return self._error(
            f"passes on a value that the stage of {self._names[self._start]!r} does not have: in {where}, a tensor of "
            f"shape {tuple(tensor.shape)} comes from {tensor.origin.what}, which is in another stage, and is no "
            f"argument of {self._names[self._start]!r}. {_REMEDY}"
        )

    def _diverges(self, position: int) -> RuntimeError:
        return self._error(
            f"took another way in the stage of {self._names[self._start]!r} than in the one before, at the call of "
            f"{self._names[position]!r}: between its layers it must not draw random numbers, count its calls, or go by "
            f"what only one process knows. {_REMEDY}"
        )

    def _refuse_gradient(self, grad: Tensor) -> None:
        raise self._error(
            f"passes an argument of {self._names[self._start]!r} to an autograd function outside of its layers, "
            f"through which no gradient can be sent to the stage before. {_REMEDY}"
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_WHOLE_ONLY = ("use_cache", "output_hidden_states", "output_attentions")


def _check_call(target: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse what Hugging Face networks collect from all their layers: no stage has all of it."""
    for name in _WHOLE_ONLY:
        asked = kwargs.get(name)
        if asked is None and name != "use_cache":
            configs = (getattr(module, "config", None) for module in target.modules())
            asked = any(getattr(config, name, None) is True for config in configs)
        if asked is not None and asked is not False:
            raise ValueError(
                f"{name}={asked!r} asks {type(target).__name__} for values of all its layers, of which each stage has "
                f"only its own: set {name}=False in the call and in the network's config."
            )
