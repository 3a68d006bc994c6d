"""Batches in micro-batches against the oracle, and what Lightning and the user see of a batch; both executions."""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ddg import DDGStrategy, Staleness
from tests import reference
from tests.harness import run_ranks
from tests.integration.test_exact import STARTS
from tests.networks import (
    OPTIMIZERS,
    Classifier,
    largest_difference,
    loader,
    quiet_trainer,
    seeded_network,
    state_of,
)

EPOCHS = 2

Case = dict[str, Any]
# 22 samples in batches of 5, the last of 2: with 3 or 4 micro-batches sizes differ, and the last batch has fewer.
CASES: list[Case] = [
    *({"micro": m, "optimizer": o, "drain": d} for m, (o, d) in itertools.product(
        (2, 3, 5), [("nesterov", "epoch"), ("adamw_fused", "fit"), ("adam", "never")]
    )),
    {"network": "convnet", "micro": 2, "optimizer": "adamw_fused", "drain": "epoch"},
    {"network": "transformer", "micro": 4, "optimizer": "nesterov", "drain": "fit"},
    {"micro": 3, "optimizer": "nesterov", "drain": "epoch", "accumulate": 2},
    {"micro": 2, "optimizer": "adam", "drain": "never", "accumulate": 3},
    {"micro": 3, "optimizer": "nesterov", "drain": "epoch", "clip": ("norm", 0.3)},
    {"micro": 3, "optimizer": "sgd", "drain": "fit", "clip": ("value", 0.01), "accumulate": 2},
]  # fmt: skip


def fit(
    num_stages: int,
    devices: int,
    micro: int | str = 1,
    optimizer: str = "nesterov",
    drain: str = "epoch",
    network: str = "mlp",
    accumulate: int = 1,
    clip: tuple[str, float] | None = None,
    make: type[Classifier] = Classifier,
    options: Case | None = None,
    **trainer: Any,
) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    module = make(network, optimizer)
    strategy = DDGStrategy(
        num_stages,
        [f"net.{start}" for start in STARTS[num_stages]],
        drain=drain,  # type: ignore[arg-type]
        micro_batches=micro,  # type: ignore[arg-type]
        **(options or {}),
    )
    clipping = {} if clip is None else {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    given = {"max_epochs": EPOCHS, "accumulate_grad_batches": accumulate, **clipping, **trainer}
    quiet_trainer(devices=devices, strategy=strategy, **given).fit(module, loader(network))
    return state_of(module)


def clipping(how: str, most: float) -> Any:
    if how == "norm":
        return partial(nn.utils.clip_grad_norm_, max_norm=most)
    return partial(nn.utils.clip_grad_value_, clip_value=most)


def expected(num_stages: int, case: Case) -> dict[str, Tensor]:
    net = seeded_network(case.get("network", "mlp"))
    assert isinstance(net, nn.Sequential)
    reference.train(
        net,
        reference.flat_stages(net, STARTS[num_stages]),
        [list(loader(case.get("network", "mlp")))] * EPOCHS,
        OPTIMIZERS[case["optimizer"]],
        lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.8),
        case["drain"],
        micro_batches=case["micro"],
        accumulate=case.get("accumulate", 1),
        clip=clipping(*case["clip"]) if "clip" in case else None,
    )
    return {f"net.{name}": tensor for name, tensor in state_of(net).items()}


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process_equals_the_oracle(case: Case, num_stages: int) -> None:
    got = fit(num_stages, 1, **case)
    # Accumulation adds up what a batch has added up.
    tolerance = 0.0 if case.get("accumulate", 1) == 1 else 1e-12
    assert largest_difference(got, expected(num_stages, case)) <= tolerance


def fit_all(num_stages: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    return [fit(num_stages, num_stages, **case) for case in cases]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_processes_equal_the_oracle(num_stages: int) -> None:
    for states in run_ranks(fit_all, num_stages, num_stages, CASES, timeout=240):
        for got, case in zip(states, CASES, strict=True):
            assert largest_difference(got, expected(num_stages, case)) <= 1e-12, case


def test_the_oracle_tells_micro_batches_from_batches() -> None:
    case = {"micro": 1, "optimizer": "nesterov", "drain": "epoch"}
    whole = expected(4, case)
    for micro in (2, 3, 5):
        assert largest_difference(whole, expected(4, {**case, "micro": micro})) > 1e-6
