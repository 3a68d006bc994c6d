"""A run of a network's own forward in which only the layers of one stage are real.

Calls of earlier layers return tensors without values. At the call of the stage's first layer, those that were received
take their place; the call of the next stage's first layer ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.core.pytree import flatten, map_tensors, tensors_of, unflatten
from lightning_ddg.core.tensors import Slot, parameters_replaced, spec_of
from lightning_ddg.network.layers import Call
from lightning_ddg.network.replay.absent import REMEDY, Absent
from lightning_ddg.network.replay.analysis import Analysis
from lightning_ddg.network.replay.crossing import Crossing, Done, Output, places
from lightning_ddg.network.replay.module_calls import caching_configs, calls_left, calls_taken, plain_calls
from lightning_ddg.network.replay.tracked import Tracked, followed, known


class Part:
    """The layers ``start`` to ``stop - 1`` of a network, as they are called by its forward.

    Attributes:
        layers: The layers.
        loose: The parameters of the part outside of them: the name of their module relative to the network, the module,
            and their name in it.
        wanted: The outputs of layers, earlier ones included, that have to be remembered.
    """

    def __init__(self, target: nn.Module, forward: Callable[..., Any], found: Analysis, start: int, stop: int) -> None:
        self.found = found
        self.start, self.stop = start, stop
        self.ends_network = stop == len(found.layers)
        self.names = [layer.name for layer in found.layers]
        self.absent = Absent(type(target).__name__, self.names[start])
        self.layers = found.layers[start:stop]
        paths = {module: path for path, module in target.named_modules()}
        self.loose = [(paths[m], m, name) for (m, name), position in found.loose.items() if start <= position < stop]
        self.wanted = frozenset[Output]().union(*found.outputs)
        self._target, self._forward = target, forward
        self._configs = caching_configs(target)
        self._foreign = self._foreign_parameters()
        self._stands: list[tuple[Slot, Tracked]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        # A copied segment has other weights, but runs the same code.
        return self

    def run(self, layers: Sequence[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the layers, calling the given modules in the place of the user's.

        The arguments are the network's, or a :class:`~lightning_ddg.network.replay.crossing.Crossing` that the stage
        before this one returned; so is what is returned.

        Raises:
            RuntimeError: The network's code needs something that no stage can know.
            ValueError: The call asks for what a part of the network cannot give.
        """
        earlier = None
        if self.start == 0:
            check_call(self._target, kwargs)
            form, inputs = flatten((args, kwargs))
            device = _device_of(layers, inputs)
        else:
            given = Crossing(*args[0])
            form, device = given.form, _device_of(layers, [*given.arguments, *given.inputs])
            inputs = [
                value if isinstance(value, Tensor) else self.absent.tensor(value, device, f"input {index}")
                for index, value in enumerate(given.inputs)
            ]
            args, kwargs = unflatten(form, inputs)
            earlier = _Earlier(self, given, device)
        run = _Run(self, layers, earlier)
        versions = [_version(tensor) for tensor in inputs]
        try:
            with (
                plain_calls(self._configs),
                parameters_replaced(self._absent_parameters(device)),
                calls_taken({layer.module: partial(run.called, at) for at, layer in enumerate(self.found.layers)}),
            ):
                output = self._forward(*args, **kwargs)
        except _Reached as reached:
            if reached.run is not run:
                raise
            if versions != [_version(tensor) for tensor in inputs]:
                raise self.absent.error(
                    "changes one of its arguments in place, and every stage would do so again. Let it work on a copy"
                ) from None
            return run.crossing(form, inputs, reached.position, reached.arguments)
        if not (run.arrived and self.ends_network):
            missing = self.names[self.start if self.ends_network else self.stop]
            raise self.absent.error(
                f"did not call {missing!r} this time, nor any layer after it, but was cut there. {REMEDY}"
            )
        if any(isinstance(tensor, Tracked) for tensor in tensors_of(output)):
            return map_tensors(lambda tensor: self.absent.present(tensor, "its output"), output)
        return output

    def _absent_parameters(self, device: torch.device) -> list[tuple[Slot, Tracked]]:
        """Other stages' parameters: what this process has of them are not their current values."""
        if not self._stands or self._stands[0][1].device != device:
            self._stands = [
                ((module._parameters, name), self.absent.tensor(spec_of(value), device, label))
                for module, name, label in self._foreign
                if (value := module._parameters[name]) is not None
            ]
        return self._stands

    def _foreign_parameters(self) -> list[tuple[nn.Module, str, str]]:
        own = {part for layer in self.layers for part in layer.module.modules()}
        return [
            (module, name, f"the parameter {f'{path}.{name}'.lstrip('.')!r}")
            for path, module in self._target.named_modules()
            if module not in own
            for name, value in module._parameters.items()
            if value is not None and not self.start <= self.found.loose.get((module, name), -1) < self.stop
        ]


class _Run:
    """One run of a part."""

    def __init__(self, part: Part, layers: Sequence[nn.Module], earlier: _Earlier | None) -> None:
        self._part = part
        self._layers = layers
        self._earlier = earlier
        self._done: list[Done] = [] if earlier is None else list(earlier.given.done)
        self._outputs: dict[Output, Tensor] = {}

    @property
    def arrived(self) -> bool:
        """Whether the stage's first layer has been called."""
        return self._earlier is None

    def called(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do in the place of a layer what its call means for this stage."""
        part = self._part
        if self._earlier is not None:
            if position < part.start:
                absent, output = self._earlier.skip(position)
                self._remember(position, absent)
                return output
            self._earlier.arrive(position, (args, kwargs), self._outputs)
            self._earlier = None
        if position >= part.stop:
            raise _Reached(self, position, (args, kwargs))
        if position < part.start:
            raise part.absent.error(
                f"calls {part.names[position]!r} again after {part.names[part.start]!r}, which is in a later stage. "
                f"{REMEDY}"
            )
        if followed((args, kwargs)):
            args, kwargs = known((args, kwargs))
        with part.absent.inside(part.names[position]), calls_left(part.found.layers[position].module):
            # Not the layer's own `__call__`: if it has one, as Hugging Face's that checkpoint, this is inside it.
            output = nn.Module.__call__(self._layers[position - part.start], *args, **kwargs)
        if not part.ends_network:
            form, tensors = flatten(output)
            self._done.append(Done(position, form, tuple(map(spec_of, tensors))))
            self._remember(position, tensors)
        return output

    def _remember(self, position: int, tensors: Sequence[Tensor]) -> None:
        for place, tensor in enumerate(tensors) if self._part.wanted else ():
            if (position, place) in self._part.wanted:
                self._outputs[position, place] = tensor

    def crossing(self, form: bytes, inputs: Sequence[Tensor], position: int, call: Call) -> Crossing:
        """Return what the next stage gets, which begins with a call of the layer at ``position``."""
        part, found = self._part, self._part.found
        shape, tensors = places(call)
        which = found.crossing[position].get(shape)
        arguments: list[Tensor | None] = [
            part.absent.present(tensor, f"an argument of {part.names[position]!r}")
            if which is None or place in which
            else None
            for place, tensor in enumerate(tensors)
        ]
        outputs = {
            key: part.absent.present(self._outputs[key], "what is used later")
            for key in sorted(found.outputs[position])
            if key in self._outputs
        }
        unneeded = found.unneeded[form][position] if form in found.unneeded else ()
        carried = [
            spec_of(tensor) if isinstance(tensor, Tracked) or index in unneeded else tensor.detach()
            for index, tensor in enumerate(inputs)
        ]
        return Crossing(form, carried, tuple(self._done), position, arguments, outputs)


class _Earlier:
    """What earlier stages have done, told to the network's code again until it calls this stage's first layer."""

    def __init__(self, part: Part, given: Crossing, device: torch.device) -> None:
        self.given = given
        self._part, self._device = part, device
        self._skipped = 0
        self._wants_grad = torch.is_grad_enabled()

    def skip(self, position: int) -> tuple[list[Tracked], Any]:
        """Return what a layer of an earlier stage returned there, without values: its tensors, and the whole."""
        done = self.given.done[self._skipped] if self._skipped < len(self.given.done) else None
        if done is None or done.position != position:
            raise self._part.absent.diverges(self._part.names[position])
        self._skipped += 1
        what = f"an output of {self._part.names[position]!r}"
        tensors = [self._part.absent.tensor(spec, self._device, what) for spec in done.tensors]
        return tensors, unflatten(done.form, tensors)

    def arrive(self, position: int, arguments: Call, outputs: Mapping[Output, Tensor]) -> None:
        """Give absent tensors among a layer's arguments, and among earlier outputs, the values that were received."""
        given, absent, name = self.given, self._part.absent, self._part.names[position]
        found, received = places(arguments)[1], given.arguments
        if (position, self._skipped, len(found)) != (given.position, len(given.done), len(received)) or any(
            value is not None and value.shape != tensor.shape for tensor, value in zip(found, received, strict=True)
        ):
            raise absent.diverges(name)
        if (
            self._wants_grad
            and not torch.is_grad_enabled()
            and any(value is not None and value.requires_grad for value in received)
        ):
            raise absent.error(
                f"calls {name!r} with gradients switched off, as a reentrant checkpoint does, so that no gradient "
                f"would be sent to the stage before. Use `use_reentrant=False`. {REMEDY}"
            )
        if not given.outputs.keys() <= outputs.keys():
            raise absent.diverges(name)
        later = [(outputs[key], value) for key, value in given.outputs.items()]
        for tensor, value in [*zip(found, received, strict=True), *later]:
            if isinstance(tensor, Tracked) and tensor.value is None and value is not None:
                if value.requires_grad:
                    # Whatever takes it past `__torch_function__` would end the gradient here, unseen.
                    tensor.requires_grad_().register_hook(absent.refuse_gradient)  # type: ignore[no-untyped-call]
                tensor.value = value


class _Reached(BaseException):
    """The network calls a layer of a later stage: this stage is done."""

    def __init__(self, run: _Run, position: int, arguments: Call) -> None:
        super().__init__()
        self.run = run
        self.position = position
        self.arguments = arguments


def _device_of(layers: Sequence[nn.Module], values: Sequence[Any]) -> torch.device:
    own = next((parameter for layer in layers for parameter in layer.parameters()), None)
    tensors = (value for value in (own, *values) if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_WHOLE_ONLY = ("use_cache", "output_hidden_states", "output_attentions")


def check_call(target: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError if a call, or a config, asks Hugging Face networks for what they collect from all layers."""
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
