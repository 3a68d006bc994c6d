"""Several pipelines against the oracle, against one that gets all their batches at once, and against DDP."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ddg import DDGStrategy, Staleness
from lightning_ddg.comm import replicas as comm
from tests import reference
from tests.harness import run_ranks
from tests.integration.test_exact import STARTS
from tests.integration.test_ties import Model as TiedModel
from tests.networks import (
    OPTIMIZERS,
    Classifier,
    ManualClassifier,
    dataset,
    largest_difference,
    quiet_trainer,
    seeded_network,
    state_of,
)

EPOCHS = 2
COUNT = 22
Case = dict[str, Any]


def batches_of(data: Any, replicas: int, epoch: int = 0) -> list[Any]:
    """As many batches at once as there are replicas, each with its share, the last ones smaller."""
    # Lightning shuffles what is trained in shares.
    samplers: list[DistributedSampler[Any]] = [DistributedSampler(data, replicas, number) for number in range(replicas)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(batches) for batches in zip(*(DataLoader(data, 5, sampler=one) for one in samplers), strict=True)]


# ---- the oracle

CASES: list[Case] = [
    {"optimizer": "nesterov", "drain": "epoch"},
    {"optimizer": "adamw_fused", "drain": "fit"},
    {"optimizer": "adam", "drain": "never"},
    {"optimizer": "nesterov", "drain": "epoch", "network": "convnet"},
    {"optimizer": "adamw_fused", "drain": "fit", "accumulate": 2},
    {"optimizer": "nesterov", "drain": "epoch", "clip": ("norm", 0.3)},
    {"optimizer": "nesterov", "drain": "fit", "clip": ("value", 0.02), "accumulate": 2},
    {"optimizer": "nesterov", "drain": "epoch", "micro": 2},
    {"optimizer": "adamw_fused", "drain": "fit", "micro": 3, "accumulate": 2, "options": {"recompute": True}},
    {"optimizer": "nesterov", "drain": "fit", "finish": 4},
    {"optimizer": "nesterov", "drain": "epoch", "skipped": [(1, 0), (3, 1), 4]},
    {"optimizer": "adamw_fused", "drain": "epoch", "manual": True},
    {"optimizer": "nesterov", "drain": "fit", "manual": True, "options": {"recompute": True}},
]


class Skipping(Classifier):
    """Has no loss for some batches, or for those of some replicas."""

    skipped: Any = ()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        now = 3 * self.current_epoch + batch_idx
        strategy: Any = self.trainer.strategy
        loss = super().training_step(batch, batch_idx)
        return None if now in self.skipped or (now, strategy.replica) in self.skipped else loss


def fit(num_stages: int, replicas: int, case: Case) -> dict[str, Tensor]:
    name = case.get("network", "mlp")
    module = (ManualClassifier if case.get("manual") else Skipping)(name, case["optimizer"])
    if isinstance(module, Skipping):
        module.skipped = case.get("skipped", ())
    batches = 2 * len(batches_of(dataset(name, COUNT), replicas))
    strategy = DDGStrategy(
        num_stages,
        [f"net.{start}" for start in STARTS[num_stages]],
        drain=case["drain"],
        micro_batches=case.get("micro", 1),
        staleness=Staleness(finish=1 - case["finish"] / batches if "finish" in case else 0.0),
        **case.get("options", {}),
    )
    how, by = case.get("clip", ("norm", None))
    trainer = quiet_trainer(
        devices=num_stages * replicas,
        strategy=strategy,
        max_epochs=EPOCHS,
        accumulate_grad_batches=case.get("accumulate", 1),
        gradient_clip_val=by,
        gradient_clip_algorithm=how if by else None,
    )
    trainer.fit(module, DataLoader(dataset(name, COUNT), 5))
    return state_of(module)


def fit_all(num_stages: int, replicas: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    warnings.simplefilter("ignore")
    # As if what is averaged were large.
    comm._SMALL_BYTES = 64
    return [fit(num_stages, replicas, case) for case in cases]


def expected(num_stages: int, replicas: int, case: Case) -> dict[str, Tensor]:
    name = case.get("network", "mlp")
    net: Any = seeded_network(name)
    how, by = case.get("clip", ("norm", 0.0))
    clips: Any = {
        "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, by),
        "value": lambda parameters: nn.utils.clip_grad_value_(parameters, by),
    }
    reference.train(
        net,
        reference.flat_stages(net, STARTS[num_stages]),
        [batches_of(dataset(name, COUNT), replicas, epoch) for epoch in range(EPOCHS)],
        OPTIMIZERS[case["optimizer"]],
        lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.8),
        case["drain"],
        case.get("skipped", ()),
        case.get("micro", 1),
        case.get("accumulate", 1),
        clips[how] if "clip" in case else None,
        case.get("finish"),
        replicas,
    )
    return {f"net.{key}": tensor for key, tensor in state_of(net).items()}


def compare(num_stages: int, replicas: int, cases: list[Case]) -> None:
    ranks = run_ranks(fit_all, num_stages * replicas, num_stages, replicas, cases)
    for index, case in enumerate(cases):
        wanted = expected(num_stages, replicas, case)
        for rank, states in enumerate(ranks):
            assert largest_difference(states[index], wanted) <= 1e-11, (rank, case)
            assert largest_difference(states[index], ranks[0][index]) == 0.0, (rank, case)


def test_two_pipelines_apply_the_mean_of_their_delayed_gradients() -> None:
    compare(2, 2, CASES)


@pytest.mark.slow
@pytest.mark.parametrize(("num_stages", "replicas"), [(3, 2), (2, 3)])
def test_wider_ones_do_so_too(num_stages: int, replicas: int) -> None:
    # The convnet's last batch would have one sample on some replicas and BatchNorm.
    finish = [case for case in CASES if "finish" not in case and "skipped" not in case]
    compare(num_stages, replicas, finish)
