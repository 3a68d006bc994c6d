"""Where networks are cut, and how long their stages take, is measured here with the package's own plan, once a study.

A measured cut depends on the machine and the moment. It is kept in the study's folder, so that all runs of a network in
K stages have the same one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_ddg import DDGStrategy
from lightning_ddg.planning.simulate import Work, simulate
from recipes.study.fit import make_data, make_module, make_trainer
from recipes.study.grid import Recipe, Settings


@dataclass(frozen=True)
class Cut:
    """A network in K stages.

    Attributes:
        split_points: Names of the submodules that begin stages ``2..K``.
        forward: Seconds of each stage's forward.
        backward: Seconds of each stage's backward.
        send: Seconds of the activations from each stage to the next.
        send_grad: Seconds of the gradients back.
    """

    split_points: list[str]
    forward: list[float]
    backward: list[float]
    send: list[float]
    send_grad: list[float]

    def epoch_seconds(self, batches: int, recompute: bool = False) -> float:
        """What an epoch takes on K devices, filling the pipeline and draining it included; with K = 1, by backprop.

        Args:
            batches: Of the epoch.
            recompute: Whether all stages but the last, which has no delay, do each forward again in the backward.
        """
        work = Work(self.forward, self.backward, self.send, self.send_grad)
        return max(event.end for event in simulate(work.recomputed() if recompute else work, batches))


def measure(recipe: Recipe, settings: Settings, stages: list[int], cache: Path) -> dict[int, Cut]:
    """Measures a network on its first batch, and cuts it.

    Args:
        recipe: What is trained.
        settings: The study's.
        stages: The numbers of stages, of which 1 needs no cut.
        cache: The folder for images that have been decoded.

    Raises:
        ValueError: If the network cannot be cut into so many stages.
    """
    torch.set_num_threads(1)
    trainer = make_trainer(settings)
    data = make_data(recipe, settings, cache, seed=0)
    data.setup("fit")
    device = trainer.strategy.root_device
    batch = [tensor.to(device) for tensor in next(iter(data.train_dataloader()))]
    module = make_module(recipe, settings, "backprop", 1).to(device)
    with trainer.precision_plugin.forward_context():
        plan = DDGStrategy.plan(module, batch, stages)
    cuts = {}
    for number, row in plan.rows.items():
        if isinstance(row, str):
            raise ValueError(f"{recipe.network['class_path']} cannot be cut into {number} stages: {row}")
        cuts[number] = Cut(row.split_points, *row.work)
    return cuts


def to_json(cuts: dict[int, Cut]) -> dict[str, Any]:
    """What is kept of the cuts of a network."""
    return {str(number): asdict(cut) for number, cut in cuts.items()}


def from_json(kept: dict[str, Any]) -> dict[int, Cut]:
    """The cuts of a network, as they were kept."""
    return {int(number): Cut(**cut) for number, cut in kept.items()}
