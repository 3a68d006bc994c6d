"""What a module returns, but for the values: found by calling a copy of it on the meta device, once for each shape."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ddg.core.pytree import flatten, map_tensors
from lightning_ddg.core.tensors import TensorSpec, spec_of


class StandIn(NamedTuple):
    """A call of a layer or a block: when, and what fails where the shapes of its output depend on values."""

    module: nn.Module
    time: int
    shapes: Callable[[], object]


class Shapes:
    """Says what modules return; copies each once, and calls it once for each form of a call."""

    def __init__(self) -> None:
        self._copies: dict[nn.Module, nn.Module] = {}
        self._known: dict[Any, tuple[bytes, list[TensorSpec]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Shapes:
        return self

    def of(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[bytes, list[TensorSpec]]:
        """Return the form of what a module returns for such arguments, and the description of its tensors.

        Raises:
            Exception: Whatever the module raises on the meta device, as where its output's shape depends on values.
        """
        form, tensors = flatten((args, kwargs))
        key = module, module.training, form, tuple(map(spec_of, tensors))
        if key not in self._known:
            if module not in self._copies:
                self._copies[module] = copy_on_meta(module)
            with torch.no_grad():
                args, kwargs = map_tensors(_on_meta, (args, kwargs))
                form, tensors = flatten(self._copies[module].train(module.training)(*args, **kwargs))
            self._known[key] = form, [spec_of(tensor) for tensor in tensors]
        return self._known[key]

    def later(self, module: nn.Module, *args: Any, **kwargs: Any) -> Callable[[], object]:
        """Return what does :meth:`of` when it is called, without holding the values of the arguments."""
        try:
            args, kwargs = map_tensors(_on_meta, (args, kwargs))
        except Exception as error:  # noqa: BLE001 - whatever pickling says, it will say again
            return partial(_fail, error)
        return partial(self.of, module, *args, **kwargs)


def _fail(error: Exception) -> None:
    raise error


def copy_on_meta(module: nn.Module) -> nn.Module:
    """Return a copy of a module without values and without hooks."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for child in module.modules():
        # A hook may be a method of anything, the Trainer included, which must not be copied with it.
        for name, value in vars(child).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                memo[id(value)] = OrderedDict()
            elif name == "_compiled_call_impl" and value is not None:
                memo[id(value)] = None
    return copy.deepcopy(module, memo)


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
