"""Tests of the optimizers that bear delayed gradients live here: they train a GPT in stages, in one process and two."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_optimizer import Muon
from pytorch_optimizer.optimizer.muon import base
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import nn

from lightning_ddg import DDGStrategy, Staleness
from recipes.gpt import GPT, LanguageModel
from recipes.optimizers import make_optimizer
from recipes.text import TextData
from tests.harness import run_ranks
from tests.networks import largest_difference, quiet_trainer, state_of

NAMES = ["adamw", "nadam", "muon", "soap"]
STEPS = 14


class Losses(LanguageModel):
    """Keeps what the loss was."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss


def train(
    name: str, path: str, devices: int = 1, stages: int = 2, steps: int = STEPS, resume: str | None = None, **rules: Any
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    warnings.simplefilter("ignore")
    # Muon computes in bfloat16, where the last bit of a sum decides about the third digit of a step.
    base.zero_power_via_newton_schulz_5 = partial(zero_power_via_newton_schulz_5, dtype=torch.float64)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    network = GPT(256, n_layers=2, width=16, heads=2, context=8, dropout=0.0).double()
    module = Losses(network, lr=0.01, warmup_steps=2, optimizer=name)  # type: ignore[arg-type]
    strategy = DDGStrategy(stages, ["network.blocks.1"], staleness=Staleness(**rules)) if stages > 1 else "auto"
    trainer = quiet_trainer(strategy=strategy, devices=devices, max_epochs=None, max_steps=steps, limit_val_batches=0)
    torch.manual_seed(1)
    trainer.fit(module, TextData(path, context=8, batch_size=16), ckpt_path=resume)
    return module.losses, state_of(module), trainer


def trained(name: str, path: str, devices: int, rules: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses, state, _ = train(name, path, devices, **rules)
    return losses, state


@pytest.mark.parametrize(
    "rules",
    [pytest.param({}, id="plain", marks=pytest.mark.slow), pytest.param({"extrapolate": True}, id="extrapolated")],
)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(name: str, rules: dict[str, Any], text_file: Path) -> None:
    losses, state = trained(name, str(text_file), 1, rules)
    (last_losses, last), _ = run_ranks(trained, 2, name, str(text_file), 2, rules)
    assert largest_difference(last, state) < 1e-9
    assert last_losses == pytest.approx(losses, rel=1e-9)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_training_goes_on(name: str, text_file: Path, tmp_path: Path) -> None:
    """Its state has lists, and counts in the groups: a fit that saves itself half-way ends as one that does not."""
    _, once, _ = train(name, str(text_file), steps=STEPS)
    torch.manual_seed(0)
    _, _, trainer = train(name, str(text_file), steps=STEPS)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    losses, state, after = train(name, str(text_file), steps=STEPS, resume=str(tmp_path / "end.ckpt"))
    assert losses == []
    assert largest_difference(state, once) == 0
    kept, again = trainer.optimizers[0].state_dict(), after.optimizers[0].state_dict()
    assert kept["param_groups"] == again["param_groups"]
    assert kept["state"].keys() == again["state"].keys()


def test_muon_is_for_matrices_between_hidden_layers(text_file: Path) -> None:
    _, _, trainer = train("muon", str(text_file), stages=1, steps=1)
    network = trainer.lightning_module.network
    names = {parameter: name for name, parameter in network.named_parameters()}
    matrices, head, others = trainer.optimizers[0].param_groups
    assert isinstance(trainer.optimizers[0], Muon)
    assert [group["use_muon"] for group in (matrices, head, others)] == [True, False, False]
    assert len(matrices["params"]) == 8
    assert all(names[one].startswith("blocks") and one.ndim == 2 for one in matrices["params"])
    assert [names[one] for one in head["params"]] == ["head.weight"]
    assert {"token.weight", "position"} <= {names[one] for one in others["params"]}


def test_nadams_momentum_rises_over_the_whole_training() -> None:
    optimizer = make_optimizer("nadam", [nn.Parameter(torch.ones(2, 2))], [], [nn.Parameter(torch.ones(2))], 1, 0, 400)
    assert optimizer.param_groups[0]["momentum_decay"] == 0.5
    assert optimizer.param_groups[0]["betas"] == (0.99, 0.999)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer='adam': give one of 'adamw', 'nadam', 'muon', 'soap'"):
        make_optimizer("adam", [], [], [], 1, 0, 1)  # type: ignore[arg-type]
