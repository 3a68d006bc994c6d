"""More batches in flight, `DDGStrategy(slack=s)`: the oracle with the longer delays, in both executions, in float64."""

from __future__ import annotations

import itertools
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_ddg import DDGMonitor, DDGStrategy, Staleness
from lightning_ddg.cli import main
from tests import reference
from tests.core import staleness_reference
from tests.harness import run_ranks, run_ranks_raw
from tests.integration.test_finish import FROM
from tests.integration.test_skipping import SKIPPED, Skips
from tests.integration.test_ties import Model, batches
from tests.networks import (
    OPTIMIZERS,
    SAFELY,
    Classifier,
    ManualClassifier,
    largest_difference,
    loader,
    quiet_trainer,
    seeded_network,
    state_of,
)

EPOCHS = 3
STARTS = {2: [3], 3: [2, 5]}

Case = dict[str, Any]
# 22 samples in 5 batches an epoch, the last one smaller; with K = 3 and slack 2 the first stage's delay is longer.
EXACT: list[Case] = [
    *({"slack": s, "optimizer": o, "drain": d} for s, (o, d) in itertools.product(
        (1, 2), [("nesterov", "epoch"), ("nesterov", "fit"), ("adamw_fused", "never"), ("adamw_fused", "epoch")]
    )),
    {"slack": 1, "network": "convnet", "optimizer": "nesterov", "drain": "fit"},
    {"slack": 1, "optimizer": "nesterov", "drain": "never", "make": ManualClassifier},
    {"slack": 2, "optimizer": "nesterov", "drain": "fit", "options": {"recompute": True}},
    {"slack": 2, "optimizer": "adamw_fused", "drain": "fit", "micro": 2},
    {"slack": 1, "optimizer": "nesterov", "drain": "epoch", "accumulate": 2},
    {"slack": 1, "optimizer": "nesterov", "drain": "fit", "finish": 0.4},
    {"slack": 2, "optimizer": "adamw_fused", "drain": "never", "finish": 0.4, "micro": 2},
    {"slack": 1, "optimizer": "nesterov", "drain": "fit", "skips": "both"},
    # Validations in between find batches in flight.
    {"slack": 2, "optimizer": "nesterov", "drain": "fit", "options": {"eval_micro_batches": 2},
     "trainer": {"val_check_interval": 2}},
]  # fmt: skip
SOME = [EXACT[at] for at in (0, 6, 11, 14, 15, 16)]

FORMULAS: dict[str, tuple[Case, Any]] = {
    "extrapolate": ({"extrapolate": True}, partial(staleness_reference.train_exactly, extrapolate=True)),
    "shrink, slow start": (
        {"shrink": 0.7, "slow_start": 5},
        partial(staleness_reference.train_exactly, shrink=0.7, slow_start=5),
    ),
    "compensate": ({"compensate": True}, partial(staleness_reference.train_exactly, compensate=True)),
    "current weights": (
        {"stash": False, "shrink": 0.5},
        partial(staleness_reference.train_with_current_weights, shrink=0.5),
    ),
    "features replay": (
        {"stash": False},
        staleness_reference.train_with_features_replayed,
    ),
}


def fit(
    num_stages: int,
    devices: int,
    slack: int,
    optimizer: str = "nesterov",
    drain: str = "fit",
    network: str = "mlp",
    micro: int = 1,
    accumulate: int = 1,
    finish: float = 0.0,
    rules: Case | None = None,
    options: Case | None = None,
    skips: str | None = None,
    make: type[Classifier] = Classifier,
    step_lr: bool = True,
    trainer: Case | None = None,
    load: str | None = None,
    save: str | None = None,
) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    pl.seed_everything(1)
    module = make(network, optimizer, step_lr) if skips is None else Skips(network, optimizer, when=skips)
    strategy = DDGStrategy(
        num_stages,
        [f"net.{start}" for start in STARTS[num_stages]],
        drain=drain,  # type: ignore[arg-type]
        micro_batches=micro,
        slack=slack,
        staleness=Staleness(finish=finish, **(rules or {})),
        **(options or {}),
    )
    given = {"max_epochs": EPOCHS, "accumulate_grad_batches": accumulate, **(trainer or {})}
    made = quiet_trainer(devices=devices, strategy=strategy, **given)
    data = [loader(network), loader(network)] if trainer else [loader(network)]
    made.fit(module, *data, ckpt_path=load, **SAFELY)
    if save is not None:
        made.save_checkpoint(save)
    return state_of(module)


def expected(num_stages: int, case: Case) -> dict[str, Tensor]:
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
        SKIPPED if "skips" in case else (),
        micro_batches=case.get("micro", 1),
        accumulate=case.get("accumulate", 1),
        synchronous_from=FROM[case["finish"]] if "finish" in case else None,
        slack=case["slack"],
    )
    return {f"net.{name}": tensor for name, tensor in state_of(net).items()}


@pytest.mark.parametrize(
    ("num_stages", "case"), [*((3, case) for case in EXACT), *((2, case) for case in EXACT[::3])], ids=str
)
def test_one_process_equals_the_oracle(num_stages: int, case: Case) -> None:
    tolerance = 0.0 if case.get("accumulate", 1) == 1 else 1e-12
    wanted = expected(num_stages, case)
    assert largest_difference(fit(num_stages, 1, **case), wanted) <= tolerance
    assert largest_difference(wanted, expected(num_stages, {**case, "slack": 0})) > 1e-6


def fit_all(num_stages: int, devices: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    return [fit(num_stages, devices, **case) for case in cases]


@pytest.mark.parametrize(
    ("num_stages", "cases"),
    [(2, SOME[1:3]), (3, SOME), *(pytest.param(k, EXACT, marks=pytest.mark.slow) for k in (2, 3))],
    ids=["2", "3", "2, all", "3, all"],
)
def test_processes_equal_the_oracle(num_stages: int, cases: list[Case]) -> None:
    for states in run_ranks(fit_all, num_stages, num_stages, num_stages, cases, timeout=240):
        for got, case in zip(states, cases, strict=True):
            assert largest_difference(got, expected(num_stages, case)) <= 1e-12, case


# ---- other rules


def rule_cases(slacks: tuple[int, ...]) -> list[Case]:
    common = {"network": "tanh_mlp", "drain": "epoch", "step_lr": False}
    return [
        {**common, "slack": s, "rules": FORMULAS[name][0], "options": {"recompute": name == "features replay"}}
        for name in FORMULAS
        for s in slacks
    ]


def by_formula(num_stages: int, slack: int, train: Any) -> dict[str, Tensor]:
    net = seeded_network("tanh_mlp")
    train(net, STARTS[num_stages], [list(loader("tanh_mlp"))] * EPOCHS, OPTIMIZERS["nesterov"], slack=slack)
    return {f"net.{name}": tensor for name, tensor in state_of(net).items()}


@pytest.mark.parametrize(
    ("devices", "slacks"), [(1, (1, 2)), (3, (1,)), pytest.param(3, (1, 2), marks=pytest.mark.slow)]
)
def test_other_rules_follow_their_formulas(devices: int, slacks: tuple[int, ...]) -> None:
    wanted = [by_formula(3, s, train) for _, train in FORMULAS.values() for s in slacks]
    cases = rule_cases(slacks)
    for states in run_ranks(fit_all, devices, 3, devices, cases, timeout=240):
        for got, one, case in zip(states, wanted, cases, strict=True):
            assert largest_difference(got, one) <= 1e-12, case


# ---- a parameter of several stages


def fit_tied(devices: int) -> list[dict[str, Tensor]]:
    warnings.simplefilter("ignore")
    states = []
    for all, drain, staleness in ((True, "never", Staleness(shrink=0.5)), (False, "epoch", Staleness(finish=0.5))):
        module = Model(all, "adamw")
        strategy = DDGStrategy(3, balance="parameters", slack=1, drain=drain, staleness=staleness)  # type: ignore[arg-type]
        trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=2, precision="64-true")
        trainer.fit(module, batches(), batches())
        states.append(state_of(module))
    return states


def test_tied_parameters_are_trained_alike() -> None:
    alone = fit_tied(1)
    for states in run_ranks(fit_tied, 3, 3, timeout=240):
        assert [largest_difference(got, one) < 1e-11 for got, one in zip(states, alone, strict=True)] == [True] * 2


# ---- checkpoints


def interrupted(devices: int, folder: str) -> list[dict[str, Tensor]]:
    path, case = f"{folder}/{devices}.ckpt", {"slack": 2, "drain": "epoch", "network": "dropout_mlp"}
    fit(3, devices, **case, trainer={"max_epochs": 2, "limit_val_batches": 0}, save=path)  # type: ignore[arg-type]
    return [fit(3, devices, **case, load=path), fit(3, devices, **case)]  # type: ignore[arg-type]


def test_a_run_that_resumes_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    (alone,) = run_ranks(interrupted, 1, 1, str(tmp_path))
    for resumed, whole in [alone, *run_ranks(interrupted, 3, 3, str(tmp_path))]:
        assert largest_difference(resumed, whole) == 0.0
        assert largest_difference(whole, alone[1]) <= 1e-12


# ---- what all ranks do together


class Stops(pl.Callback):
    """Rank 0 wants to stop after batch 4, and notes the last batch of its own."""

    def __init__(self) -> None:
        self.last = -1

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.last = batch_idx
        if trainer.is_global_zero and batch_idx == 4:
            trainer.should_stop = True


def fit_until_stopped(devices: int) -> tuple[int, list[float], Any]:
    warnings.simplefilter("ignore")
    stops, monitor = Stops(), DDGMonitor(timeline=False, every_n_steps=5)
    strategy = DDGStrategy(3, ["net.2", "net.5"], slack=2)
    trainer = quiet_trainer(devices=devices, strategy=strategy, max_epochs=1, callbacks=[stops, monitor])
    trainer.fit(Classifier("mlp"), loader("mlp", 100))
    return stops.last, [figures["delay"] for figures in monitor.figures.values()], strategy.delay


@pytest.mark.parametrize("devices", [1, 3])
def test_all_ranks_stop_after_the_same_batch_and_the_monitor_counts_the_delays(devices: int) -> None:
    ends = run_ranks(fit_until_stopped, devices, devices)
    assert {last for last, _, _ in ends} == {4 + 2 * 3 + 1}
    assert ends[0][1] == [6.0, 3.0, 0.0]
    assert [own for _, _, own in ends] == ([None] if devices == 1 else [0, 3, 6])


# ---- options


def fit_with_its_own_slack() -> None:
    warnings.simplefilter("ignore")
    module = Classifier("mlp")
    # More than the first frames have room for, so that ranks which counted differently would end in gloo.
    module.register_buffer("large", torch.zeros(1, 20_000))
    strategy = DDGStrategy(2, ["net.3"], slack=int(os.environ["LOCAL_RANK"]))
    quiet_trainer(devices=2, strategy=strategy, max_epochs=1).fit(module, loader("mlp"))


def test_ranks_that_were_given_other_slacks_say_so() -> None:
    for ended in run_ranks_raw(fit_with_its_own_slack, 2):
        assert ended.error is not None
        assert "the strategy's `slack` is 0 on rank 0, but 1 on rank 1" in ended.error


def test_enough_micro_batches_for_the_longer_delay() -> None:
    chosen = DDGStrategy(3, micro_batches="auto", slack=2)._options
    assert chosen.micro_batches_for(3) == 6
    assert [chosen.micro_batches_of(length, 3) for length in (6, 21, 4)] == [6, 7, 4]


CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  strategy:
    class_path: lightning_ddg.DDGStrategy
    init_args: {num_stages: 3, slack: 2, balance: parameters}
model:
  class_path: tests.networks.Classifier
  init_args: {network: tanh_mlp}
data:
  class_path: tests.integration.test_staleness.Data
"""


def test_from_a_yaml_file_and_the_plan_for_a_latency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-ddg"])
    main(["fit", "--config", "config.yaml"])
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[-2].strip() for row in rows] == ["6", "3", "0"]
    main(["plan", "--config", "config.yaml", "--num_stages", "[2,3]", "--latency_ms", "1000", "--slack", "1"])
    out = capsys.readouterr().out
    assert "Links of 1,000 ms one way, slack=1" in out
    with pytest.raises(SystemExit, match=r"lightning-ddg plan: slack=-1 is not a number of batches"):
        main(["plan", "--config", "config.yaml", "--slack", "-1"])
    with pytest.raises(SystemExit, match=r"lightning-ddg plan: latency_ms=-1.0 is not how long a message is under way"):
        main(["plan", "--config", "config.yaml", "--latency_ms", "-1"])
