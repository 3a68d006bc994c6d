"""Copies of the network's layers outside it, as a mean teacher is.

A process has the current weights of its own stage only. A copy that is updated by hand while training would follow
weights of the other stages that have long moved on, and nothing would look wrong.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_ddg.plugin.ownership import Ownership

# Batches after which values are looked at: so many at first, since most copies follow from the first batch on.
_LOOKS = 16
_EVERY = 64
_VALUES = 64


class _State(NamedTuple):
    """What shows that a tensor was changed, whichever way: its version, its memory and some of its values.

    Of a parameter of the network itself only the values: its memory changes where its old weights are kept.
    """

    version: int
    memory: int
    values: tuple[float, ...] | None

    @classmethod
    def of(cls, tensor: Tensor, look: bool, inside: bool) -> _State:
        values = None
        if look:
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // _VALUES)]
            values = tuple(torch.nan_to_num(torch.view_as_real(some) if some.is_complex() else some).flatten().tolist())
        return cls(0, 0, values) if inside else cls(tensor._version, tensor.data_ptr(), values)


class NotesGradient:
    """A hook that notes that a parameter has got a gradient, and does nothing else."""

    def __init__(self, trained: set[int]) -> None:
        self._trained = trained

    def __call__(self, parameter: Tensor) -> None:
        self._trained.add(id(parameter))


class StaleCopies:
    """The copies of layers that other processes train, on the rank whose training step may use them.

    Args:
        target: The network inside the LightningModule, or that itself.
        ownership: Whose tensor is whose.
    """

    def __init__(self, target: nn.Module, ownership: Ownership) -> None:
        named = dict(ownership.root.named_parameters())
        names = {parameter: name for name, parameter in named.items()}
        self._inside = set(target.parameters())
        originals: dict[str, list[str]] = defaultdict(list)
        for inner, parameter in target.named_parameters():
            if parameter.requires_grad and ownership.stage_of(parameter) != ownership.stage:
                for likeness in (inner, *_with_one_name_left_out(names[parameter])):
                    originals[likeness].append(names[parameter])
        self._watched = [
            (copy, copy_name, name, ownership.stage_of(named[name]))
            for copy_name, copy in named.items()
            if ownership.stage == ownership.stage_of(copy)
            for likeness in (*_endings(copy_name), *_with_one_name_left_out(copy_name))
            for name in originals.get(likeness, ())
            if copy.shape == named[name].shape
        ]
        # Those that get gradients are layers in their own right, of a shape and a name that are the same by chance.
        self._trained: set[int] = set()
        self._handles = [
            copy.register_post_accumulate_grad_hook(NotesGradient(self._trained))  # type: ignore[no-untyped-call]
            for copy in dict.fromkeys(copy for copy, _, _, _ in self._watched)
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
        self._watched = [one for one in self._watched if id(one[0]) not in self._trained]
        self._before = [_State.of(copy, look, copy in self._inside) for copy, _, _, _ in self._watched]

    def check(self) -> None:
        """Refuse a copy that has changed since :meth:`mark`.

        Raises:
            RuntimeError: Naming the copy, its original and the stage that trains it.
        """
        for before, (copy, copy_name, name, stage) in zip(self._before, self._watched, strict=True):
            trained = copy.grad is not None or id(copy) in self._trained
            if not trained and before != _State.of(copy, before.values is not None, copy in self._inside):
                raise RuntimeError(
                    f"The parameter {copy_name!r} changes without a gradient. It is a copy of {name!r}, whose"
                    f" current values are on stage {stage}, in another process, so that it would follow old ones."
                    " Train in one process (`devices=1`), or, if the average is for evaluation only, use Lightning's"
                    " `WeightAveraging` callback."
                )


def _endings(name: str) -> list[str]:
    """Return the ends of a parameter's name that can be the name of another one inside a network."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(1, len(parts))]


def _with_one_name_left_out(name: str) -> list[str]:
    """Return what a parameter's name and its copy's have in common: ``net.target.0.bias``, ``net.backbone.0.bias``.

    What differs in a number is another layer of a list.
    """
    parts = name.split(".")
    return [".".join([*parts[:at], "*", *parts[at + 1 :]]) for at, part in enumerate(parts[:-1]) if not part.isdigit()]
