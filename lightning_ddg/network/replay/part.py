"""A run of a network's own code in which only the modules of one stage are real.

Calls of earlier modules return tensors without values, except for those that were received. Calls of later ones do so
too, as long as a call of the stage's own is to come; then the run ends.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.core.pytree import flatten, unflatten
from lightning_ddg.core.tensors import Slot, parameters_replaced, spec_of
from lightning_ddg.network.replay.absent import StageOver
from lightning_ddg.network.replay.analysis import Analysis
from lightning_ddg.network.replay.code import Code
from lightning_ddg.network.replay.crossing import Crossing
from lightning_ddg.network.replay.module_calls import calls_taken, check_call, configs_of, plain_calls
from lightning_ddg.network.replay.roles import Roles
from lightning_ddg.network.replay.run import StageRun, version_of
from lightning_ddg.network.replay.tracked import Tracked

_log = logging.getLogger(__name__)


class Part(Roles):
    """The layers ``start`` to ``stop - 1`` of a network, as they are called by its forward."""

    def __init__(self, target: nn.Module, code: Code, found: Analysis, start: int, stop: int) -> None:
        super().__init__(target, found, start, stop)
        self._forward = code.whole if self.ends_network else code.part
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
        run = StageRun(self, self._counterparts(own), given, device, form)
        versions = [version_of(tensor) for tensor in inputs]
        self.absent.running, self.absent.over = True, False
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
        except Exception:
            # What follows the stage's own calls is run for what it leaves in attributes, and may not bear such tensors.
            if not self.absent.over:
                raise
            _log.debug("what follows the stage of %r has failed", self.names[self.first], exc_info=True)
        else:
            if self.ends_network:
                return run.output(output)
        finally:
            self.absent.running = False
        if versions != [version_of(tensor) for tensor in inputs]:
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


def _device_of(layers: Iterable[nn.Module], values: Sequence[Any]) -> torch.device:
    own = next((parameter for layer in layers for parameter in layer.parameters()), None)
    tensors = (value for value in (own, *values) if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
