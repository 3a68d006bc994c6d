"""Tests of ``mixin.py``: what a module may ask, and that nothing changes under other strategies.

K processes are in ``integration/test_refusals.py``.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_ddg import DDGMixin, DDGStrategy
from lightning_ddg.plugin.mixin import DDGInfo
from tests.networks import Classifier, ManualClassifier, largest_difference, loader, quiet_trainer, state_of


class Plain(DDGMixin, Classifier):
    pass


class ByStep(DDGMixin, ManualClassifier):
    """The manual twin, its three lines replaced by `ddg_step`."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        self.ddg_step(nn.functional.cross_entropy(self(x), y))
        scheduler = self.lr_schedulers()
        scheduler.step()  # type: ignore[union-attr]


def test_a_module_without_a_trainer_has_one_stage() -> None:
    assert Plain().ddg == DDGInfo(stage=1, num_stages=1, delay=0)
    assert Plain().configure_stages() is None


def test_a_module_under_another_strategy_has_one_stage() -> None:
    module = Plain()
    module.trainer = quiet_trainer(devices=1)
    assert module.ddg == DDGInfo(stage=1, num_stages=1, delay=0)


def test_one_process_runs_all_stages() -> None:
    module = Plain()
    module.trainer = quiet_trainer(devices=1, strategy=DDGStrategy(num_stages=3))
    assert module.ddg == DDGInfo(stage=None, num_stages=3, delay=None)


def test_what_is_told_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Plain().ddg.delay = 3  # type: ignore[misc]


def fit(module: pl.LightningModule, strategy: Any) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_trainer(devices=1, strategy=strategy, max_epochs=2).fit(module, loader("mlp"))
    return state_of(module)


@pytest.mark.parametrize("stages", [1, 3])
def test_ddg_step_is_the_three_lines(stages: int) -> None:
    def strategy() -> Any:
        return "auto" if stages == 1 else DDGStrategy(split_points=["net.2", "net.5"])

    by_step = fit(ByStep("mlp", "nesterov"), strategy())
    by_hand = fit(ManualClassifier("mlp", "nesterov"), strategy())
    assert largest_difference(by_step, by_hand) == 0.0
    assert largest_difference(by_step, state_of(ByStep("mlp", "nesterov"))) > 1e-6


class TwoOptimizers(ByStep):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[:3].parameters(), lr=0.1), torch.optim.Adam(self.net[3:].parameters())]


def test_ddg_step_with_several_optimizers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"one optimizer, but TwoOptimizers has 2. Return a single optimizer"):
        fit(TwoOptimizers(), "auto")


class OneInAList(ByStep):
    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        return [configured["optimizer"]], [configured["lr_scheduler"]]


def test_one_optimizer_in_a_list_is_one() -> None:
    assert largest_difference(fit(OneInAList(), "auto"), fit(ByStep(), "auto")) == 0.0
