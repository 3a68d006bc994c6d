"""DDGMixin: what a LightningModule may say about its own decoupling, and ask about it.

A module without it works whenever its network can be found and cut automatically. The mixin sets nothing and changes
nothing, so that the same module trains under every other strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_ddg.plugin import compat
from lightning_ddg.plugin.host import LightningModule
from lightning_ddg.plugin.strategy import DDGStrategy


@dataclass(frozen=True)
class DDGInfo:
    """Where this process stands in the decoupling.

    Attributes:
        stage: Stage ``1..K`` of this process, input side first; ``None`` if it runs all stages.
        num_stages: ``K``; 1 under any other strategy.
        delay: Delay of this process's stage in batches, ``K - stage`` without slack; 0 under any other strategy,
            ``None`` if the process runs all stages.
    """

    stage: int | None
    num_stages: int
    delay: int | None


class DDGMixin:
    """Mix into a LightningModule, before it: ``class Net(DDGMixin, LightningModule)``."""

    def configure_stages(self) -> Sequence[nn.Module] | None:
        """The ordered layers of the network, between any two of which it may be cut.

        Each layer takes what the one before it returns. Override it where the code cannot be run in parts; its
        ``forward`` must do the same as calling the layers one after the other.

        Returns:
            The layers, or ``None`` to let the strategy find them.
        """
        return None

    @property
    def ddg(self) -> DDGInfo:
        """This process's stage, the number of stages and its delay."""
        trainer = compat.trainer_of(self)
        strategy = None if trainer is None else trainer.strategy
        if not isinstance(strategy, DDGStrategy):
            return DDGInfo(stage=1, num_stages=1, delay=0)
        return DDGInfo(strategy.stage, strategy.num_stages, strategy.delay)

    def ddg_step(self: LightningModule, loss: Tensor) -> None:  # type: ignore[misc]
        """A whole stale-gradient update in manual optimization: clear the gradients, backward, step.

        Args:
            loss: The scalar loss of this batch.

        Raises:
            TypeError: If the module has several optimizers.
        """
        optimizer = self.optimizers()
        if isinstance(optimizer, list):
            raise TypeError(
                f"`ddg_step` updates with one optimizer, but {type(self).__name__} has {len(optimizer)}. Return a"
                " single optimizer (with parameter groups, if need be) from `configure_optimizers`."
            )
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
