"""Everything that is refused, with the value and the remedy in the message; in one process or several."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ddg import DDGMixin, DDGStrategy, Staleness
from tests.harness import run_ranks, run_ranks_raw
from tests.networks import BEFORE_2_6, Classifier, ManualClassifier, dataset, loader, quiet_trainer

RULES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"shrink": 0}, ValueError, "shrink=0 is not a factor that shrinks. Use one above 0 and up to 1"),
    ({"shrink": 1.5}, ValueError, "shrink=1.5 is not a factor that shrinks"),
    ({"shrink": float("nan")}, ValueError, "shrink=nan is not a factor that shrinks"),
    ({"shrink": "half"}, TypeError, "shrink='half' is not a number. Use one above 0 and up to 1"),
    ({"slow_start": -1}, ValueError, r"slow_start=-1 is not a number of steps. Use 0 \(none\) or more"),
    ({"slow_start": 0.5}, TypeError, "slow_start=0.5 is not a number of steps. Use an integer"),
    ({"stash": 0}, TypeError, "stash=0 is not a bool. Use True or False"),
    ({"extrapolate": "yes"}, TypeError, "extrapolate='yes' is not a bool"),
    ({"compensate": 1}, TypeError, "compensate=1 is not a bool"),
    ({"extrapolate": True, "stash": False}, ValueError, "extrapolate=True .* stash=False .*Leave out one of the two"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), RULES, ids=[str(a[0]) for a in RULES])
def test_update_rules(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Staleness(**arguments)


def test_todays_weights_in_a_backward_of_casts() -> None:
    def fit(recompute: bool) -> None:
        strategy = DDGStrategy(2, balance="parameters", recompute=recompute, staleness=Staleness(stash=False))
        trainer = quiet_trainer(devices=1, strategy=strategy, precision="bf16-mixed", max_epochs=1)
        trainer.fit(Classifier("mlp"), loader("mlp"))

    with pytest.raises(ValueError, match="stash=False .*precision='bf16-mixed' keeps copies.*Use recompute=True"):
        fit(False)
    fit(True)


class ClosesTwice(torch.optim.SGD):
    """Runs its closure twice, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


class TwiceTrained(Classifier):
    def configure_optimizers(self) -> Any:
        return ClosesTwice(self.parameters(), lr=0.1)


def test_an_optimizer_that_runs_the_step_twice() -> None:
    trainer = quiet_trainer(devices=1, strategy=DDGStrategy(2, balance="parameters"), max_epochs=1)
    with pytest.raises(RuntimeError, match="ClosesTwice runs the training step a second time .*number 0.*once"):
        trainer.fit(TwiceTrained("mlp"), loader("mlp"))


def fit_with_a_sampler(replicas: int) -> str:
    data = dataset("mlp", 8)
    sampler = DistributedSampler(data, replicas, 0)
    try:
        trainer = quiet_trainer(devices=2, strategy=DDGStrategy(balance="parameters"), max_epochs=1)
        trainer.fit(Classifier("mlp"), DataLoader(data, 4, sampler=sampler))
    except ValueError as error:
        return str(error)
    return "trained"


def test_a_sampler_that_leaves_data_out() -> None:
    for message in run_ranks(fit_with_a_sampler, 2, 2):
        assert re.search("DistributedSampler with num_replicas=2.*Leave the sampler out .shuffle=True", message)
    assert run_ranks(fit_with_a_sampler, 2, 1) == ["trained"] * 2


class KeepsLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6).double()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh()
        self.aux = y.square().mean()
        self.seen = [y.detach()]
        return y  # type: ignore[no-any-return]


def fit_with_kept_loss() -> list[str]:
    module = Classifier("mlp")
    module.net.insert(0, KeepsLoss())
    module.net.insert(1, nn.utils.weight_norm(nn.Linear(6, 6).double()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = DDGStrategy(split_points=["net.4"])
        quiet_trainer(devices=2, strategy=strategy, max_epochs=1).fit(module, loader("mlp"))
    return [str(one.message) for one in caught if "leaves tensors" in str(one.message)]


def test_a_loss_that_a_layer_keeps_to_itself() -> None:
    last, first = run_ranks(fit_with_kept_loss, 2)
    assert last == []
    (message,) = first
    assert re.search(
        r"Stage 1 leaves tensors .*attributes of its layers, or their hooks do \(\S*net.0.aux\).*return them from the",
        message,
    )


class Penalised(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.net[0].weight.square().sum()


def test_a_loss_on_weights_of_other_stages_with_todays_weights() -> None:
    strategy = DDGStrategy(2, split_points=["net.3"], staleness=Staleness(stash=False))
    with pytest.raises(RuntimeError, match="The loss uses the parameter 'net.0.weight' directly.*stage 1"):
        quiet_trainer(devices=1, strategy=strategy).fit(Penalised(), loader("mlp"))


def test_number_of_processes() -> None:
    with pytest.raises(ValueError, match="num_stages=4 stages cannot be trained by 2 processes.*devices=4"):
        quiet_trainer(devices=2, strategy=DDGStrategy(num_stages=4))
    with pytest.raises(ValueError, match=r"split_points=\['net.3'\] make 2 stages, but there are 3 processes"):
        quiet_trainer(devices=3, strategy=DDGStrategy(split_points=["net.3"]))


def test_a_memory_limit_in_one_process() -> None:
    with pytest.raises(
        ValueError, match="max_memory=1000 bytes limits a stage's device, but with one process.*Leave it out"
    ):
        quiet_trainer(devices=1, strategy=DDGStrategy(max_memory="1kB"))


def fit_within(max_memory: int) -> list[list[str]] | str:
    warnings.simplefilter("ignore")
    strategy = DDGStrategy(max_memory=max_memory)
    try:
        quiet_trainer(devices=2, strategy=strategy, max_epochs=1).fit(Classifier("mlp"), loader("mlp"))
    except ValueError as error:
        return str(error)
    return strategy.stage_parameter_names


def test_a_memory_limit_in_two_processes() -> None:
    small, large = run_ranks(fit_both, 2)
    assert all("max_memory=100 bytes cannot be kept with 2 stages" in said[0] for said in (small, large))
    assert all(len(said[1]) == 2 for said in (small, large))


def fit_both() -> list[Any]:
    return [fit_within(100), fit_within(100_000)]


def test_one_process_takes_the_number_of_stages_from_the_split_points() -> None:
    assert quiet_trainer(devices=1, strategy=DDGStrategy()).strategy.num_stages == 2
    assert quiet_trainer(devices=1, strategy=DDGStrategy(split_points=["a", "b"])).strategy.num_stages == 3


def test_mixed_precision_of_the_trainer() -> None:
    with pytest.raises(ValueError, match="precision='16-mixed'.*bf16-mixed"):
        quiet_trainer(devices=1, strategy="ddg", plugins=MixedPrecision("16-mixed", "cpu"))


class TwoOptimizers(ManualClassifier):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[:3].parameters(), lr=0.1), torch.optim.Adam(self.net[3:].parameters())]


class Lbfgs(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Twice(ManualClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward((self(batch[0]) + self(batch[0])).mean())


class Never(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[0].mean().requires_grad_()


class OneByOne(ManualClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        for layer in self.net:
            x = layer(x)
        self.manual_backward(x.mean())


class WithoutGradients(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            return self(batch[0]).mean()


class TrainedInput(ManualClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6).double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self(self.before(batch[0])).mean())


class NoBackward(ManualClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0]).mean().backward()
        self.optimizers().step()


class TwoBackwards(ManualClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        output = self(batch[0])
        self.manual_backward(output.mean(), retain_graph=True)
        self.manual_backward(output.sum())


class TiedOutside(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 10).double()
        self.head.weight = self.net[0].weight


class NotSequential(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(4, 2, 1, 1, 8)


class DataloaderIter(Classifier):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return self(batch[0]).mean()


Case = tuple[Callable[[], pl.LightningModule], dict[str, Any], dict[str, Any], str]
EVERYWHERE: dict[str, Case] = {
    "too many stages": (
        Classifier,
        {"split_points": None},
        {},
        "num_stages=8, but the network has 7 layers.*7 or less",
    ),
    "unknown split point": (Classifier, {"split_points": ["net.9"]}, {}, "'net.9'"),
    "two optimizers": (
        TwoOptimizers,
        {},
        {},
        r"returned 2 optimizers \(SGD, Adam\).*one optimizer with parameter groups",
    ),
    "lbfgs": (Lbfgs, {}, {}, "LBFGS evaluates the loss several times.*SGD or AdamW"),
    "twice": (Twice, {}, {}, "`self.net`. was called 2 times in one training step.*Concatenate"),
    "never": (Never, {}, {}, "`training_step` did not call the network .`self.net`"),
    "without gradients": (WithoutGradients, {}, {}, "`self.net`. was called under `torch.no_grad`"),
    "trained input": (
        TrainedInput,
        {},
        {},
        "An input of the network .`self.net`. requires a gradient.*configure_stages",
    ),
    "no backward": (NoBackward, {}, {}, "NoBackward.training_step` ended without `self.manual_backward"),
    "two backwards": (TwoBackwards, {}, {}, "`manual_backward` was called more than once.*Add the losses up"),
    "tied outside": (TiedOutside, {}, {}, "'head.weight' is tied to one of stage 1.*Untie it"),
    "not sequential": (NotSequential, {}, {}, "configure_stages"),
    "sync_batchnorm": (Classifier, {}, {"sync_batchnorm": True}, "sync_batchnorm=True.*Remove sync_batchnorm=True"),
}
PROCESSES_ONLY: dict[str, Case] = {
    "time-based validation": (
        Classifier,
        {},
        {"val_check_interval": "00:00:00:05"},
        "`val_check_interval` .5.0 seconds.*number of batches",
    ),
    "layer by layer": (
        OneByOne,
        {},
        {},
        "calls a layer.*lives in another process.*exactly once|did not call the network",
    ),
    "dataloader_iter": (
        DataloaderIter,
        {},
        {},
        "DataloaderIter.training_step` takes `dataloader_iter`.*`batch_idx` instead",
    ),
}

if BEFORE_2_6:
    del PROCESSES_ONLY["time-based validation"]


def attempt(name: str, devices: int) -> str:
    warnings.simplefilter("ignore")
    make, strategy, flags, _ = {**EVERYWHERE, **PROCESSES_ONLY}[name]
    points = strategy.get("split_points", ["net.3"])
    stages = 8 if name == "too many stages" and devices == 1 else "auto"
    try:
        module = make()
        trainer = quiet_trainer(
            devices=devices, strategy=DDGStrategy(num_stages=stages, split_points=points), max_epochs=1, **flags
        )
        trainer.fit(module, loader("mlp"), loader("mlp"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize("name", EVERYWHERE)
def test_in_one_process(name: str) -> None:
    assert re.search(EVERYWHERE[name][3], attempt(name, 1), re.DOTALL), attempt(name, 1)


@pytest.mark.parametrize("name", [*(name for name in EVERYWHERE if name != "too many stages"), *PROCESSES_ONLY])
def test_in_two_processes(name: str) -> None:
    results = run_ranks_raw(attempt, 2, name, 2, timeout=60)
    said = [str(result.value or result.error) for result in results]
    assert all(text != "accepted" for text in said), said
    pattern = {**EVERYWHERE, **PROCESSES_ONLY}[name][3]
    assert any(re.search(pattern, text, re.DOTALL) for text in said), said


def test_more_processes_than_layers() -> None:
    results = run_ranks_raw(attempt, 8, "too many stages", 8, timeout=120)
    assert all(re.search(EVERYWHERE["too many stages"][3], str(result.value), re.DOTALL) for result in results), results


def test_asking_too_early() -> None:
    strategy = quiet_trainer(devices=1, strategy="ddg").strategy
    with pytest.raises(RuntimeError, match="`stage_parameter_names` is not known.*on_fit_start"):
        _ = strategy.stage_parameter_names
    with pytest.raises(RuntimeError, match="no device mesh in one process"):
        _ = strategy.device_mesh


class Staged(DDGMixin, pl.LightningModule):
    """A hand-written network that says its layers itself, trained by `ddg_step`."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.stem = nn.Linear(6, 8).double()
        self.blocks = nn.ModuleList(nn.Linear(8, 8).double() for _ in range(3))
        self.head = nn.Linear(8, 3).double()
        self.infos: list[Any] = []

    def configure_stages(self) -> list[nn.Module]:
        return [self.stem, nn.Tanh(), *self.blocks, self.head]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.infos.append(self.ddg)
        self.ddg_step(nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit_staged(devices: int, strategy: Any = None) -> Any:
    warnings.simplefilter("ignore")
    torch.manual_seed(5)
    module = Staged()
    strategy = strategy or DDGStrategy(num_stages=3, split_points=["blocks.0", "blocks.2"])
    quiet_trainer(devices=devices, strategy=strategy).fit(module, loader("mlp"))
    return {name: value.clone() for name, value in module.state_dict().items()}, module.infos[-1]


def test_configure_stages_and_ddg_step() -> None:
    from tests.harness import run_ranks
    from tests.networks import largest_difference

    alone, info = fit_staged(1)
    assert (info.stage, info.num_stages, info.delay) == (None, 3, None)
    plain, info = fit_staged(1, "auto")
    assert (info.stage, info.num_stages, info.delay) == (1, 1, 0)
    assert largest_difference(alone, plain) > 1e-6
    for rank, (got, info) in enumerate(run_ranks(fit_staged, 3, 3)):
        assert largest_difference(got, alone) <= 1e-12
        assert (info.stage, info.num_stages, info.delay) == (3 - rank, 3, rank)
