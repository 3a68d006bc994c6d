"""Frozen copies of the network's layers outside it, as a mean teacher is; what counts as one may be changed here.

A process has the current weights of its own stage only. A copy that is updated by hand while training would follow
weights of the other stages that have long moved on, and nothing would look wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


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
        self._watched: list[tuple[Tensor, str, str, int]] = [
            (copy, copy_name, name, stage)
            for copy_name, copy in root.named_parameters()
            if id(copy) not in inside and not copy.requires_grad
            for ending, name, shape, stage in originals
            if copy_name.endswith(ending) and copy.shape == shape
        ]
        self._versions: list[int] = []

    def mark(self) -> None:
        """Notes what the copies are now."""
        self._versions = [copy._version for copy, _, _, _ in self._watched]

    def check(self) -> None:
        """Refuses a copy that has changed since :meth:`mark`.

        Raises:
            RuntimeError: Naming the copy, its original and the stage that trains it.
        """
        for version, (copy, copy_name, name, stage) in zip(self._versions, self._watched, strict=True):
            if copy._version != version:
                raise RuntimeError(
                    f"The frozen parameter {copy_name!r} changes while training. It is a copy of {name!r}, whose"
                    f" current values are on stage {stage}, in another process, so that it would follow old ones."
                    " Train in one process (`devices=1`), or, if the average is for evaluation only, use Lightning's"
                    " `WeightAveraging` callback."
                )
