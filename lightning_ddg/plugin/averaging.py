"""The mean over replicas: each stage applies the mean of the gradients that the replicas of it have of their batches.

It is taken once the gradients of a step are complete, before any hook looks at them and before they are clipped::

    automatic    after the backward of a batch that a step follows, not of those that are accumulated for it
    manual       after each backward, which comes to the same: the mean of a sum is the sum of the means
    drain        after the backwards of a step

All replicas of a stage are at the same iteration then, with the same delay, so that all have as many steps.
"""

from __future__ import annotations

import torch

from lightning_ddg.plugin import compat
from lightning_ddg.plugin.ownership import Ownership
from lightning_ddg.plugin.site import Site


class Averaging:
    """Takes the mean of this process's gradients over the replicas; does nothing where there is one.

    Args:
        site: What the run is built of.
        ownership: Whose parameter is whose.
    """

    def __init__(self, site: Site, ownership: Ownership) -> None:
        self._site, self._replicas = site, site.ranks.replicas
        owned = set(ownership.own_parameters) if self._replicas.size > 1 else set()
        self._named = [(name, one) for name, one in site.module.named_parameters() if one in owned]

    def after_backward(self) -> None:
        """Called after the backwards of each batch: take the mean, unless more is to be added before a step."""
        if self._replicas.size > 1:
            automatic = self._site.module.automatic_optimization
            if not automatic or not compat.accumulates(self._site.trainer):
                self.now()

    def now(self) -> None:
        """Take the mean; every replica of this stage must call it.

        Raises:
            ValueError: For a sparse gradient.
        """
        if self._replicas.size == 1:
            return
        for name, parameter in self._named:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise ValueError(
                    f"The gradient of {name!r} is sparse, of which {self._replicas.size} replicas cannot take the mean."
                    " Give the layer `sparse=False`, or let `num_stages` be the number of devices."
                )
        self._replicas.mean_gradients([parameter for _, parameter in self._named])
