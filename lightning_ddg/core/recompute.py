"""A forward run a second time as if it were the first: its inputs, its random draws, its modes and its buffers.

``torch.utils.checkpoint`` restores RNG states and autocast too, but neither modes nor buffers, which d later batches
have changed by then, and it would take the parameters as they are today.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.core.pytree import map_tensors, tensors_of
from lightning_ddg.core.rng import Generators
from lightning_ddg.core.tensors import Slot, parameters_replaced

# Bytes of a buffer that are sooner copied than compared; on a GPU a comparison has to wait for it.
_ALWAYS_COPIED = 1 << 16


class Circumstances:
    """What a forward depends on besides its weights, as it is when this is made.

    The arguments are copied, as the module and its caller may write into them; ``buffers``, those of the module, are
    brought up to date.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], buffers: BufferCopies) -> None:
        self.args, self.kwargs = map_tensors(_copied, (args, kwargs))
        devices = [tensor.device for tensor in (*tensors_of((args, kwargs)), *module.parameters())]
        device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        self._buffers = buffers.current()
        self._training = [(part, part.training) for part in module.modules()]
        self._generators = Generators(device)
        self._dtype = torch.get_default_dtype()
        self._cached = torch.is_autocast_cache_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted({"cpu", device.type})
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put everything back as it was; what the module does to its buffers inside stays without effect."""
        dtype, modes = torch.get_default_dtype(), [(part, part.training) for part, _ in self._training]
        # The forward may write into them, and they may belong to another batch too.
        values = [(slot, None if value is None else value.clone()) for slot, value in self._buffers]
        with ExitStack() as undo:
            undo.enter_context(torch.enable_grad())
            undo.enter_context(self._generators.again())
            undo.enter_context(parameters_replaced(values))
            undo.callback(torch.set_default_dtype, dtype)
            undo.callback(_set_modes, modes)
            for kind, autocast_dtype, enabled in self._autocast:
                undo.enter_context(torch.autocast(kind, autocast_dtype, enabled, self._cached))
            torch.set_default_dtype(self._dtype)
            _set_modes(self._training)
            yield


class BufferCopies:
    """Copies of a module's buffers; large ones are copied anew only when they have changed.

    Whether one has changed is seen from its values: batch norm and `.data` leave the version counter as it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tables = [part._buffers for part in module.modules()]
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def current(self) -> list[tuple[Slot, Tensor | None]]:
        """Return where the buffers are, and copies of what they hold."""
        slots = [(table, name) for table in self._tables for name in table]
        known, self._known = self._known, {}
        found: list[tuple[Slot, Tensor | None]] = []
        for table, name in slots:
            buffer = table[name]
            if buffer is not None and id(buffer) not in self._known:
                original, copy = known.get(id(buffer), (None, buffer))
                large = buffer.numel() * buffer.element_size() > _ALWAYS_COPIED
                if original is not buffer or not large or not torch.equal(copy, buffer):
                    copy = buffer.detach().clone()
                self._known[id(buffer)] = (buffer, copy)
            found.append(((table, name), None if buffer is None else self._known[id(buffer)][1]))
        return found


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training
