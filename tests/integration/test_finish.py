"""The synchronous finish against the oracle and against plain backpropagation, in both executions."""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from lightning_ddg import DDGMonitor, DDGStrategy, Staleness
from lightning_ddg.plugin.finish import is_last_part
from tests import reference
from tests.harness import run_ranks, run_ranks_raw
from tests.integration.test_exact import STARTS
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


Case = dict[str, Any]
# By the part that is synchronous: the batch from which on it is.
FROM = {0.1: 13, 0.4: 9, 0.2: 12, 1 / 3: 10, 1.0: 0}
CASES: list[Case] = [
    *({"finish": f, "optimizer": o, "drain": d} for f, (o, d) in itertools.product(
        (0.1, 0.4, 1 / 3, 1.0), [("nesterov", "epoch"), ("adamw_fused", "fit"), ("adam", "never")]
    )),
    {"finish": 0.4, "network": "convnet", "optimizer": "adamw_fused", "drain": "fit"},
    {"finish": 0.4, "network": "transformer", "optimizer": "nesterov", "drain": "never"},
    {"finish": 0.4, "optimizer": "nesterov", "drain": "fit", "clip": ("norm", 0.3)},
    {"finish": 0.4, "optimizer": "sgd", "drain": "fit", "micro": 2},
    {"finish": 0.4, "optimizer": "adam", "drain": "never", "micro": 5},
    {"finish": 1.0, "optimizer": "nesterov", "drain": "epoch", "micro": 3, "clip": ("value", 0.01)},
    # Epochs have five batches, so that of the last epoch's those that begin a step are 10, 12 and 14.
    {"finish": 0.1, "optimizer": "adam", "drain": "fit", "accumulate": 2, "start": 14},
    {"finish": 0.2, "optimizer": "nesterov", "drain": "never", "accumulate": 2, "start": 12, "micro": 3},
    *({"finish": 0.4, "optimizer": "nesterov", "drain": "fit", "options": options} for options in (
        {"recompute": True}, {"recompute": True, "micro_batches": 1}
    )),
]  # fmt: skip


def fit(
    num_stages: int,
    devices: int,
    finish: float,
    optimizer: str = "nesterov",
    drain: str = "fit",
    network: str = "mlp",
    accumulate: int = 1,
    micro: int = 1,
    clip: tuple[str, float] | None = None,
    make: type[Classifier] = Classifier,
    options: Case | None = None,
    rules: Case | None = None,
    start: int | None = None,
    path: str | None = None,
    save: str | None = None,
    **trainer: Any,
) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    module = make(network, optimizer)
    strategy = DDGStrategy(
        num_stages,
        [f"net.{start}" for start in STARTS[num_stages]],
        drain=drain,  # type: ignore[arg-type]
        staleness=Staleness(finish=finish, **(rules or {})),
        **{"micro_batches": micro, **(options or {})},  # type: ignore[arg-type]
    )
    clipping = {} if clip is None else {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    given = {"max_epochs": EPOCHS, "accumulate_grad_batches": accumulate, **clipping, **trainer}
    made = quiet_trainer(devices=devices, strategy=strategy, **given)
    made.fit(module, loader(network), ckpt_path=path)
    if save is not None:
        made.save_checkpoint(save)
    return state_of(module)


def clipping(how: str, most: float) -> Any:
    if how == "norm":
        return partial(nn.utils.clip_grad_norm_, max_norm=most)
    return partial(nn.utils.clip_grad_value_, clip_value=most)


def expected(num_stages: int, case: Case, start: int | None = None) -> dict[str, Tensor]:
    network = case.get("network", "mlp")
    net = seeded_network(network)
    assert isinstance(net, nn.Sequential)
    reference.train(
        net,
        reference.flat_stages(net, STARTS[num_stages]),
        [list(loader(network))] * EPOCHS,
        OPTIMIZERS[case["optimizer"]],
        lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.8),
        case["drain"],
        micro_batches=case.get("micro", 1),
        accumulate=case.get("accumulate", 1),
        clip=clipping(*case["clip"]) if "clip" in case else None,
        synchronous_from=case.get("start", FROM[case["finish"]]) if start is None else start,
    )
    return {f"net.{name}": tensor for name, tensor in state_of(net).items()}


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process_equals_the_oracle(case: Case, num_stages: int) -> None:
    tolerance = 0.0 if case.get("accumulate", 1) == 1 else 1e-12
    assert largest_difference(fit(num_stages, 1, **case), expected(num_stages, case)) <= tolerance


def fit_all(num_stages: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    return [fit(num_stages, num_stages, **case) for case in cases]


@pytest.mark.parametrize(
    "num_stages", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_processes_equal_the_oracle(num_stages: int) -> None:
    for states in run_ranks(fit_all, num_stages, num_stages, CASES, timeout=240):
        for got, case in zip(states, CASES, strict=True):
            assert largest_difference(got, expected(num_stages, case)) <= 1e-12, case


def test_the_oracle_tells_where_it_begins() -> None:
    case = {"optimizer": "nesterov", "drain": "fit"}
    states = [expected(4, case, start) for start in (-1, 9, 10, 0)]
    assert all(largest_difference(a, b) > 1e-6 for a, b in itertools.combinations(states, 2))


# ---- from the switch on it is plain backpropagation, whatever the rule was before

RULES: list[Case] = [
    {"rules": {"shrink": 0.5, "slow_start": 100}},
    {"rules": {"extrapolate": True}},
    {"rules": {"extrapolate": True}, "options": {"recompute": True}},
    {"rules": {"stash": False}},
    {"rules": {"stash": False, "shrink": 0.5}, "options": {"recompute": True}},
    {"rules": {"stash": False}, "micro": 3},
    {"rules": {"extrapolate": True}, "micro": 2, "accumulate": 2},
    {"make": ManualClassifier, "rules": {"slow_start": 100}},
    {"network": "dropout_mlp"},
]


def of_rules(devices: int, finish: float) -> list[dict[str, Tensor]]:
    return [fit(3, devices, finish, optimizer="adam", **rule) for rule in RULES]


def plain(rule: Case) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    module = rule.get("make", Classifier)(rule.get("network", "mlp"), "adam")
    quiet_trainer(devices=1, max_epochs=EPOCHS, accumulate_grad_batches=rule.get("accumulate", 1)).fit(
        module, loader("mlp")
    )
    return state_of(module)


@pytest.mark.parametrize("devices", [1, 3])
def test_all_of_a_fit_is_plain_backpropagation(devices: int) -> None:
    for states in run_ranks(of_rules, devices, devices, 1.0, timeout=240):
        for rule, got in zip(RULES[:-1], states, strict=False):
            assert largest_difference(got, plain(rule)) <= 1e-12, rule


def test_both_executions_agree_under_every_rule() -> None:
    (alone,) = run_ranks(of_rules, 1, 1, 0.4, timeout=240)
    for states in run_ranks(of_rules, 3, 3, 0.4, timeout=240):
        for rule, got, wanted in zip(RULES, states, alone, strict=True):
            assert largest_difference(got, wanted) <= 1e-12, rule


def two_halves(devices: int, folder: str) -> list[Any]:
    """A fit with a finish of a third; and its first two thirds alone, whose checkpoint plain backpropagation takes."""
    whole, last = [], []
    for number, rule in enumerate(RULES[:-1]):
        path = f"{folder}/{devices}-{number}.ckpt"
        whole.append(fit(3, devices, 1 / 3, "adam", **rule))
        # Drained where the finish would begin.
        fit(3, devices, 0.0, "adam", **rule, **{"max_epochs": EPOCHS - 1, "save": path})
        last.append(path)
    return [whole, last]


@pytest.mark.parametrize("devices", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_from_the_switch_on_it_is_plain_backpropagation(devices: int, tmp_path: Path) -> None:
    for whole, paths in run_ranks(two_halves, devices, devices, str(tmp_path), timeout=240):
        for rule, got, path in zip(RULES, whole, paths, strict=False):
            warnings.simplefilter("ignore")
            module = rule.get("make", Classifier)(rule.get("network", "mlp"), "adam")
            one = quiet_trainer(devices=1, max_epochs=EPOCHS, accumulate_grad_batches=rule.get("accumulate", 1))
            one.fit(module, loader("mlp"), ckpt_path=path)
            assert largest_difference(got, state_of(module)) <= 1e-12, rule


# ---- what a fit's length is known from


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({"max_steps": 12, "max_epochs": -1}, 10),
        ({"max_steps": 12}, 10),
        # The epochs end it first.
        ({"max_steps": 1000}, 12),
        ({"max_epochs": -1, "max_steps": 12, "limit_train_batches": 4}, 10),
        ({"limit_train_batches": 4}, 10),
    ],
)
def test_the_length_follows_from_steps_or_epochs(given: Case, start: int) -> None:
    seen: list[int] = []

    class Note(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.strategy.run.finish.begun:
                seen.append(trainer.fit_loop.epoch_loop.total_batch_idx)

    fit(3, 1, 0.15, **{"callbacks": [Note()], **given})
    assert seen[0] == start
    assert seen == list(range(start, seen[-1] + 1))


class Unsized(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(list(loader("mlp").dataset)[:20])


def fit_unsized(devices: int, **trainer: Any) -> None:
    strategy = DDGStrategy(3, ["net.2", "net.5"], staleness=Staleness(finish=0.1))
    made = quiet_trainer(devices=devices, strategy=strategy, **trainer)
    made.fit(Classifier("mlp"), torch.utils.data.DataLoader(Unsized(), batch_size=5))


@pytest.mark.parametrize("devices", [1, 3])
def test_a_fit_of_unknown_length_is_refused(devices: int) -> None:
    for result in run_ranks_raw(partial(fit_unsized, devices, max_epochs=3), devices):
        assert result.error is not None
        assert "finish=0.1 makes the last part of a fit synchronous" in result.error
        assert "a training loader without a length" in result.error or devices > 1
    run_ranks(partial(fit_unsized, devices, max_steps=9, max_epochs=-1), devices)


def test_an_endless_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"finish=0.1 .* with max_steps=-1 and max_epochs=-1 nobody .*Give the Train"):
        fit(3, 1, 0.1, max_epochs=-1)


def test_its_part_is_never_left_again() -> None:
    class Loop:
        max_steps, max_epochs, num_training_batches = -1, 3, 7

    loop: Any = Loop()
    marks = []
    for loop.current_epoch in range(3):
        marks += [is_last_part(loop, 0.3, index) for index in range(7)]
    assert marks == [False] * 14 + [True] * 7


def fit_scheduled(devices: int) -> dict[str, Tensor]:
    return fit(3, devices, 0.4, callbacks=[GradientAccumulationScheduler({0: 2, 1: 3})])


def test_accumulation_that_changes() -> None:
    alone = fit_scheduled(1)
    for got in run_ranks(fit_scheduled, 3, 3):
        assert largest_difference(got, alone) <= 1e-12


# ---- checkpoints, callbacks


class Saving(pl.Callback):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(f"{self.folder}/{trainer.current_epoch}.ckpt")


def resumed(devices: int, folder: str) -> list[dict[str, Tensor]]:
    # It begins in the first epoch; or where the third does.
    states = []
    for finish, drain, epochs in ((0.7, "fit", (0, 1)), (1 / 3, "epoch", (0, 1))):
        whole = fit(3, devices, finish, "adam", drain, callbacks=[Saving(folder)])
        for epoch in epochs:
            states += [whole, fit(3, devices, finish, "adam", drain, path=f"{folder}/{epoch}.ckpt")]
    return states


@pytest.mark.parametrize("devices", [1, 3])
def test_a_resumed_finish_goes_on_exactly(devices: int, tmp_path: Path) -> None:
    for states in run_ranks(resumed, devices, devices, str(tmp_path)):
        for whole, again in zip(states[::2], states[1::2], strict=True):
            assert largest_difference(whole, again) == 0.0


def test_the_monitor_sees_no_delay(tmp_path: Path) -> None:
    monitor = DDGMonitor(timeline=False, every_n_steps=1, cosine=True)
    fit(3, 1, 1.0, micro=2, callbacks=[monitor], default_root_dir=tmp_path)
    for figures in monitor.figures.values():
        assert (figures["delay"], figures["delay_updates"], figures["staleness"], figures["cosine"]) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("0.1", TypeError, "finish='0.1' is not a number"),
        (True, TypeError, "finish=True is not a number"),
        (1.5, ValueError, "finish=1.5 is no part of a fit. Use one above 0 and up to 1"),
        (-0.1, ValueError, "finish=-0.1 is no part of a fit"),
    ],
)
def test_no_part_of_a_fit_is_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Staleness(finish=value)
