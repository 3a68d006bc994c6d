"""Networks that are no Sequential: both executions against the reference, in float64 on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_ddg import DDGStrategy
from tests import reference
from tests.harness import run_ranks
from tests.networks import (
    OPTIMIZERS,
    Classifier,
    ManualClassifier,
    UNet,
    largest_difference,
    loader,
    quiet_trainer,
    seeded_network,
    state_of,
)

SPLITS = {
    "unet": ["down2.1", "bottom", "up2"],
    "gpt": ["blocks.0.attention.out", "blocks.1", "head"],
    "dropout_gpt": ["blocks.0.attention.out", "blocks.1", "head"],
}


class OwnLayers(Classifier):
    """The layers of the U-Net on the LightningModule itself, and the forward that calls them."""

    def __init__(self, network: str = "unet", optimizer: str = "sgd") -> None:
        super().__init__(network, optimizer)
        net, self.net = self.net, nn.Identity()
        for name, child in net.named_children():
            self.add_module(name, child)

    forward = UNet.forward


KINDS: dict[str, tuple[type[Classifier], str]] = {
    "child": (Classifier, "net."),
    "manual": (ManualClassifier, "net."),
    "own": (OwnLayers, ""),
}
CASES = [
    ("unet", "nesterov", "child"),
    ("unet", "adamw_fused", "own"),
    ("gpt", "adam", "child"),
    ("gpt", "nesterov", "manual"),
]


def expected(network: str, optimizer: str, num_stages: int) -> dict[str, torch.Tensor]:
    net = seeded_network(network)
    order = [name for name, _ in net.named_parameters()]
    # A stage begins with the first parameter of the module that is named; the U-Net and the GPT register in call order.
    starts = [
        next(i for i, n in enumerate(order) if n.startswith(split)) for split in SPLITS[network][: num_stages - 1]
    ]
    parameters = dict(net.named_parameters())
    bounds = [0, *starts, len(order)]
    stages = [[parameters[n] for n in order[a:b]] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    step_lr = lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.8)  # noqa: E731
    reference.train(net, stages, [list(loader(network))] * 2, OPTIMIZERS[optimizer], step_lr, "epoch")
    return state_of(net)


def fit(network: str, optimizer: str, kind: str, num_stages: int, devices: int) -> dict[str, torch.Tensor]:
    warnings.simplefilter("ignore")
    pl.seed_everything(3)
    make, prefix = KINDS[kind]
    module = make(network, optimizer)
    splits = [f"{prefix}{name}" for name in SPLITS[network][: num_stages - 1]]
    strategy = DDGStrategy(num_stages=num_stages, split_points=splits)
    quiet_trainer(devices=devices, strategy=strategy, max_epochs=2).fit(module, loader(network), loader(network))
    return {name.removeprefix(prefix): tensor for name, tensor in state_of(module).items()}


def fit_all(num_stages: int) -> list[Any]:
    return [fit(*case, num_stages, devices=num_stages) for case in CASES]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_one_process_equals_the_reference(case: tuple[str, str, str], num_stages: int) -> None:
    got = fit(*case, num_stages, devices=1)
    assert largest_difference(got, expected(case[0], case[1], num_stages)) == 0.0


@pytest.mark.parametrize(
    "num_stages", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_processes_equal_the_reference(num_stages: int) -> None:
    for states in run_ranks(fit_all, num_stages, num_stages, timeout=240):
        for case, got in zip(CASES, states, strict=True):
            assert largest_difference(got, expected(case[0], case[1], num_stages)) <= 1e-12, case


def test_functional_dropout_is_the_same_in_both_executions() -> None:
    alone = fit("dropout_gpt", "sgd", "child", 3, 1)
    assert largest_difference(alone, fit("gpt", "sgd", "child", 3, 1)) > 1e-6
    for states in run_ranks(fit, 3, "dropout_gpt", "sgd", "child", 3, 3):
        assert largest_difference(states, alone) <= 1e-12


def cut_by_itself(devices: int) -> Any:
    warnings.simplefilter("ignore")
    pl.seed_everything(1)
    module = Classifier("unet")
    strategy = DDGStrategy(num_stages=3)
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=1)
    trainer.fit(module, loader("unet"))
    predicted = trainer.predict(module, loader("unet"))
    return strategy.stage_parameter_names, [p.tolist() for p in predicted or []]


def test_a_network_that_is_no_sequential_is_cut_automatically() -> None:
    for names, predicted in run_ranks(cut_by_itself, 3, 3):
        assert all(names)
        assert sum(names, []) == [f"net.{name}" for name, _ in seeded_network("unet").named_parameters()]
        assert sum(len(p) for p in predicted) == 22
