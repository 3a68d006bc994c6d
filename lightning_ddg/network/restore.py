"""Put modules back as they were: the one place for it, in small context managers that can be combined.

Measuring and observing a network run the user's code before the training does, which must not be seen afterwards.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ddg.core import rng

#: Of a tensor in an attribute: larger ones, such as a whole data set, are taken not to be written into.
_MOST_ELEMENTS = 1 << 24
_REGISTRIES = frozenset(vars(nn.Module())) - {"training"}
_CONTAINERS = (list, set, dict, deque, OrderedDict, defaultdict)
#: Whose objects a hook may use, but keeps nothing in.
_NOT_KEEPING = frozenset(("builtins", "lightning", "lightning_ddg", "numpy", "pytorch_lightning", "torch"))


@contextmanager
def untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the modules' buffers, their attributes, what their lists and dictionaries hold, and their generators.

    So too modules, such as metrics, that are in these without being registered, and what hooks may have kept elsewhere.
    """
    registered = list(dict.fromkeys(modules))
    found = dict.fromkeys(part for module in registered for held in _unregistered(module) for part in held.modules())
    undo = [function for module in {**dict.fromkeys(registered), **found} for function in _of_module(module)]
    kept = {id(thing): thing for module in registered for hook in hooks_of(module) for thing in reached(hook)}
    undo += [function for thing in kept.values() for function in _things(thing)]
    try:
        yield
    finally:
        with torch.no_grad():
            for function in undo:
                function()


@contextmanager
def trial(modules: Iterable[nn.Module], devices: Iterable[torch.device]) -> Iterator[None]:
    """Let modules run as if they had not: see :func:`untouched`; so do the generators of the CPU and the devices.

    Inference mode is off inside, so that gradients can be computed whatever the caller's mode.
    """
    with ExitStack() as stack:
        for device in (torch.device("cpu"), *devices):
            stack.enter_context(rng.untouched(device))
        stack.enter_context(untouched(modules))
        stack.enter_context(torch.inference_mode(False))
        yield


def gpus_of(modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> list[torch.device]:
    """Return the CUDA devices that hold any of the tensors, or of the modules' parameters and buffers."""
    owned = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sorted({tensor.device for tensor in (*tensors, *owned) if tensor.is_cuda}, key=str)


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Train or evaluate inside; give each submodule its own mode back."""
    before = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


@contextmanager
def trainability_kept(module: nn.Module) -> Iterator[None]:
    """Restore ``requires_grad`` of each parameter, by its place: a parameter may have been exchanged since."""
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in zip(module.parameters(), wanted, strict=True):
            parameter.requires_grad_(requires_grad)


def _buffers(module: nn.Module) -> Callable[[], None]:
    table = module._buffers
    saved = {name: (value, None if value is None else value.detach().clone()) for name, value in table.items()}

    def undo() -> None:
        if isinstance(module, torch.jit.ScriptModule):
            # Its code can do neither.
            for own, kept in saved.values():
                if own is not None and kept is not None:
                    own.copy_(kept)
            return
        # A forward may also have bound another tensor to the name, or added a name.
        table.clear()
        for name, (buffer, value) in saved.items():
            table[name] = buffer
            if buffer is not None and value is not None:
                buffer.copy_(value)

    return undo


def _attributes(module: Any) -> Iterator[Callable[[], object]]:
    held = vars(module)
    before = {name: value for name, value in held.items() if name not in _REGISTRIES}

    def undo() -> None:
        for name in held.keys() - before.keys() - _REGISTRIES:
            del held[name]
        held.update(before)

    yield undo
    for value in before.values():
        if type(value) in _CONTAINERS:
            yield partial(_refill, value, copy.copy(value))
        elif isinstance(value, Tensor) and value.numel() <= _MOST_ELEMENTS:
            yield partial(value.detach().copy_, value.detach().clone())
        elif isinstance(value, np.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())


def _of_module(module: nn.Module) -> Iterator[Callable[[], object]]:
    yield _buffers(module)
    yield from _attributes(module)
    # A module that is built when it is first needed is not there before.
    for table in () if isinstance(module, torch.jit.ScriptModule) else (module._modules, module._parameters):
        yield partial(_refill, table, copy.copy(table))
    yield from (
        partial(_give_back, parameter, parameter.data)
        for parameter in module._parameters.values()
        if parameter is not None
    )


def _give_back(parameter: nn.Parameter, data: Tensor) -> None:
    """Let a parameter have its memory again, where `parameter.data = ...` has given it another."""
    if type(parameter.data) is not type(data) or parameter.data_ptr() != data.data_ptr():
        parameter.data = data


def _unregistered(module: nn.Module) -> Iterator[nn.Module]:
    for name, value in vars(module).items():
        if name not in _REGISTRIES and type(value) in _CONTAINERS:
            items = value.values() if isinstance(value, dict) else value
            yield from (item for item in items if isinstance(item, nn.Module))


def _things(thing: Any) -> Iterator[Callable[[], object]]:
    if type(thing) in _CONTAINERS:
        yield partial(_refill, thing, copy.copy(thing))
    elif hasattr(thing, "__dict__") and type(thing).__module__.partition(".")[0] not in _NOT_KEEPING:
        yield from _attributes(thing)


def hooks_of(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """Yield the hooks that fire around a module's forward and backward."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks):
        yield from hooks.values()


def reached(hook: Any) -> Iterator[Any]:
    """Yield what a hook may keep something in: itself, its object, what it closes over, and global variables."""
    if isinstance(hook, partial):
        yield from (*hook.args, *hook.keywords.values(), *reached(hook.func))
    elif isinstance(hook, MethodType):
        yield from (hook.__self__, *reached(hook.__func__))
    elif isinstance(hook, FunctionType):
        for cell in hook.__closure__ or ():
            with suppress(ValueError):
                yield cell.cell_contents
        yield from (hook.__globals__[name] for name in hook.__code__.co_names if name in hook.__globals__)
    else:
        yield hook


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list | deque) else container.update(content)
