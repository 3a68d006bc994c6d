"""A module's parameters and buffers as they travel between ranks: by name, with what no state dict has marked."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn


def given(module: nn.Module, names: Collection[str]) -> tuple[dict[str, Tensor], set[str]]:
    """Return a module's parameters and buffers of some names, and which of these names no state dict has."""
    named = _tensors_of(module)
    own = {name: named[name].detach() for name in names if name in named}
    return own, {name for name in own if not _is_saved(module, name)}


def adopt(module: nn.Module, values: dict[str, Tensor], hidden: Collection[str]) -> None:
    """Take over what another rank has given: into the tensors of the same names, or as new buffers."""
    named = _tensors_of(module)
    for name, value in values.items():
        if name in named and named[name].shape == value.shape:
            named[name].detach().copy_(value)
        else:
            _add_buffer(module, name, value, saved=name not in hidden)


def renew(module: nn.Module, values: dict[str, Tensor], hidden: Collection[str]) -> None:
    """Put other buffers into the place of those that another rank has with other values.

    They are not written into: backwards of batches in flight may need them as they are.
    """
    own = dict(module.named_buffers())
    slots = [(part._buffers, name) for part in module.modules() for name in part._buffers]
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            _add_buffer(module, name, value, saved=name not in hidden)
        elif not torch.equal(own[name], here := value.to(own[name].device)):
            # One buffer may have several names.
            for table, inner in slots:
                if table[inner] is own[name]:
                    table[inner] = here


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _is_saved(module: nn.Module, name: str) -> bool:
    """Whether a parameter or buffer is part of the state dict."""
    owner, _, own_name = name.rpartition(".")
    return own_name not in module.get_submodule(owner)._non_persistent_buffers_set


def _add_buffer(module: nn.Module, name: str, value: Tensor, *, saved: bool) -> None:
    """Register a buffer that another rank has made, where the rest of its module is."""
    owner, _, own_name = name.rpartition(".")
    part = module.get_submodule(owner)
    near = next((tensor.device for tensor in (*part.parameters(), *part.buffers())), value.device)
    part.register_buffer(own_name, value.to(near, copy=True), persistent=saved)
