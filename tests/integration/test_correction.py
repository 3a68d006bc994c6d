"""The correction, extrapolation and compensation alone and together, against the oracle; both executions, float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_ddg import DDGStrategy, Staleness
from lightning_ddg.plugin.next_options import next_options
from tests.core import staleness_reference as reference
from tests.harness import run_ranks
from tests.integration.test_exact import STARTS
from tests.networks import (
    Classifier,
    ManualClassifier,
    largest_difference,
    loader,
    quiet_trainer,
    seeded_network,
    state_of,
)

EPOCHS = 2
COUNT = 37  # samples: 8 batches of 5 an epoch, the last one of 2

MADE: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.01),
    "plain sgd": lambda p: SGD(p, lr=0.05, weight_decay=0.01),
    "adam": lambda p: Adam(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.5, fused=True),
    "nadam": lambda p: NAdam(p, lr=0.01, betas=(0.99, 0.999), momentum_decay=0.1, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.003, momentum=0.5),
}

Case = dict[str, Any]
BOTH = {"extrapolate": True, "compensate": True}
CASES: list[Case] = [
    *({"optimizer": name, "rules": {"extrapolate": True}} for name in MADE),
    *({"optimizer": name, "rules": rules} for name in ("sgd", "nesterov") for rules in ({"compensate": True}, BOTH)),
    {"optimizer": "nesterov", "rules": {**BOTH, "shrink": 0.7, "slow_start": 5}},
    {"optimizer": "adamw", "rules": {"extrapolate": True, "shrink": 0.7, "slow_start": 11}},
    {"optimizer": "sgd", "rules": BOTH, "gamma": 0.7},
    {"optimizer": "adamw", "rules": {"extrapolate": True}, "gamma": 0.7, "accumulate": 2},
    {"optimizer": "nadam", "rules": {"extrapolate": True, "slow_start": 6}, "gamma": 0.8},
    {"optimizer": "sgd", "rules": BOTH, "accumulate": 3},
    {"optimizer": "adam", "rules": {"extrapolate": True}, "clip": 0.1},
    {"optimizer": "nesterov", "rules": {"compensate": True}, "clip": 0.1, "accumulate": 2},
]


class Corrected(Classifier):
    def __init__(self, network: str = "tanh_mlp", optimizer: str = "sgd", gamma: float = 1.0) -> None:
        super().__init__(network, optimizer)
        self.gamma = gamma

    def configure_optimizers(self) -> Any:
        optimizer = MADE[self.optimizer_name](self.parameters())
        if self.gamma == 1:
            return optimizer
        scheduler = StepLR(optimizer, step_size=2, gamma=self.gamma)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ManualCorrected(ManualClassifier, Corrected):
    """In manual optimization."""


def fit(
    num_stages: int,
    devices: int,
    optimizer: str,
    rules: Case,
    gamma: float = 1.0,
    accumulate: int = 1,
    clip: float | None = None,
    drain: str = "epoch",
    network: str = "tanh_mlp",
    make: type[Corrected] = Corrected,
    path: str | None = None,
    batch_size: int = 5,
    options: Case | None = None,
    **trainer: Any,
) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    module = make(network, optimizer, gamma)
    strategy = DDGStrategy(
        num_stages,
        [f"net.{start}" for start in STARTS[num_stages]],
        drain=drain,  # type: ignore[arg-type]
        staleness=Staleness(**rules),
        **(options or {}),
    )
    given = {"max_epochs": EPOCHS, "accumulate_grad_batches": accumulate, "gradient_clip_val": clip, **trainer}
    made = quiet_trainer(devices=devices, strategy=strategy, **given)
    made.fit(module, loader(network, COUNT, batch_size), ckpt_path=path)
    return state_of(module)


def expected(
    num_stages: int, optimizer: str, rules: Case, gamma: float = 1.0, accumulate: int = 1, clip: float | None = None
) -> dict[str, Tensor]:
    net = seeded_network("tanh_mlp")
    assert isinstance(net, nn.Sequential)
    rules = dict(rules)
    if optimizer == "rmsprop":
        rules["by_last_step"] = rules.pop("extrapolate")
    reference.train_exactly(
        net,
        STARTS[num_stages],
        [list(loader("tanh_mlp", COUNT))] * EPOCHS,
        MADE[optimizer],
        **rules,
        accumulate=accumulate,
        rate=lambda step: gamma ** (step // 2),
        clip=None if clip is None else partial(nn.utils.clip_grad_norm_, max_norm=clip),  # type: ignore[arg-type]
    )
    return {f"net.{name}": tensor for name, tensor in state_of(net).items()}


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process_follows_the_formula(case: Case, num_stages: int) -> None:
    got = fit(num_stages, 1, **case)
    assert largest_difference(got, expected(num_stages, **case)) <= 1e-12
    without = {name: value for name, value in case["rules"].items() if name not in BOTH}
    changed = case["optimizer"] != "plain sgd"
    assert (largest_difference(got, fit(num_stages, 1, **{**case, "rules": without})) > 1e-9) == changed


def fit_all(num_stages: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    return [fit(num_stages, num_stages, **case) for case in cases]


@pytest.mark.parametrize(
    "num_stages", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_processes_follow_the_formula(num_stages: int) -> None:
    for states in run_ranks(fit_all, num_stages, num_stages, CASES, timeout=240):
        for got, case in zip(states, CASES, strict=True):
            assert largest_difference(got, expected(num_stages, **case)) <= 1e-12, case


def test_the_next_learning_rates_make_a_difference() -> None:
    case: Case = {"optimizer": "adamw", "rules": {"extrapolate": True}, "gamma": 0.5}
    seen = fit(4, 1, **case)
    assert largest_difference(seen, expected(4, **case)) <= 1e-12

    class Held(Corrected):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    assert largest_difference(seen, fit(4, 1, **case, make=Held)) > 1e-9


COMBINED: list[Case] = [
    *({"optimizer": o, "rules": r, "drain": d, "gamma": 0.8, "network": "noisy_mlp"} for o, r, d in (
        ("nesterov", BOTH, "never"), ("adamw", {"extrapolate": True}, "fit"), ("nadam", {"extrapolate": True}, "never"),
        ("sgd", {"compensate": True}, "fit"), ("rmsprop", {"extrapolate": True}, "never"),
    )),
    {"optimizer": "nesterov", "rules": {**BOTH, "finish": 0.3}, "options": {"micro_batches": 2}, "network": "mlp"},
    {"optimizer": "adam", "rules": {"extrapolate": True, "finish": 0.3}, "options": {"recompute": True}},
    {"optimizer": "sgd", "rules": {"compensate": True, "stash": False}, "drain": "never"},
    {"optimizer": "sgd", "rules": {"compensate": True, "stash": False}, "options": {"recompute": True}},
    *({"optimizer": o, "rules": r, "make": ManualCorrected, "gamma": 0.8} for o, r in (
        ("nesterov", BOTH), ("adam", {"extrapolate": True}),
    )),
]  # fmt: skip


def fit_combined(devices: int) -> list[dict[str, Tensor]]:
    return [fit(3, devices, **case) for case in COMBINED]


def test_both_executions_agree_in_all_combinations() -> None:
    (alone,) = run_ranks(fit_combined, 1, 1, timeout=240)
    for states in run_ranks(fit_combined, 3, 3, timeout=240):
        for case, got, wanted in zip(COMBINED, states, alone, strict=True):
            assert largest_difference(got, wanted) <= 1e-12, case


@pytest.mark.parametrize(("optimizer", "rules"), [("nesterov", BOTH), ("adamw", {"extrapolate": True})])
def test_micro_batches_are_accumulation_over_smaller_batches(optimizer: str, rules: Case) -> None:
    split = fit(4, 1, optimizer, rules, batch_size=6, options={"micro_batches": 3}, limit_train_batches=6)
    added = fit(4, 1, optimizer, rules, batch_size=2, accumulate=3, limit_train_batches=18)
    assert largest_difference(split, added) <= 1e-12


# ---- checkpoints


class Saving(pl.Callback):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(f"{self.folder}/{trainer.current_epoch}.ckpt")


def resumed(devices: int, folder: str) -> list[dict[str, Tensor]]:
    states = []
    for optimizer, rules in (("nesterov", BOTH), ("adamw", {"extrapolate": True, "slow_start": 20})):
        case: Case = {"optimizer": optimizer, "rules": rules, "gamma": 0.8, "accumulate": 2}
        states.append(fit(3, devices, **case, callbacks=[Saving(folder)]))
        states.append(fit(3, devices, **case, path=f"{folder}/0.ckpt"))
    return states


@pytest.mark.parametrize("devices", [1, 3])
def test_a_resumed_fit_goes_on_exactly(devices: int, tmp_path: Path) -> None:
    for states in run_ranks(resumed, devices, devices, str(tmp_path)):
        for whole, again in zip(states[::2], states[1::2], strict=True):
            assert largest_difference(whole, again) == 0.0


# ---- the next learning rates


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: StepLR(o, 2, 0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (step + 1)),
    "sequence": lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 3), CosineAnnealingLR(o, 9)], [3]),
    "momentum too": lambda o: OneCycleLR(o, 0.3, total_steps=40),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_tell_without_side_effects(name: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.1, momentum=0.9)
    scheduler = SCHEDULES[name](optimizer)
    told = []
    for _ in range(8):
        before = repr(scheduler.state_dict()), repr(optimizer.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            told.append(next_options(optimizer.param_groups, 4, optimizer, [scheduler]))
        assert (repr(scheduler.state_dict()), repr(optimizer.state_dict())) == before
        optimizer.step()
        scheduler.step()
    for later in range(4):
        for key in ("lr", "momentum"):
            assert [steps[later][0][key] for steps in told[: 8 - later]] == [steps[0][0][key] for steps in told[later:]]
    assert len({steps[0][0]["lr"] for steps in told}) > 3


def test_a_scheduler_at_its_end_is_held() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, 0.3, total_steps=3)
    rates = [steps[0]["lr"] for steps in next_options(optimizer.param_groups, 6, optimizer, [scheduler])]
    # It may be stepped once too often, not twice.
    assert len(set(rates[:4])) == 4
    assert rates[3:] == [rates[3]] * 3


def test_what_cannot_be_copied_is_held() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=0.1)

    class Locked(StepLR):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("locked")

    options = next_options(optimizer.param_groups, 3, optimizer, [Locked(optimizer, 1, 0.5)])
    assert [steps[0]["lr"] for steps in options] == [0.1] * 3


class Scheduled(Corrected):
    """A scheduler that tells nothing beforehand beside one that does."""

    def configure_optimizers(self) -> Any:
        optimizer = MADE[self.optimizer_name](self.parameters())
        plateau = {"scheduler": ReduceLROnPlateau(optimizer, patience=0), "monitor": "train_loss"}
        rare = {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step", "frequency": 3}
        return [optimizer], [plateau, rare, {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "epoch"}]


def fit_scheduled(devices: int) -> dict[str, Tensor]:
    return fit(3, devices, "adamw", {"extrapolate": True}, make=Scheduled)


def test_other_schedulers_are_held() -> None:
    alone = fit_scheduled(1)
    for got in run_ranks(fit_scheduled, 3, 3):
        assert largest_difference(got, alone) <= 1e-12


# ---- refusals, the former name


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("adamw", r"compensate=True .* torch.optim.SGD, but the optimizer is AdamW. Use SGD with momentum, or extra"),
        ("plain sgd", r"compensate=True .* group 0 has momentum=0. Use one between 0 and 1"),
    ],
)
def test_compensation_without_momentum_is_refused(optimizer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(3, 1, optimizer, {"compensate": True})


def test_the_former_name_is_read_from_yaml(tmp_path: Path) -> None:
    parser = LightningArgumentParser()
    parser.add_argument("--strategy", type=DDGStrategy)
    config = {"class_path": "lightning_ddg.DDGStrategy", "init_args": {"staleness": {"predict": True}}}
    with pytest.warns(DeprecationWarning, match="predict is now called extrapolate"):
        made = parser.instantiate_classes(parser.parse_object({"strategy": config}))
    assert made.strategy.staleness == Staleness(extrapolate=True)
