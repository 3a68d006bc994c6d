"""Copies of the network's layers outside it, as a mean teacher is; what counts as one may be changed here.

A process has the current weights of its own stage only. A copy that is updated by hand while training would follow
weights of the other stages that have long moved on, and nothing would look wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

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


class Followers:
    """The copies, on the rank whose training step may use them.

    Args:
        root: The LightningModule.
        target: The network inside it.
        foreign: Parameters of the network that other processes train, with their stage.
    """

    def __init__(self, root: nn.Module, target: nn.Module, foreign: Iterable[tuple[nn.Parameter, int]]) -> None:
        stage_of = {id(parameter): stage for parameter, stage in foreign}
        names = {id(parameter): name for name, parameter in root.named_parameters()}
        inside = {id(parameter) for parameter in target.parameters()}
        originals = [
            (f".{name}", names[id(parameter)], parameter.shape, stage_of[id(parameter)])
            for name, parameter in target.named_parameters()
            if id(parameter) in stage_of
        ]
        self._watched: list[tuple[nn.Parameter, str, str, int]] = [
            (copy, copy_name, name, stage)
            for copy_name, copy in root.named_parameters()
            if id(copy) not in inside
            for ending, name, shape, stage in originals
            if copy_name.endswith(ending) and copy.shape == shape
        ]
        # Those that get gradients are layers in their own right, of a shape and a name that are the same by chance.
        self._trained: set[int] = set()
        copies = [copy for copy, _, _, _ in self._watched if copy.requires_grad]
        self._handles = [
            copy.register_post_accumulate_grad_hook(lambda copy: self._trained.add(id(copy)))  # type: ignore[no-untyped-call]
            for copy in copies
        ]
        self._marks = 0
        self._before: list[_State] = []

    def forget(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    def mark(self, look: bool = False) -> None:
        """Notes what the copies are now.

        Args:
            look: Whether to look at values in any case. An update by ``.data`` is seen from them alone, but on a GPU
                that takes time, so that they are not looked at in every batch.
        """
        look |= self._marks < _LOOKS or self._marks % _EVERY == 0
        self._marks += 1
        self._before = [_State.of(copy, look) for copy, _, _, _ in self._watched]

    def check(self) -> None:
        """Refuses a copy that has changed since :meth:`mark`.

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
