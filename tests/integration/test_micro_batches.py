"""Batches in micro-batches against the oracle, and what Lightning and the user see of a batch; both executions."""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddg import DDGStrategy, Staleness
from tests import reference
from tests.harness import run_ranks, run_ranks_raw
from tests.integration.test_exact import STARTS
from tests.integration.test_ties import Model
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


@pytest.mark.parametrize(
    "num_stages", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_processes_equal_the_oracle(num_stages: int) -> None:
    for states in run_ranks(fit_all, num_stages, num_stages, CASES, timeout=240):
        for got, case in zip(states, CASES, strict=True):
            assert largest_difference(got, expected(num_stages, case)) <= 1e-12, case


def test_the_oracle_tells_micro_batches_from_batches() -> None:
    case = {"micro": 1, "optimizer": "nesterov", "drain": "epoch"}
    whole = expected(4, case)
    for micro in (2, 3, 5):
        assert largest_difference(whole, expected(4, {**case, "micro": micro})) > 1e-6


# ---- accumulation over a loader of micro-batches is the same rule


class Plain(Classifier):
    """Without a scheduler, which counts batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, step_lr=False, **kwargs)


RULES: list[Case] = [
    {},
    {"recompute": True},
    {"staleness": Staleness(stash=False)},
    {"staleness": Staleness(stash=False), "recompute": True},
    {"staleness": Staleness(extrapolate=True)},
    {"staleness": Staleness(shrink=0.7, slow_start=3, extrapolate=True)},
]


def fit_split(num_stages: int, devices: int, micro: int, accumulate: int, options: Case) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    module = Plain("mlp", "nesterov")
    points = [f"net.{start}" for start in STARTS[num_stages]]
    strategy = DDGStrategy(num_stages, points, micro_batches=micro, **options)
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader("mlp", 24, 6 // accumulate))
    return state_of(module)


def fit_under_all_rules(num_stages: int) -> list[dict[str, Tensor]]:
    return [fit_split(num_stages, num_stages, 3, 1, options) for options in RULES]


@pytest.mark.parametrize("num_stages", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_micro_batches_are_accumulation_over_smaller_batches_under_all_rules(num_stages: int) -> None:
    wanted = [fit_split(num_stages, 1, 1, 3, options) for options in RULES]
    alone = [fit_split(num_stages, 1, 3, 1, options) for options in RULES]
    for states in (alone, *run_ranks(fit_under_all_rules, num_stages, num_stages, timeout=240)):
        for got, accumulated, options in zip(states, wanted, RULES, strict=True):
            assert largest_difference(got, accumulated) <= 1e-12, options
    assert largest_difference(alone[0], alone[1]) == 0.0
    assert all(largest_difference(alone[0], other) > 1e-9 for other in alone[2:])


# ---- random draws, the proof, precision


class Noisy(Classifier):
    """Draws in the step and in the network."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x + torch.randn_like(x) / 10), y)
        self.log("train_loss", loss)
        return loss


PROVED: list[Case] = [
    {"network": "dropout_mlp", "micro": 3, "make": Noisy},
    {"network": "dropout_mlp", "micro": "auto", "make": Noisy, "accumulate": 2},
    # BatchNorm cannot do with one sample, which the last batch's micro-batches would have.
    {"network": "noisy_mlp", "micro": 2, "options": {"recompute": True}, "limit_train_batches": 4},
    {"network": "dropout_mlp", "micro": 3, "options": {"staleness": Staleness(stash=False)}},
    {"network": "dropout_mlp", "micro": 3, "options": {"staleness": Staleness(shrink=0.5)}, "max_epochs": 1},
    {"network": "dropout_mlp", "micro": 5, "drain": "never", "limit_train_batches": 1},
]


def fit_proved(num_stages: int, devices: int) -> list[Any]:
    states = []
    for case in PROVED:
        with warnings.catch_warnings(record=True) as caught:
            states.append(fit(num_stages, devices, **case))
        assert [str(one.message) for one in caught if "first batch's gradients" in str(one.message)] == []
    return states


@pytest.mark.parametrize("num_stages", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_draws_are_the_same_in_both_executions_and_in_the_proof(num_stages: int) -> None:
    (alone,) = run_ranks(fit_proved, 1, num_stages, 1, timeout=240)
    (again,) = run_ranks(fit_proved, 1, num_stages, 1, timeout=240)
    for case, got, wanted in zip(PROVED, again, alone, strict=True):
        assert largest_difference(got, wanted) == 0.0, case
    for states in run_ranks(fit_proved, num_stages, num_stages, num_stages, timeout=240):
        for case, got, wanted in zip(PROVED, states, alone, strict=True):
            assert largest_difference(got, wanted) <= 1e-12, case


class Doubled(Classifier):
    """The backward of the second micro-batch counts twice in the stages alone."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if hasattr(self.trainer.strategy, "run") and self.trainer.strategy.run.step.step._micro == 1:
            # The copy that is trained for the proof has a Trainer, too.
            loss = loss * (1 if self._is_copy else 2)
        super().backward(loss, *args, **kwargs)

    @property
    def _is_copy(self) -> bool:
        return self is not self.trainer.lightning_module


def fit_doubled(devices: int) -> None:
    fit(3, devices, micro=3, make=Doubled)


@pytest.mark.parametrize("devices", [1, 3])
def test_the_proof_is_of_all_micro_batches_of_the_first_batch(devices: int) -> None:
    for result in run_ranks_raw(fit_doubled, devices, devices)[:1]:
        assert result.error is not None
        assert "WrongGradients" in result.error


def fit_bf16(devices: int, precision: str) -> dict[str, Tensor]:
    return fit(3, devices, micro=3, network="mlp", precision=precision, make=Single)


class Single(Classifier):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.float()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x.to(self.dtype)), y)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: str) -> None:
    alone, start = fit_bf16(1, precision), Single("mlp", "nesterov").state_dict()
    assert 1e-3 < largest_difference(alone, start) < 10
    for got in run_ranks(fit_bf16, 3, 3, precision):
        assert largest_difference(got, alone) < 0.02


# ---- steps that are more than one call, averages of weights


class TwoParts(Plain):
    """Calls two modules in turn, so that the step itself is cut."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first, self.second = self.net[:3], self.net[3:]
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.second(self.first(x)), y)
        self.log("train_loss", loss)
        return loss


def fit_parts(devices: int, micro: int, accumulate: int = 1) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    module = TwoParts("mlp", "nesterov")
    strategy = DDGStrategy(3, ["first.1", "second.5"], micro_batches=micro)
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader("mlp", 24, 6 // accumulate))
    return state_of(module)


def test_a_step_that_is_cut_itself() -> None:
    wanted = fit_parts(1, 1, 3)
    for got in (fit_parts(1, 3), *run_ranks(fit_parts, 3, 3, 3)):
        assert largest_difference(got, wanted) <= 1e-12


def fit_averaged(devices: int) -> dict[str, Tensor]:
    averages = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)
    return fit(3, devices, 2, network="convnet", max_epochs=3, callbacks=[averages], limit_train_batches=4)


def test_averages_of_weights() -> None:
    alone = fit_averaged(1)
    for got in run_ranks(fit_averaged, 3, 3):
        assert largest_difference(got, alone) <= 1e-12


class AddsUp(Plain):
    """Zeroes the gradients itself, before every second batch only."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


def fit_adding_up(devices: int, micro: int, accumulate: int) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    module = AddsUp("mlp", "sgd") if accumulate == 1 else AddsUpInThrees("mlp", "sgd")
    strategy = DDGStrategy(3, ["net.2", "net.5"], micro_batches=micro)
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(module, loader("mlp", 24, 6 // accumulate))
    return state_of(module)


class AddsUpInThrees(Plain):
    """The same, where each batch is a third of one."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx // 3 % 2 == 0:
            optimizer.zero_grad()


def test_gradients_that_are_not_zeroed_stay() -> None:
    wanted = fit_adding_up(1, 1, 3)
    assert largest_difference(wanted, fit_split(3, 1, 1, 3, {})) > 1e-6
    for got in (fit_adding_up(1, 3, 1), *run_ranks(fit_adding_up, 3, 3, 3, 1)):
        assert largest_difference(got, wanted) <= 1e-12


# ---- tied weights


def fit_tied(devices: int, optimizer: str) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    module = Model(True, optimizer)
    strategy = DDGStrategy(3, ["net.middle", "net.second"], micro_batches=3)
    texts = torch.randint(0, 8, (22, 5), generator=torch.Generator().manual_seed(1))
    module.double()
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=2)
    trainer.fit(module, DataLoader(TensorDataset(texts), 5))
    return state_of(module)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "skips"])
def test_tied_weights(optimizer: str) -> None:
    (alone,) = run_ranks(fit_tied, 1, 1, optimizer)
    for got in run_ranks(fit_tied, 3, 3, optimizer):
        assert largest_difference(got, alone) <= 1e-12
