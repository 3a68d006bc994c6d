"""Tensors of other stages: what stands for them in a stage's run, and what is said where their values are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ddg.core.tensors import TensorSpec, allocate
from lightning_ddg.network.replay.code import Code
from lightning_ddg.network.replay.tracked import Tracked

_MOST_SHAPES = 4096


class Origin(NamedTuple):
    """Where an absent tensor comes from, in words, and whether from a later stage."""

    what: str
    later: bool = False

    def __str__(self) -> str:
        return self.what


class StageOver(BaseException):
    """Ends the run of a stage: what follows belongs to later ones."""

    def __init__(self, absent: Absent) -> None:
        super().__init__()
        self.absent = absent


class Absent:
    """Makes tensors without values, and refuses what would need these; the ledger of them.

    Args:
        code: What runs, for messages.
        stage: The name of the stage's first layer.

    Attributes:
        remedy: What to do about what no stage can know, for messages.
        running: Whether the stage runs.
        over: Whether the stage's own calls are all made, so that what needs a value now ends its run.
    """

    def __init__(self, code: Code, stage: str) -> None:
        self._code = code.label
        self.remedy = code.remedy
        self._stage = stage
        self.running = self.over = False
        self._inside: str | None = None
        self._shapes: dict[Any, Any] = {}

    def tensor(self, spec: TensorSpec, device: torch.device, what: str, later: bool = False) -> Tracked:
        """Return what stands for a tensor, on a device, from ``what``."""
        return Tracked(allocate(spec, "meta"), device, self, Origin(what, later))

    @contextmanager
    def inside(self, layer: str) -> Iterator[None]:
        """Refuse any use inside: a layer that runs here has real arguments only."""
        outer, self._inside = self._inside, layer
        try:
            yield
        finally:
            self._inside = outer

    def present(self, tensor: Tensor, where: str) -> Tensor:
        """Return the tensor that one stands for, or itself; raise a RuntimeError if it is not known here."""
        if not isinstance(tensor, Tracked):
            return tensor
        if tensor.value is None:
            raise self._unknown(tensor, where)
        return tensor.value

    def made(self, func: Any, operands: Sequence[Tracked]) -> Any:
        """See :class:`~lightning_ddg.network.replay.tracked.Ledger`."""
        if self._inside is not None:
            raise self._unknown(operands[0], f"the layer {self._inside!r}")
        if not self.running:
            raise self.error(
                f"has left {operands[0].origin} where it is used after the call, as a hook may keep it, but it has no"
                f" values in the stage of {self._stage!r}. Return it from the network's forward and use that, or train"
                " in one process (`devices=1`)."
            )
        return next((tensor.origin for tensor in operands if tensor.origin.later), operands[0].origin)

    def written(self, func: Any, operands: Sequence[Tracked], into: Sequence[Tracked]) -> None:
        """See :class:`~lightning_ddg.network.replay.tracked.Ledger`."""
        origin = self.made(func, operands)
        for tensor in into:
            tensor.origin = origin

    def plain(self, tensor: Tracked) -> bool:
        """See :class:`~lightning_ddg.network.replay.tracked.Ledger`."""
        return False

    def read(self, tensor: Tracked, operation: str) -> None:
        """See :class:`~lightning_ddg.network.replay.tracked.Ledger`."""
        if self.running and (tensor.origin.later or self.over):
            raise StageOver(self)
        raise self.error(
            f"goes on by the values of {tensor.origin} ({operation}), which is not in the stage of "
            f"{self._stage!r}. {self.remedy}"
        )

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tracked]) -> Any:
        """Look up what an operation has returned on the meta device, which takes a hundred times as long to run it."""
        key = (func, _key(args), _key(kwargs))
        try:
            known = key in self._shapes
        except TypeError:
            # An argument that cannot be looked up.
            return func(*args, **kwargs)
        if not known:
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = func(*args, **kwargs)
        return self._shapes[key]

    def error(self, what: str) -> RuntimeError:
        """Return the error that the network does something."""
        return RuntimeError(f"{self._code} {what}")

    def diverges(self, layer: str) -> RuntimeError:
        """Return the error that the network calls a layer, but did not in the stage before."""
        return self.error(
            f"took another way in the stage of {self._stage!r} than in the one before, at the call of {layer!r}: "
            "between its layers it must not draw random numbers, count its calls, or go by what only one process "
            f"knows. {self.remedy}"
        )

    def refuse_gradient(self, grad: Tensor) -> None:
        """Called when a gradient arrives at an absent tensor, and could go no further."""
        raise self.error(
            f"passes an argument of {self._stage!r} to an autograd function outside of its layers, through which no "
            f"gradient can be sent to the stage before. {self.remedy}"
        )

    def _unknown(self, tensor: Tracked, where: str) -> RuntimeError:
        return self.error(
            f"passes on a value that the stage of {self._stage!r} does not have: in {where}, a tensor of "
            f"shape {tuple(tensor.shape)} comes from {tensor.origin}, which is in another stage, and is no "
            f"argument of {self._stage!r}. {self.remedy}"
        )


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    # True, 1 and 1.0 are one key, but not one argument.
    return type(value), value
