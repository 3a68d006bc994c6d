"""Tests of ``verify.py`` and ``backprop.py`` in one process: how often the step runs, which draws, and what is said."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_ddg import DDGMixin, DDGStrategy
from lightning_ddg.plugin import backprop
from lightning_ddg.plugin.options import Options
from tests.networks import SAFELY, Classifier, loader, quiet_trainer, state_of

STEPS: list[int] = []


class Counted(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        STEPS.append(batch_idx)
        return super().training_step(batch, batch_idx)


def fit(module: pl.LightningModule, verify: bool = True, points: list[str] | None = None, **kwargs: Any) -> list[str]:
    """Fit in one process; return the warnings of the proof."""
    strategy = DDGStrategy(num_stages=2 if points is None else len(points) + 1, split_points=points, verify=verify)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(devices=1, strategy=strategy, **{"max_epochs": 2, **kwargs}).fit(module, loader("mlp"))
    return [str(entry.message) for entry in caught if "first batch's gradients" in str(entry.message)]


@pytest.mark.parametrize("verify", [True, False])
def test_the_step_runs_once_more_in_a_fit(verify: bool) -> None:
    """And once before it, which shows what it calls."""
    STEPS.clear()
    assert fit(Counted(), verify, ["net.3"]) == []
    assert [0] * (1 + verify) + [0, 1, 2, 3, 4] * 2 == STEPS


def test_one_stage_is_not_verified() -> None:
    STEPS.clear()
    quiet_trainer(devices=1, max_epochs=1, strategy=DDGStrategy(num_stages=1)).fit(Counted(), loader("mlp"))
    assert STEPS == [0, 1, 2, 3, 4]


def test_verify_is_a_bool() -> None:
    with pytest.raises(TypeError, match="verify='no' is not a bool. Use True or False"):
        Options(verify="no")  # type: ignore[arg-type]


# ---- draws


class Drawing(nn.Module):
    """Draws from all generators that are known."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (0.5 + torch.rand(1).item()) * (0.5 + random.random()) * (0.5 + np.random.rand())


class Checkpointed(nn.Module):
    """The blocks, each with dropout, are run again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()) for _ in range(3))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.first(x), 0.5)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


class Untraceable(nn.Module):
    """Code that no recording can follow, and draws between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().max()) > 1e9:
            raise ValueError("too large")
        for layer in self.layers[:-1]:  # type: ignore[attr-defined]
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.5)
        return self.layers[-1](x)


class Reused(DDGMixin, Classifier):
    """One dropout, called three times, begins the second stage at its second call."""

    def __init__(self) -> None:
        super().__init__()
        drop = nn.Dropout(0.5)
        self.net = nn.Sequential(nn.Linear(6, 8), drop, nn.Linear(8, 8), drop, nn.Linear(8, 8), drop, nn.Linear(8, 3))
        self.net.double()

    def configure_stages(self) -> Any:
        return list(self.net)


def network(make: Callable[[], nn.Module]) -> Classifier:
    module = Classifier()
    torch.manual_seed(4)
    module.net = make().double()
    return module


def drawing() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), Drawing(), nn.Linear(8, 8), Drawing(), nn.Linear(8, 3), Drawing())


@pytest.mark.parametrize(
    ("make", "points"),
    [
        (lambda: network(drawing), ["net.2"]),
        (lambda: network(drawing), ["net.1", "net.4"]),
        (lambda: network(Checkpointed), ["net.blocks.1.0"]),
        (lambda: network(Checkpointed), None),
        (lambda: network(Untraceable), None),
        (Reused, ["net.2"]),
        (Reused, ["net.4"]),
    ],
)
def test_stages_and_the_whole_draw_alike(make: Callable[[], Classifier], points: list[str] | None) -> None:
    module = make()
    assert fit(module, points=points) == []
    assert not any("_compiled_call_impl" in vars(part) for part in module.modules())


# ---- not verified, and said so


def test_a_module_that_cannot_be_copied_trains_with_a_warning() -> None:
    module, expected = Classifier(), Classifier()
    module.lock = threading.Lock()
    (said,) = fit(module, points=["net.3"])
    assert "not compared with those of plain backpropagation, as Classifier cannot be copied (TypeError: " in said
    assert "lock" in said
    assert "DDGStrategy(verify=False)" in said
    assert fit(expected, False, ["net.3"]) == []
    assert all(state_of(expected)[name].equal(tensor) for name, tensor in state_of(module).items())


class Once(Classifier):
    ran: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.ran.append(1)
        if len(self.ran) == 2:
            raise KeyError("only once")
        return super().training_step(batch, batch_idx)


def test_a_step_that_fails_on_the_copy_trains_with_a_warning() -> None:
    Once.ran.clear()
    (said,) = fit(Once(), points=["net.3"])
    assert "as the training step could not be run on a copy of the module (KeyError: 'only once')" in said


class Holder:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: Any) -> Holder:
        return self


class ReachesBack(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.holder.module(batch[0]), batch[1])


def test_a_copy_that_uses_the_original_is_found_out() -> None:
    module, expected = ReachesBack(), ReachesBack()
    (said,) = fit(module, points=["net.3"])
    assert "as a copy of the module goes on using the original's parameters" in said
    assert fit(expected, False, ["net.3"]) == []
    assert all(state_of(expected)[name].equal(tensor) for name, tensor in state_of(module).items())


def test_a_fit_too_short_for_all_stages_says_so() -> None:
    strategy = DDGStrategy(num_stages=3, split_points=["net.3", "net.5"], drain="never")
    trainer = quiet_trainer(devices=1, strategy=strategy, max_epochs=1, limit_train_batches=2)
    with pytest.warns(
        UserWarning, match="only in part compared .* the training ended before those of stage 1 were due"
    ):
        trainer.fit(Classifier(), loader("mlp"))


def test_memory_that_is_too_small() -> None:
    with mock.patch.object(backprop, "_run", side_effect=torch.OutOfMemoryError):
        (said,) = fit(Classifier(), points=["net.3"])
    assert "as the whole module fits neither cpu nor the host's memory" in said


def test_compiled_draws_are_others() -> None:
    class Compiled:
        compile_options: dict[str, Any] = {}

    strategy = DDGStrategy(num_stages=2, split_points=["net.3"])
    module = Classifier("dropout_mlp")
    original = backprop._run

    def run(site: Any, *args: Any) -> Any:
        proxy = mock.Mock(wraps=site, module=site.module, device=site.device, precision=site.precision)
        proxy.trainer, proxy.options = site.trainer, Compiled
        return original(proxy, *args)

    with mock.patch.object(backprop, "_run", run), pytest.warns(UserWarning, match="what is compiled draws others"):
        quiet_trainer(devices=1, strategy=strategy, max_epochs=1).fit(module, loader("mlp"))


# ---- more


def test_a_resumed_fit_is_verified_with_the_recorded_cut(tmp_path: Path) -> None:
    first = quiet_trainer(devices=1, strategy=DDGStrategy(num_stages=2), max_epochs=1)
    first.fit(Classifier("noisy_mlp"), loader("mlp"))
    first.save_checkpoint(tmp_path / "a.ckpt")
    module, strategy = Counted("noisy_mlp"), DDGStrategy(num_stages=2)
    trainer = quiet_trainer(devices=1, strategy=strategy, max_epochs=2)
    STEPS.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader("mlp"), ckpt_path=str(tmp_path / "a.ckpt"), **SAFELY)
    assert STEPS[-6:] == [0, 0, 1, 2, 3, 4]
    assert not [entry for entry in caught if "first batch's gradients" in str(entry.message)]


class Twice(Classifier):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(retain_graph=True)
        (2 * loss).backward()


def test_a_backward_of_the_users_in_two_passes_is_verified_as_it_is() -> None:
    assert fit(Twice(), points=["net.3"]) == []


def test_the_loss_counts_even_where_all_gradients_are_the_same() -> None:
    class Shifted(Classifier):
        shifts = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            Shifted.shifts += 1.0
            return super().training_step(batch, batch_idx) + Shifted.shifts

    with pytest.raises(RuntimeError, match="All gradients are the same, but the loss is .* instead of "):
        fit(Shifted(), points=["net.3"])
