"""Steps that return None skip their batch on every stage, in both executions, against the reference."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loops.optimization.automatic import Closure
from torch import Tensor

from lightning_ddg import DDGStrategy, Staleness
from tests import reference
from tests.harness import run_ranks, run_ranks_raw
from tests.integration.test_exact import EPOCHS, STARTS
from tests.networks import OPTIMIZERS, Classifier, largest_difference, loader, quiet_trainer, seeded_network, state_of

# Of 15 batches in 3 epochs: the first, one in the middle, two that follow each other, and an epoch's last.
SKIPPED = {0, 3, 6, 7, 14}
CASES = [("nesterov", "epoch"), ("adamw_fused", "fit"), ("adam", "never")]


class Skips(Classifier):
    """Returns no loss for some batches, before or after it has called the network, and notes what hooks get."""

    def __init__(self, *args: Any, when: str, skipped: set[int] = SKIPPED, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.when, self.skipped, self.number = when, skipped, -1
        self.outputs: list[bool] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.number += 1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        skips = self.number in self.skipped
        if skips and (self.when == "before" or (self.when == "both" and self.number % 2)):
            return None
        loss = super().training_step(batch, batch_idx)
        if skips:
            loss = loss * float("nan")
        return loss if torch.isfinite(loss) else None


class NotesOutputs(Skips):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append("loss" in outputs)


class HalvesLosses(Skips):
    """What SGD without momentum cannot tell from a skipped batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = Classifier.training_step(self, batch, batch_idx)
        return loss * 0 if self.number in self.skipped else loss


def fit(
    num_stages: int, devices: int, optimizer: str, drain: str, when: str, staleness: dict[str, Any], **trainer: Any
) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    kind = {"outputs": NotesOutputs, "zero": HalvesLosses}.get(when, Skips)
    module = kind("mlp", optimizer, when=when)
    points = [f"net.{start}" for start in STARTS[num_stages]]
    recompute = staleness.get("extrapolate", False)
    strategy = DDGStrategy(
        num_stages,
        points,
        drain=drain,
        recompute=recompute,
        staleness=Staleness(**staleness),  # type: ignore[arg-type]
    )
    strategy_or_plain: Any = "auto" if num_stages == 1 else strategy
    fitted = quiet_trainer(devices=devices, strategy=strategy_or_plain, max_epochs=EPOCHS, **trainer)
    fitted.fit(module, loader("mlp"))
    if when == "outputs" and fitted.is_global_zero:
        assert module.outputs == [number not in SKIPPED for number in range(15)]
    return state_of(module)


def fit_all(num_stages: int, cases: list[tuple[Any, ...]]) -> list[dict[str, Tensor]]:
    return [fit(num_stages, num_stages, *case) for case in cases]


def expected(num_stages: int, optimizer: str, drain: str) -> dict[str, Tensor]:
    net = seeded_network("mlp")
    assert isinstance(net, torch.nn.Sequential)
    stages = reference.flat_stages(net, STARTS[num_stages])
    batches = [list(loader("mlp"))] * EPOCHS
    reference.train(net, stages, batches, OPTIMIZERS[optimizer], scheduler, drain, SKIPPED)
    return {f"net.{name}": tensor for name, tensor in state_of(net).items()}


def scheduler(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.8)


WHEN = ["after", "before", "both", "outputs"]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_one_process_skips_as_the_reference_does(num_stages: int) -> None:
    for optimizer, drain in CASES:
        for when in WHEN:
            got = fit(num_stages, 1, optimizer, drain, when, {})
            assert largest_difference(got, expected(num_stages, optimizer, drain)) == 0.0, (optimizer, when)


@pytest.mark.parametrize("num_stages", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_skip_as_the_reference_does(num_stages: int) -> None:
    cases = [(optimizer, drain, when, {}) for optimizer, drain in CASES for when in WHEN]
    for states in run_ranks(fit_all, num_stages, num_stages, cases, timeout=240):
        for got, (optimizer, drain, when, _) in zip(states, cases, strict=True):
            assert largest_difference(got, expected(num_stages, optimizer, drain)) <= 1e-12, (optimizer, when)


RULES: list[dict[str, Any]] = [{"stash": False}, {"extrapolate": True}, {"shrink": 0.5, "slow_start": 6}]


def test_under_other_rules_both_executions_skip_alike() -> None:
    cases = [("nesterov", "epoch", when, rule) for rule in RULES for when in ("after", "before")]
    alone = [fit(3, 1, *case) for case in cases]
    for states in run_ranks(fit_all, 3, 3, cases, timeout=240):
        for got, one, case in zip(states, alone, cases, strict=True):
            assert largest_difference(got, one) <= 1e-12, case


def fit_accumulating(devices: int) -> list[dict[str, Tensor]]:
    cases: list[tuple[Any, ...]] = [("sgd", "epoch", when, {}) for when in ("after", "before", "zero")]
    return [fit(2, devices, *case, accumulate_grad_batches=2) for case in cases]


def test_accumulation_goes_on_over_skipped_batches() -> None:
    after, before, zero = fit_accumulating(1)
    assert largest_difference(after, zero) <= 1e-12
    assert largest_difference(before, zero) <= 1e-12
    for states in run_ranks(fit_accumulating, 2, 2):
        assert all(largest_difference(got, zero) <= 1e-12 for got in states)


def test_a_forgotten_loss_is_warned_of() -> None:
    Closure.warning_cache.clear()
    strategy = DDGStrategy(2, ["net.3"])
    module = Skips("mlp", when="after", skipped=set(range(5)))
    with pytest.warns(UserWarning, match="`training_step` returned `None`") as caught:
        quiet_trainer(devices=1, strategy=strategy, max_epochs=1).fit(module, loader("mlp"))
    assert largest_difference(state_of(module.net), state_of(seeded_network("mlp"))) == 0.0
    of_step = [one for one in caught if "returned `None`" in str(one.message)]
    assert [one.filename for one in of_step] == [__file__], "said once, in the line of the user's"


class Disagrees(Classifier):
    """Only the process that reads skips, by something that the others do not know."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.trainer.global_rank == 1 and batch_idx == 1 else super().training_step(batch, batch_idx)


def fit_disagreeing() -> None:
    strategy = DDGStrategy(2, ["net.3"])
    quiet_trainer(devices=2, strategy=strategy, max_epochs=1).fit(Disagrees("mlp"), loader("mlp"))


def test_processes_that_do_not_agree_which_batch_to_skip() -> None:
    last, first = run_ranks_raw(fit_disagreeing, 2)
    message = "returned None for batch 1 without a call of the network (`self.net`) on the process of stage 1"
    assert last.error is not None
    assert message in last.error
    assert "must follow from the batch" in last.error
    assert first.error is not None


class LooksAtLosses(Classifier):
    """Its `optimizer_step` looks at the loss, also where gradients are drained."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        loss = optimizer_closure()
        assert not loss.isnan()
        optimizer.step()


class WithoutOptimizer(Classifier):
    def configure_optimizers(self) -> Any:
        return None


def fit_and_save(devices: int, path: str) -> list[Any]:
    warnings.simplefilter("ignore")
    saved = []
    for kind in (LooksAtLosses, WithoutOptimizer):
        trainer = quiet_trainer(devices=devices, strategy=DDGStrategy(2, ["net.3"]), max_epochs=1)
        trainer.fit(kind("mlp"), loader("mlp"))
        trainer.save_checkpoint(f"{path}/{kind.__name__}.ckpt")
        saved.append(torch.load(f"{path}/{kind.__name__}.ckpt", weights_only=True)["optimizer_states"])
    return saved


def test_the_loss_of_the_drain_and_a_fit_without_an_optimizer(tmp_path: Path) -> None:
    alone = fit_and_save(1, str(tmp_path))
    assert run_ranks(fit_and_save, 2, 2, str(tmp_path))[0][1] == alone[1]
