"""What is noticed, while a network is watched, besides the calls of its modules.

That is autograd functions and torch functions, random numbers, and what modules keep in attributes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ddg.network.replay.crossing import arguments_of
from lightning_ddg.network.replay.layers import Place, Tree, is_metric
from lightning_ddg.network.replay.tracked import Tracked, draws


class Watch(Protocol):
    """Is told.

    Attributes:
        busy: Whether a layer runs, or the watch itself does something: that is of no interest.
        applying: How many autograd functions are running.
        draws_torch: Whether random numbers have been drawn from torch.
    """

    busy: bool
    applying: int
    draws_torch: bool

    def computed(self, result: Any) -> None:
        """Called with what a torch function has returned to the code between the layers."""

    def drawn(self, tensor: Tensor) -> Tracked:
        """Return what the code gets for a random tensor."""

    def made_empty(self, tensor: Tensor) -> Tracked:
        """Return what the code gets for a tensor without values, into which random numbers may be drawn."""


@contextmanager
def derivatives_refused(target: nn.Module) -> Iterator[None]:
    """Refuse derivatives that code takes between layers: they go through all of them."""
    grad = torch.autograd.grad

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{type(target).__name__} takes a derivative (`torch.autograd.grad`) in the forward, through layers that"
            " would be in other stages"
        )

    torch.autograd.grad = refuse
    try:
        yield
    finally:
        torch.autograd.grad = grad


@contextmanager
def functions_noticed(watch: Watch) -> Iterator[None]:
    """Tell when autograd functions run: no gradient is noted inside, nor goes through what stands for an argument."""
    apply = vars(torch.autograd.Function)["apply"]

    def noticed(kind: type, *args: Any, **kwargs: Any) -> Any:
        for tensor in arguments_of((args, kwargs)):
            if isinstance(tensor, Tracked):
                tensor.origin.applied = True
        watch.applying += 1
        try:
            return apply.__get__(None, kind)(*args, **kwargs)
        finally:
            watch.applying -= 1

    torch.autograd.Function.apply = classmethod(noticed)
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply


class OwnState:
    """What modules outside the layers keep: every stage that runs the code there would change it.

    With ``metrics``, what these are bound to counts too; what they count never does.
    """

    def __init__(self, target: nn.Module, tree: Tree, *, metrics: bool) -> None:
        held = {part for layer in tree.layers for part in layer.modules()}
        outside = [module for module in target.modules() if module not in held]
        self._modules = [module for module in outside if not is_metric(module)]
        self._holders = outside if metrics else self._modules
        self._buffers = [
            (module, name, buffer, buffer._version)
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._before, self._others = self._numbers(), self._things()

    def rebound(self) -> bool:
        """Return whether attributes were bound to something else, or lists and dictionaries among them have grown."""
        return self._things() != self._others

    def changed(self, again: Callable[[], object] | None) -> list[Place]:
        """Return what has changed, and would change once more if the network were called ``again``, if it may be."""
        found: list[Place] = [(at[0], at[1]) for at in self._buffers if _rewritten(*at)]
        after = self._numbers()
        if again is None:
            found += [place for place, value in after.items() if value != self._before.get(place, value)]
        elif after != self._before:
            again()
            found += [place for place, value in self._numbers().items() if value != after.get(place, value)]
        return found

    def _numbers(self) -> dict[Place, float]:
        return {
            (module, name): value
            for module in self._modules
            for name, value in vars(module).items()
            if type(value) in (int, float)
        }

    def _things(self) -> dict[Place, tuple[int, int]]:
        return {
            (module, name): (id(value), len(value) if type(value) in (list, dict, set, deque) else 0)
            for module in self._holders
            for name, value in vars(module).items()
        }


def _rewritten(module: nn.Module, name: str, before: Tensor, version: int) -> bool:
    now = module._buffers.get(name)
    if now is before:
        return before._version != version
    # What is not saved may be made anew, longer than before, as tables of positions are.
    return isinstance(now, Tracked) or name not in module._non_persistent_buffers_set


class Functions(TorchFunctionMode):
    """Counts the torch functions that the code between the layers calls."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        watch = self._watch
        if watch.busy:
            return func(*args, **(kwargs or {}))
        # A copy of a tensor is an empty one at first, whose shape then changes.
        watch.busy = func is Tensor.__deepcopy__
        result = func(*args, **(kwargs or {}))
        watch.busy = True
        watch.computed(result)
        watch.busy = False
        return result


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows random tensors that the code between the layers makes."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._watch.draws_torch |= draws(func) and not self._watch.busy
        if self._watch.busy or not isinstance(result, Tensor) or isinstance(result, Tracked):
            return result
        if draws(func) and not func._schema.is_mutable:
            return self._watch.drawn(result)
        return self._watch.made_empty(result) if func in _EMPTY and result.numel() else result


_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
}


def library_state() -> Any:
    """Return what Python and NumPy will draw next."""
    numpy: Any = np.random.get_state(legacy=False)
    return random.getstate(), numpy["state"]["pos"], numpy["state"]["key"].tobytes()


def held_tensors(layer: nn.Module) -> dict[tuple[nn.Module, str], int]:
    """Return which tensors the modules in a layer have in attributes."""
    return {
        (module, name): id(value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def followed_attributes(layer: nn.Module) -> list[tuple[nn.Module, str, Tracked]]:
    """Return the followed tensors that the modules in a layer have in attributes."""
    return [
        (module, name, value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tracked)
    ]


def new_tensors(layer: nn.Module, before: dict[tuple[nn.Module, str], int]) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the attributes that a call of a layer has bound to another tensor."""
    return [
        (module, name, value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not isinstance(value, Tracked) and before.get((module, name)) != id(value)
    ]
