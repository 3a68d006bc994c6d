"""The update rules against their formulas, and `recompute` against keeping activations; both executions, in float64."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_ddg import DDGMonitor, DDGStrategy, Staleness
from lightning_ddg.cli import main
from tests.core import staleness_reference as reference
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

EPOCHS = 2
COUNT = 37  # samples: 8 batches of 5 an epoch, the last one of 2
STARTS = {1: [], 2: [3], 3: [2, 5], 4: [1, 3, 5]}

# By name: the options, and the oracle.
RULES: dict[str, tuple[dict[str, Any], Callable[..., None]]] = {
    "shrink": ({"shrink": 0.5}, partial(reference.train_exactly, shrink=0.5)),
    "slow start": ({"slow_start": 11}, partial(reference.train_exactly, slow_start=11)),
    "extrapolate": ({"extrapolate": True}, partial(reference.train_exactly, extrapolate=True)),
    "all three": (
        {"shrink": 0.7, "slow_start": 5, "extrapolate": True},
        partial(reference.train_exactly, shrink=0.7, slow_start=5, extrapolate=True),
    ),
    "current weights": ({"stash": False}, reference.train_with_current_weights),
    "current weights, shrunk": (
        {"stash": False, "shrink": 0.5},
        partial(reference.train_with_current_weights, shrink=0.5),
    ),
    "features replay": ({"stash": False, "recompute": True}, reference.train_with_features_replayed),
    "features replay, slow start": (
        {"stash": False, "recompute": True, "slow_start": 11},
        partial(reference.train_with_features_replayed, slow_start=11),
    ),
}
# Together they have every option.
MIXED = ("all three", "current weights, shrunk", "features replay, slow start")
CASES = [*((rule, "nesterov") for rule in RULES), *((rule, "adam") for rule in MIXED)]


def strategy(num_stages: int, recompute: bool = False, drain: Any = "epoch", **options: Any) -> DDGStrategy:
    return DDGStrategy(
        num_stages=num_stages,
        split_points=[f"net.{start}" for start in STARTS[num_stages]],
        drain=drain,
        recompute=recompute,
        staleness=Staleness(**options) if options else None,
    )


def fit(
    network: str,
    optimizer: str,
    num_stages: int,
    devices: int,
    options: dict[str, Any],
    make: type[Classifier] = Classifier,
    accumulate: int = 1,
) -> dict[str, torch.Tensor]:
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    module = make(network, optimizer, step_lr=False)
    trainer = quiet_trainer(
        devices=devices,
        strategy=strategy(num_stages, **options),
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, loader(network, COUNT))
    return state_of(module)


def expected(rule: str, optimizer: str, num_stages: int, **more: Any) -> dict[str, torch.Tensor]:
    net = seeded_network("tanh_mlp")
    RULES[rule][1](net, STARTS[num_stages], [list(loader("tanh_mlp", COUNT))] * EPOCHS, OPTIMIZERS[optimizer], **more)
    return {f"net.{name}": tensor for name, tensor in state_of(net).items()}


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize(("rule", "optimizer"), CASES)
def test_one_process_follows_the_formula(rule: str, optimizer: str, num_stages: int) -> None:
    wanted = expected(rule, optimizer, num_stages)
    got = fit("tanh_mlp", optimizer, num_stages, 1, RULES[rule][0])
    assert largest_difference(got, wanted) <= 1e-12
    plain = fit("tanh_mlp", optimizer, num_stages, 1, {})
    # With a delay of 1 the slow start divides by 1; without one nothing is stale.
    without_effect = num_stages == 1 or (rule == "slow start" and num_stages == 2)
    assert (largest_difference(got, plain) < 1e-9) == without_effect, "it could not tell this rule from another"


def fit_all(num_stages: int) -> list[Any]:
    return [fit("tanh_mlp", optimizer, num_stages, num_stages, RULES[rule][0]) for rule, optimizer in CASES]


@pytest.mark.parametrize(
    "num_stages", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_processes_follow_the_formula(num_stages: int) -> None:
    ranks = run_ranks(fit_all, num_stages, num_stages, timeout=240)
    for index, (rule, optimizer) in enumerate(CASES):
        wanted = expected(rule, optimizer, num_stages)
        for states in ranks:
            assert largest_difference(states[index], wanted) <= 1e-12, (rule, optimizer)


# ---- the same, combined with what Lightning can do

COMBINED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("tanh_mlp", RULES[rule][0], {"make": ManualClassifier}) for rule in MIXED),
    *(("tanh_mlp", RULES[rule][0], {"accumulate": 3}) for rule in MIXED),
    *(("mlp", {**RULES[rule][0], "drain": "never"}, {}) for rule in MIXED),
    *(("noisy_mlp", {**RULES[rule][0], "drain": "fit"}, {}) for rule in MIXED),
]


def fit_combined(devices: int) -> list[Any]:
    return [fit(network, "nesterov", 3, devices, options, **more) for network, options, more in COMBINED]


def test_both_executions_agree_in_all_combinations() -> None:
    # In a process of its own, too: what other tests have seeded here would change the draws.
    (alone,) = run_ranks(fit_combined, 1, 1, timeout=240)
    for states in run_ranks(fit_combined, 3, 3, timeout=240):
        for case, got, wanted in zip(COMBINED, states, alone, strict=True):
            assert largest_difference(got, wanted) <= 1e-12, case


@pytest.mark.parametrize("rule", ["shrink", "slow start", "extrapolate", "all three"])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_follows_the_formula(rule: str, accumulate: int) -> None:
    got = fit("tanh_mlp", "nesterov", 4, 1, RULES[rule][0], accumulate=accumulate)
    assert largest_difference(got, expected(rule, "nesterov", 4, accumulate=accumulate)) <= 1e-12


# ---- recompute: a matter of memory, not of numbers

RECOMPUTED = [
    ("noisy_mlp", {}, Classifier),
    ("noisy_mlp", {"drain": "never"}, Classifier),
    ("noisy_mlp", {"extrapolate": True, "slow_start": 5}, Classifier),
    ("dropout_mlp", {}, ManualClassifier),
    ("convnet", {}, Classifier),
    ("transformer", {}, Classifier),
]


def fit_recomputed(num_stages: int, recompute: bool) -> list[Any]:
    return [
        fit(network, "nesterov", num_stages, num_stages, {**options, "recompute": recompute}, make)
        for network, options, make in RECOMPUTED
    ]


def test_recomputing_changes_nothing() -> None:
    kept, recomputed = run_ranks(fit_recomputed, 3, 3, False), run_ranks(fit_recomputed, 3, 3, True)
    for before, after in zip(kept, recomputed, strict=True):
        for case, a, b in zip(RECOMPUTED, before, after, strict=True):
            assert largest_difference(a, b) == 0.0, case


def fit_compiled(recompute: bool) -> dict[str, torch.Tensor]:
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    module = Classifier("noisy_mlp", "nesterov", step_lr=False)
    compiled = DDGStrategy(split_points=["net.4"], compile={"backend": "aot_eager"}, recompute=recompute)
    quiet_trainer(devices=2, strategy=compiled, max_epochs=EPOCHS).fit(module, loader("noisy_mlp", COUNT))
    return state_of(module)


@pytest.mark.slow
def test_compiled_stages_can_be_recomputed() -> None:
    kept, recomputed = run_ranks(fit_compiled, 2, False), run_ranks(fit_compiled, 2, True)
    for a, b in zip(kept, recomputed, strict=True):
        assert largest_difference(a, b) == 0.0


# ---- a checkpoint goes on with the slow start where it was


def test_a_slow_start_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    def run(epochs: int, path: str | None = None) -> tuple[Any, Any]:
        module = Classifier("tanh_mlp", "adam", step_lr=False)
        trainer = quiet_trainer(devices=1, strategy=strategy(4, slow_start=11), max_epochs=epochs)
        trainer.fit(module, loader("tanh_mlp", COUNT), ckpt_path=path)
        return trainer, state_of(module)

    trainer, _ = run(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    assert largest_difference(run(2, str(tmp_path / "first.ckpt"))[1], run(2)[1]) == 0.0


# ---- options


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
    init_args:
      num_stages: 4
      recompute: true
      staleness: {stash: false, shrink: 0.5}
model:
  class_path: tests.networks.Classifier
  init_args: {network: tanh_mlp}
data:
  class_path: tests.integration.test_staleness.Data
"""


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader("tanh_mlp")


SEEN: list[DDGStrategy] = []


def test_options_from_a_yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-ddg"])
    monkeypatch.setattr(DDGStrategy, "on_train_start", lambda self: SEEN.append(self))
    main(["fit", "--config", "config.yaml", "--trainer.strategy.init_args.staleness.slow_start=7"])
    (made,) = SEEN
    assert made.staleness == Staleness(stash=False, shrink=0.5, slow_start=7)
    assert made._options.recompute
    with pytest.raises(ValueError, match="shrink=2.0 is not a factor that shrinks"):
        main(["fit", "--config", "config.yaml", "--trainer.strategy.init_args.staleness.shrink=2"])
    corrected = "--trainer.strategy.init_args.staleness=corrected"
    main(["fit", "--config", "config.yaml", corrected, "--trainer.strategy.init_args.recompute=false"])
    assert SEEN[1].staleness == Staleness(extrapolate=True)
    assert SEEN[1]._options.micro_batches == "auto"


@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        ("adam", "by Adam's own recursion, and"),
        ("rmsprop", "on the line of the last step, as none is known for RMSprop"),
    ],
)
def test_what_is_chosen_is_said(optimizer: str, how: str, caplog: pytest.LogCaptureFixture) -> None:
    module = Classifier("tanh_mlp", "adam")
    if optimizer == "rmsprop":
        module.configure_optimizers = lambda: torch.optim.RMSprop(module.parameters(), lr=1e-3)  # type: ignore[method-assign]
    chosen = DDGStrategy(3, split_points=["net.2", "net.5"], staleness="corrected")
    quiet_trainer(devices=1, strategy=chosen, max_epochs=1).fit(module, loader("tanh_mlp", COUNT))
    (said,) = [line for line in caplog.messages if line.startswith("Stale gradients are corrected")]
    assert how in said
    assert said.endswith("a batch travels in up to 2 micro-batches.")


def test_a_strategy_with_options_pickles() -> None:
    again = pickle.loads(pickle.dumps(strategy(3, recompute=True, shrink=0.5)))
    assert again.staleness == Staleness(shrink=0.5)


def test_a_monitor_of_todays_weights(tmp_path: Path) -> None:
    monitor = DDGMonitor(every_n_steps=1)
    chosen, module = strategy(3, stash=False), Classifier("tanh_mlp")
    trainer = quiet_trainer(devices=1, strategy=chosen, callbacks=[monitor], max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(module, loader("tanh_mlp", COUNT))
    assert monitor._gathering is not None
    totals = monitor._gathering.totals
    assert {stage: tally.delay / tally.due for stage, tally in totals.items()} == {1: 2.0, 2: 1.0, 3: 0.0}
    assert [tally.norms for tally in totals.values()].count(0.0) == 2, "weights that are not kept cannot be compared"
    refused = quiet_trainer(devices=1, strategy=strategy(3, stash=False), callbacks=[DDGMonitor(cosine=True)])
    with pytest.raises(ValueError, match=r"cosine=True.*none with Staleness\(stash=False\). Leave out one"):
        refused.fit(module, loader("tanh_mlp"))
