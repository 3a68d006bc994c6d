"""Copies of the network's layers outside it, as a mean teacher is.

A process has the current weights of its own stage only. A copy that is updated by hand while training would follow
weights of the other stages that have long moved on, and nothing would look wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_ddg.plugin.ownership import Ownership

# Batches after which values are looked at: so many at first, since most copies follow from the first batch on.
_LOOKS = 16
_EVERY = 64
_VALUES = 64


class _State(NamedTuple):
    """What shows that a tensor was changed, whichever way: its version, its memory and some of its values."""

    version: int
    memory: int
    values: tuple[float, ...] | None

    @classmethod
    def of(cls, tensor: Tensor, look: bool) -> _State:
        values = None
        if look:
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _VALUES)]
            values = tuple(torch.nan_to_num(torch.view_as_real(some) if some.is_complex() else some).flatten().tolist())
        return cls(tensor._version, tensor.data_ptr(), values)


class StaleCopies:
    """The copies of layers that other processes train, on the rank whose training step may use them.

    Args:
        target: The network inside the LightningModule, or that itself.
        ownership: Whose tensor is whose.
    """

    def __init__(self, target: nn.Module, ownership: Ownership) -> None:
        named = list(ownership.root.named_parameters())
        inside = {parameter: f".{name}" for name, parameter in target.named_parameters()}
        if target is ownership.root:
            # What has a name of its own before the same name may be a copy.
            inside = {parameter: f".{name.partition('.')[2]}" for name, parameter in named if parameter.requires_grad}
        self._watched = [
            (copy, copy_name, name, ownership.stage_of(original))
            for copy_name, copy in named
            if ownership.stage == ownership.stage_of(copy) and copy not in inside
            for name, original in named
            if original in inside and ownership.stage_of(original) != ownership.stage
            if copy_name.endswith(inside[original]) and copy.shape == original.shape
        ]
        # Those that get gradients are layers in their own right, of a shape and a name that are the same by chance.
        self._trained: set[int] = set()
        self._handles = [
            copy.register_post_accumulate_grad_hook(lambda copy: self._trained.add(id(copy)))  # type: ignore[no-untyped-call]
            for copy, _, _, _ in self._watched
            if copy.requires_grad
        ]
        self._marks = 0
        self._before: list[_State] = []

    def forget(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def mark(self, look: bool = False) -> None:
        """Note what the copies are now.

        Args:
            look: Whether to look at values in any case. An update by ``.data`` is seen from them alone, but on a GPU
                that takes time, so that they are not looked at in every batch.
        """
        look |= self._marks < _LOOKS or self._marks % _EVERY == 0
        self._marks += 1
        self._before = [_State.of(copy, look) for copy, _, _, _ in self._watched]

    def check(self) -> None:
        """Refuse a copy that has changed since :meth:`mark`.

        Raises:
            RuntimeError: Naming the copy, its original and the stage that trains it.
        """
        for before, (copy, copy_name, name, stage) in zip(self._before, self._watched, strict=True):
            if id(copy) not in self._trained and before != _State.of(copy, before.values is not None):
                raise RuntimeError(
                    f"The parameter {copy_name!r} changes without a gradient. It is a copy of {name!r}, whose"
                    f" current values are on stage {stage}, in another process, so that it would follow old ones."
                    " Train in one process (`devices=1`), or, if the average is for evaluation only, use Lightning's"
                    " `WeightAveraging` callback."
                )
