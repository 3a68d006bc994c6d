"""Both executions against the reference: one process bit for bit, K processes to 1e-12, in float64 on the CPU."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch

from lightning_ddg import DDGStrategy
from tests import reference
from tests.harness import run_ranks
from tests.networks import (
    OPTIMIZERS,
    Classifier,
    ManualClassifier,
    largest_difference,
    loader,
    quiet_trainer,
    seeded_network,
    state_of,
)

EPOCHS = 3
STARTS = {1: [], 2: [3], 3: [2, 5], 4: [1, 3, 5]}
PAIRS = [
    *itertools.product(["mlp"], OPTIMIZERS, ["epoch", "fit", "never"]),
    *itertools.product(["convnet", "transformer"], ["nesterov", "adamw_fused"], ["epoch"]),
    ("convnet", "adam", "never"),
    ("transformer", "sgd", "fit"),
]


def strategy(num_stages: int, drain: str = "epoch") -> DDGStrategy:
    return DDGStrategy(
        num_stages=num_stages,
        split_points=[f"net.{start}" for start in STARTS[num_stages]],
        drain=drain,  # type: ignore[arg-type]
    )


def expected(network: str, optimizer: str, drain: str, num_stages: int) -> dict[str, torch.Tensor]:
    net = seeded_network(network)
    assert isinstance(net, torch.nn.Sequential)
    reference.train(
        net,
        reference.flat_stages(net, STARTS[num_stages]),
        [list(loader(network))] * EPOCHS,
        OPTIMIZERS[optimizer],
        lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.8),
        drain,
    )
    return {f"net.{name}": tensor for name, tensor in state_of(net).items()}


def fit(network: str, optimizer: str, drain: str, num_stages: int, devices: int, manual: bool = False) -> Any:
    warnings.simplefilter("ignore")
    module = (ManualClassifier if manual else Classifier)(network, optimizer)
    trainer = quiet_trainer(devices=devices, strategy=strategy(num_stages, drain), max_epochs=EPOCHS)
    trainer.fit(module, loader(network))
    return state_of(module)


def fit_all(cases: list[tuple[str, str, str]], num_stages: int, manual: bool) -> list[Any]:
    return [fit(*case, num_stages, devices=num_stages, manual=manual) for case in cases]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize(("network", "optimizer", "drain"), PAIRS)
def test_one_process_equals_the_reference_exactly(network: str, optimizer: str, drain: str, num_stages: int) -> None:
    got = fit(network, optimizer, drain, num_stages, devices=1)
    assert largest_difference(got, expected(network, optimizer, drain, num_stages)) == 0.0


@pytest.mark.parametrize("num_stages", [pytest.param(2, marks=pytest.mark.slow), 3, 4])
def test_processes_equal_the_reference(num_stages: int) -> None:
    ranks = run_ranks(fit_all, num_stages, PAIRS, num_stages, False, timeout=240)
    for index, case in enumerate(PAIRS):
        wanted = expected(*case, num_stages)
        for states in ranks:
            assert largest_difference(states[index], wanted) <= 1e-12, case


MANUAL = [("mlp", "nesterov", "epoch"), ("convnet", "adamw_fused", "never"), ("transformer", "adam", "fit")]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_manual_optimization_in_one_process_equals_the_reference_exactly(num_stages: int) -> None:
    for case in MANUAL:
        got = fit(*case, num_stages, devices=1, manual=True)
        assert largest_difference(got, expected(*case, num_stages)) == 0.0, case


@pytest.mark.parametrize("num_stages", [2, 3])
def test_manual_optimization_in_processes_equals_the_reference(num_stages: int) -> None:
    ranks = run_ranks(fit_all, num_stages, MANUAL, num_stages, True)
    for index, case in enumerate(MANUAL):
        for states in ranks:
            assert largest_difference(states[index], expected(*case, num_stages)) <= 1e-12, case


def test_delay_changes_the_weights() -> None:
    """The comparison above could not tell if all of them were plain backprop."""
    plain = expected("mlp", "nesterov", "epoch", 1)
    for num_stages in (2, 3, 4):
        assert largest_difference(plain, expected("mlp", "nesterov", "epoch", num_stages)) > 1e-6


def fit_with_dropout(num_stages: int, devices: int, seed: int) -> Any:
    import lightning.pytorch as pl

    warnings.simplefilter("ignore")
    pl.seed_everything(seed)
    module = Classifier("dropout_mlp", "nesterov")
    quiet_trainer(devices=devices, strategy=strategy(num_stages)).fit(module, loader("dropout_mlp"))
    return state_of(module)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_dropout_repeats_itself_and_is_the_same_in_both_executions(num_stages: int) -> None:
    alone = fit_with_dropout(num_stages, 1, 5)
    assert largest_difference(alone, fit_with_dropout(num_stages, 1, 5)) == 0.0
    assert largest_difference(alone, fit_with_dropout(num_stages, 1, 6)) > 1e-6
    first = run_ranks(fit_with_dropout, num_stages, num_stages, num_stages, 5)
    again = run_ranks(fit_with_dropout, num_stages, num_stages, num_stages, 5)
    for got, repeated in zip(first, again, strict=True):
        assert largest_difference(got, repeated) == 0.0
        assert largest_difference(got, alone) <= 1e-12
