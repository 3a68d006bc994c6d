"""Tests of ``plugin/measure.py``: what the layers cost, and that measuring leaves no trace."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from lightning_ddg.core.pytree import map_tensors
from lightning_ddg.network.find import find_network
from lightning_ddg.network.profile import NotTheSame
from lightning_ddg.plugin.measure import call_of_network, copies_kept, first_call, measured_costs
from tests.networks import Classifier, loader, state_of

CPU = torch.device("cpu")


def first(loader: Any) -> Any:
    return next(iter(loader))


def measure(
    module: LightningModule, batch: Any, balance: str = "time", device: torch.device = CPU
) -> list[float] | None:
    def example(target: nn.Module, name: str) -> Any:
        return call_of_network(module, target, name, map_tensors(torch.clone, batch), nullcontext)

    network = find_network(module, example=example)

    def call(device: torch.device) -> Any:
        return first_call(module, network.target, network.target_name, batch, Precision(), device)

    costs = measured_costs(module, network, call, balance, Precision(), device)
    if costs.unit == "parameters":
        return None
    assert costs.unit == {"time": "measured time", "flops": "FLOPs"}[balance]
    assert (costs.model is None) == (balance == "flops")
    return costs.of_layers


class Touching(Classifier):
    """Works on the batch and logs before it calls the network."""

    def __init__(self, network: str = "mlp") -> None:
        super().__init__(network)
        self.net[3].requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("early", batch[0].mean())
        output = self.net(batch[0] + torch.rand_like(batch[0]))
        raise AssertionError("the step ends at the network's call")
        return output


class Counting(nn.Module):
    """Counts its calls and goes by the count, as a layer with a warm-up does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * min(1.0, self.calls / 10)


class Normalised(Classifier):
    """Normalises and mixes before it calls a network with a layer that counts."""

    def __init__(self) -> None:
        super().__init__("mlp")
        self.net.insert(1, Counting())
        self.norm = nn.BatchNorm1d(6).double()
        self.draws = np.random.default_rng(0), random.Random(0), torch.Generator()
        self.numpy, self.python, self.torch = self.draws
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        x = self.norm(batch[0]) * self.numpy.random() * self.python.random()
        return super().training_step((x + torch.rand(6, generator=self.torch), batch[1]), batch_idx)


def test_measuring_leaves_no_trace_outside_the_network_nor_in_its_counters() -> None:
    module = Normalised()
    before = copy.deepcopy((state_of(module), module.numpy.bit_generator.state, module.python.getstate()))
    generator = module.torch.get_state()
    assert measure(module, first(loader("mlp"))) is not None
    state, numpy_state, python_state = before
    assert all(torch.equal(state[name], value) for name, value in state_of(module).items())
    assert (module.numpy.bit_generator.state, module.python.getstate()) == (numpy_state, python_state)
    assert torch.equal(module.torch.get_state(), generator)
    assert (module.steps, module.net[1].calls) == (0, 0)


@pytest.mark.parametrize("balance", ["time", "flops"])
def test_measuring_leaves_no_trace(balance: str) -> None:
    module = Touching("convnet")
    data = first(loader("convnet"))
    before = state_of(module)
    frozen = [parameter.requires_grad for parameter in module.parameters()]
    random_state = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        costs = measure(module, data, balance)
    assert costs is not None
    assert len(costs) == len(module.net)
    assert all(cost > 0 for cost in costs)
    after = state_of(module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in module.parameters()] == frozen
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.training
    assert (random.getstate(), np.random.get_state()[1].tolist()) == random_state  # type: ignore[index]
    assert not {"forward", "log"} & (vars(module).keys() | vars(module.net).keys())


def test_flops_count_the_matrix_products_of_a_batch() -> None:
    costs = measure(Classifier("mlp"), first(loader("mlp")), "flops")
    assert costs is not None
    # Two FLOPs for each of forward, gradient by the weight and, but for the first layer, gradient by the input.
    assert costs[0] == 1 + 2 * 2 * 5 * 6 * 10
    assert costs[3] == 1 + 3 * 2 * 5 * 10 * 10
    assert costs[1] == costs[2] == 1


class NeverCalls(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[0].mean()  # type: ignore[no-any-return]


class TooLarge(Classifier):
    """A module that does not fit on a device, for which the device "meta" stands."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if args[0] == torch.device("meta"):
            raise torch.OutOfMemoryError("out of memory")
        return super().to(*args, **kwargs)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("bang")


def failing() -> LightningModule:
    module = Classifier("mlp")
    module.net.append(Fails())
    return module


@pytest.mark.parametrize(
    ("make", "data", "why"),
    [
        (failing, loader("mlp"), "ArithmeticError: bang"),
        (NeverCalls, loader("mlp"), "NotCalled: `training_step` did not call the network"),
    ],
    ids=["layer", "no call"],
)
def test_what_cannot_be_measured_is_cut_by_its_parameters_with_a_warning(
    make: Callable[[], LightningModule], data: Any, why: str
) -> None:
    module = make()
    with pytest.warns(UserWarning, match=f"could not be measured for balance='time' .{why}.*Give `split_points`"):
        assert measure(module, first(data)) is None
    assert not {"forward", "log"} & (vars(module).keys() | vars(module.net).keys())


def test_a_network_that_does_not_fit_on_the_device_is_cut_by_its_parameters_with_a_warning() -> None:
    module = TooLarge("mlp")
    with pytest.warns(
        UserWarning, match="could not be measured .*OutOfMemoryError: out of memory.*Give `split_points`"
    ):
        assert measure(module, first(loader("mlp")), device=torch.device("meta")) is None
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def test_a_network_that_is_not_what_was_traced_ends_the_run() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(6, 3).double(), [0]

        def forward(self, x: Tensor) -> Tensor:
            self.calls[0] += 1
            return self.layer(x) + self.calls[0]

    module = Classifier("mlp")
    module.net = Wrong()
    with pytest.raises(
        NotTheSame, match="cut into its layers from 'net.layer' to 'net.layer', computes something else"
    ):
        measure(module, first(loader("mlp")))


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p), 2),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 3),
    ],
)
def test_what_an_optimizer_keeps(make: Callable[[Any], torch.optim.Optimizer], copies: int) -> None:
    """Against what it really keeps after a step."""
    layer = nn.Linear(30, 30)
    optimizer = make(layer.parameters())
    layer(torch.randn(2, 30)).sum().backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.numel() > 1]
    assert copies_kept(optimizer) == copies == sum(t.numel() for t in kept) / sum(p.numel() for p in layer.parameters())
    assert copies_kept(None) == 2
