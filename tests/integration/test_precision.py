"""Every precision that Lightning offers here: the two executions must agree, or it is refused with the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.networks import Classifier, largest_difference, loader, quiet_trainer, state_of

# The parameters' type, and how far apart the executions may end: their sums have another order only where gradients
# by two paths meet, so that most agree to the last bit.
CASES: dict[str, tuple[Any, torch.dtype, Callable[[], Classifier]]] = {
    "32-true": ("32-true", torch.float32, lambda: Classifier("transformer", "adam").float()),
    "64-true": ("64-true", torch.float64, lambda: Classifier("transformer", "adam").float()),
    "bf16-mixed": ("bf16-mixed", torch.float32, lambda: Classifier("transformer", "nesterov").float()),
    "bf16-mixed, clipped": ("bf16-mixed", torch.float32, lambda: Classifier("mlp", "adam").float()),
    "bf16-true": ("bf16-true", torch.bfloat16, lambda: Classifier("mlp", "sgd").float()),
    "16-true": ("16-true", torch.float16, lambda: Classifier("mlp", "sgd").float()),
}


def train(name: str, devices: int) -> tuple[dict[str, Tensor], list[str], dict[str, float]]:
    warnings.simplefilter("ignore")
    precision, _, make = CASES[name]
    module = make()
    computed: list[torch.dtype] = []

    class Notes(pl.Callback):
        # What finds and measures the layers, before, runs on every rank.
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.hook = module.net[-1].register_forward_hook(lambda layer, args, output: computed.append(output.dtype))

    flags: dict[str, Any] = {"gradient_clip_val": 0.1} if name.endswith("clipped") else {}
    strategy, notes = DDGStrategy(num_stages=3, split_points=["net.2", "net.5"]), Notes()
    trainer = quiet_trainer(devices=devices, strategy=strategy, precision=precision, callbacks=[notes], **flags)
    data = loader("transformer" if module.net[0].__class__ is torch.nn.Embedding else "mlp")
    tensors = data.dataset.tensors  # type: ignore[attr-defined]
    data.dataset.tensors = tuple(t.float() if t.is_floating_point() else t for t in tensors)  # type: ignore[attr-defined]
    trainer.fit(module, data, data)
    notes.hook.remove()
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return state_of(module), sorted({str(dtype) for dtype in computed}), metrics


def train_all(devices: int) -> list[Any]:
    return [train(name, devices) for name in CASES]


@pytest.fixture(scope="module")
def ranks() -> list[list[Any]]:
    return run_ranks(train_all, 3, 3, timeout=200)


@pytest.mark.parametrize("name", CASES)
def test_executions_agree(name: str, ranks: list[list[Any]]) -> None:
    precision, dtype, make = CASES[name]
    state, computed, metrics = train(name, 1)
    start = state_of(make())
    assert {value.dtype for value in state.values()} == {dtype}
    assert largest_difference(state, start) > 1e-3, "it has trained"
    lower = {"bf16": "torch.bfloat16", "16-t": "torch.float16", "32-t": "torch.float32", "64-t": "torch.float64"}
    assert computed == [lower[precision[:4]]]
    for rank, results in enumerate(ranks):
        got, got_computed, got_metrics = results[list(CASES).index(name)]
        assert {value.dtype for value in got.values()} == {dtype}
        assert largest_difference(got, state) <= (1e-12 if dtype == torch.float64 else 1e-6)
        assert got_computed == computed if rank == 0 else got_computed == []
        assert got_metrics == pytest.approx(metrics, abs=1e-6)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_a_scaled_loss_is_refused(num_stages: int) -> None:
    message = "precision='16-mixed' scales the loss.*skip.*on all stages.*Use precision='bf16-mixed'"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(devices=1, strategy=DDGStrategy(num_stages), plugins=MixedPrecision("16-mixed", "cpu"))


def test_lightning_turns_it_into_bf16_on_a_cpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(devices=1, strategy="ddg", precision="16-mixed")
    assert trainer.precision == "bf16-mixed"
