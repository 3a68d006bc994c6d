"""Tests of ``replica.py``: what is the module's is copied, what is the fit's is not; a step changes neither."""

from __future__ import annotations

import threading
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader

from lightning_ddg import DDGStrategy
from lightning_ddg.plugin.redirection import StepDone
from lightning_ddg.plugin.replica import replica_of
from tests.networks import Classifier, ManualClassifier, dataset, loader, quiet_trainer, state_of


class Seen(pl.Callback):
    """Copies the module in the middle of a fit, and lets the test look at both."""

    def __init__(self, look: Any) -> None:
        self.look, self.done = look, 0
        self.hooked: list[int] = []

    def hook(self, *_: Any) -> None:
        self.hooked.append(1)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not self.done:
            handle = pl_module.net[0].register_forward_hook(self.hook)  # type: ignore[index, operator, union-attr]
            self.look(pl_module, *replica_of(pl_module))
            handle.remove()
            assert not self.hooked
            self.done += 1


def fit(module: pl.LightningModule, look: Any, **kwargs: Any) -> None:
    seen = Seen(look)
    quiet_trainer(callbacks=[seen], max_epochs=1, limit_train_batches=1, devices=1, **kwargs).fit(
        module, DataLoader(dataset("mlp"), batch_size=5)
    )
    assert seen.done


@pytest.mark.parametrize("strategy", ["auto", DDGStrategy(split_points=["net.3"], verify=False)])
def test_a_copy_has_all_of_its_own(strategy: Any) -> None:
    module = Classifier()
    module.kept = {"list": [torch.ones(2)], "generator": torch.Generator().manual_seed(3)}
    module.counts = []
    module.net[1].register_forward_hook(lambda *_: module.counts.append(module.kept))
    module.data = dataset("mlp")
    module.function = lambda x: module.net(x)
    module.functional = nn.functional

    def look(original: Any, copy: Any, memo: dict[int, Any]) -> None:
        x = original.data[0][0][None]
        assert not {*map(id, original.parameters())} & {*map(id, copy.parameters())}
        assert all(memo[id(a)] is b for a, b in zip(original.modules(), copy.modules(), strict=True))
        copy.function(x).sum().backward()
        assert all(parameter.grad is None for parameter in original.parameters())
        assert all(parameter.grad is not None for parameter in copy.parameters())
        assert original.counts == []
        assert copy.counts == [copy.kept]
        copy.kept["list"].append(1)
        torch.rand(2, generator=copy.kept["generator"])
        assert len(original.kept["list"]) == 1
        assert original.kept["generator"].get_state().equal(torch.Generator().manual_seed(3).get_state())
        assert copy.data is original.data
        assert copy.functional is nn.functional
        assert vars(copy.net).get("forward") is None

    fit(module, look, strategy=strategy)


def test_what_belongs_to_the_fit_can_be_read_and_does_nothing() -> None:
    def look(original: Any, copy: Any, memo: dict[int, Any]) -> None:
        before = state_of(original)
        optimizer = copy.optimizers()
        assert isinstance(optimizer, type(original.optimizers()))
        assert isinstance(copy.trainer, pl.Trainer)
        assert copy.current_epoch == 0
        assert copy.trainer.max_epochs == 1
        copy.trainer.should_stop = True
        optimizer.param_groups[0]["lr"] = 7.0
        copy.toggle_optimizer(optimizer)
        with optimizer.toggle_model():
            optimizer.zero_grad()
        copy.untoggle_optimizer(optimizer)
        copy.lr_schedulers().step()
        optimizer.step()
        copy.log("x", 1)
        copy.log_dict({"y": 1})
        copy.print("nothing")
        copy.trainer.save_checkpoint("nowhere")
        with pytest.raises(StepDone):
            copy.training_step((torch.ones(2, 6).double(), torch.tensor([0, 1])), 0)
        assert next(copy.parameters()).grad is not None
        assert not original.trainer.should_stop
        assert original.trainer.global_step == 0
        assert original.optimizers().param_groups[0]["lr"] == 0.05
        assert all(before[name].equal(tensor) for name, tensor in state_of(original).items())
        assert not original.trainer.callback_metrics

    fit(ManualClassifier(), look)


class Normed(Classifier):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.utils.weight_norm(nn.Linear(6, 6)),
            parametrizations.spectral_norm(nn.Linear(6, 6)),
            parametrizations.weight_norm(nn.Linear(6, 6)),
            nn.Linear(6, 3),
        ).double()
        self.net(torch.ones(2, 6).double())


def test_normed_weights_are_those_of_the_copy() -> None:
    def look(original: Any, copy: Any, memo: dict[int, Any]) -> None:
        copy.net(torch.ones(2, 6).double()).sum().backward()
        assert all(parameter.grad is None for parameter in original.parameters())
        assert all(parameter.grad is not None for parameter in copy.parameters())

    fit(Normed(), look)


def test_hooks_of_a_parameter_change_its_gradient_there_too() -> None:
    module = Classifier()
    calls: list[int] = []

    def triple(grad: Tensor) -> Tensor:
        calls.append(1)
        return 3 * grad

    module.net[6].bias.register_hook(triple)

    def look(original: Any, copy: Any, memo: dict[int, Any]) -> None:
        copy.net(torch.ones(2, 6).double()).sum().backward()
        assert copy.net[6].bias.grad.tolist() == [6.0] * 3
        assert calls == []

    fit(module, look)


def test_what_cannot_be_copied_is_an_error() -> None:
    module = Classifier()
    module.lock = threading.Lock()

    def look(original: Any, copy: Any, memo: dict[int, Any]) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match="lock"):
        fit(module, look)
    module = Classifier()
    module.net[0].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(TypeError, match="register_post_accumulate_grad_hook"):
        fit(module, look)


def test_a_loader_is_not_copied() -> None:
    module = Classifier()
    module.loaders = [loader("mlp")]
    fit(module, lambda original, copy, memo: None if copy.loaders[0] is original.loaders[0] else pytest.fail("copied"))
