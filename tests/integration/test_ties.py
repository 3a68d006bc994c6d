"""A parameter of several stages: exact delayed gradients in which it belongs to the first of them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddg import DDGStrategy, Staleness
from tests.harness import run_ranks
from tests.integration.steps import Step
from tests.networks import largest_difference, quiet_trainer, state_of


class Tied(nn.Module):
    """The first layer's weight is the last one's, and with ``all`` that of a layer between too."""

    def __init__(self, all: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.first, self.middle, self.second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight
        if all:
            self.middle.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + torch.tanh(self.middle(torch.tanh(self.first(h))))
        return self.head(F.dropout(torch.tanh(self.second(h)), 0.2, self.training))


class Model(Step):
    def __init__(self, all: bool = False, optimizer: str = "sgd") -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net, self.optimizer = Tied(all), optimizer

    def loss(self, batch: Any) -> Tensor:
        (x,) = batch
        return F.cross_entropy(self.net(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.optimizer == "skips" and batch_idx == 2 else super().training_step(batch, batch_idx)

    def predicted(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randint(0, 8, (24, 5), generator=torch.Generator().manual_seed(3))), 4)


#: Model, strategy, Trainer; and the numbers of stages.
CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], set[int]]] = [
    ({}, {}, {}, {2, 3, 4}),
    ({"all": True}, {"drain": "never"}, {}, {3, 4}),
    ({"all": True, "optimizer": "adamw"}, {"drain": "fit"}, {"gradient_clip_val": 0.1}, {2, 3}),
    ({"optimizer": "adamw"}, {"recompute": True}, {"accumulate_grad_batches": 2}, {2, 3}),
    ({"optimizer": "skips"}, {"staleness": Staleness(shrink=0.5)}, {}, {3}),
    ({"all": True}, {"staleness": Staleness(shrink=0.5, finish=0.7)}, {}, {3, 4}),
    ({}, {"staleness": Staleness(shrink=0.5, finish=0.5, compensate=True), "micro_batches": 2}, {}, {3}),
]


def fit(model: dict[str, Any], strategy: dict[str, Any], trainer: dict[str, Any], stages: int, devices: int) -> Any:
    warnings.simplefilter("ignore")
    module = Model(**model)
    arguments: dict[str, Any] = {"max_epochs": 2, "precision": "64-true", "num_sanity_val_steps": 1, **trainer}
    made = DDGStrategy(stages, balance="parameters", **strategy)
    lightning = quiet_trainer(devices=devices, strategy=made, **arguments)
    lightning.fit(module, batches(), batches())
    assert module.net.head.weight is module.net.embed.weight
    return state_of(module), float(lightning.callback_metrics["val_loss"])


def fit_all(stages: int, devices: int) -> list[Any]:
    return [fit(*case, stages, devices) for *case, numbers in CASES if stages in numbers]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_processes_train_what_one_process_trains(stages: int) -> None:
    expected = fit_all(stages, 1)
    for found in run_ranks(fit_all, stages, stages, stages, timeout=240):
        for (state, loss), (own, metric) in zip(expected, found, strict=True):
            assert largest_difference(own, state) < 1e-11
            assert metric == pytest.approx(loss, rel=1e-9)


def test_the_whole_gradient_has_the_first_stage_s_delay() -> None:
    """Against gradients that are put through a queue by hand."""
    points = ["net.middle"]
    model = Model()
    model.net.forward = lambda x: Tied.forward(model.net.eval(), x)  # type: ignore[method-assign]
    warnings.simplefilter("ignore")
    reference = copy.deepcopy(Model()).double().eval()
    trainer = quiet_trainer(
        devices=1, strategy=DDGStrategy(2, points, drain="never"), max_epochs=1, precision="64-true"
    )
    trainer.fit(model, batches())
    optimizer = reference.configure_optimizers()
    early = {reference.net.embed.weight, *reference.net.first.parameters()}
    queue: list[dict[Tensor, Tensor | None]] = [dict.fromkeys(early)]
    for batch in batches():
        optimizer.zero_grad()
        reference.loss(batch).backward()
        queue.append({parameter: parameter.grad for parameter in early})
        for parameter, grad in queue.pop(0).items():
            parameter.grad = grad
        optimizer.step()
    assert largest_difference(state_of(model), state_of(reference)) < 1e-12


def resumed(devices: int, folder: str) -> Any:
    warnings.simplefilter("ignore")
    arguments: dict[str, Any] = {"devices": devices, "precision": "64-true"}
    first = quiet_trainer(strategy=DDGStrategy(2, balance="parameters"), max_epochs=1, **arguments)
    first.fit(Model(optimizer="adamw"), batches())
    first.save_checkpoint(f"{folder}/{devices}.ckpt")
    module = Model(optimizer="adamw")
    quiet_trainer(strategy=DDGStrategy(2), max_epochs=2, **arguments).fit(
        module, batches(), ckpt_path=f"{folder}/{devices}.ckpt"
    )
    return state_of(module)


def test_a_checkpoint_has_the_parameter_and_its_state_once(tmp_path: Any) -> None:
    expected = resumed(1, str(tmp_path))
    for found in run_ranks(resumed, 2, 2, str(tmp_path)):
        assert largest_difference(found, expected) < 1e-11
    states = [torch.load(tmp_path / f"{devices}.ckpt", weights_only=False) for devices in (1, 2)]
    one, two = (state["optimizer_states"][0]["state"] for state in states)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key]["exp_avg"], two[key]["exp_avg"]) for key in one)


def refused(strategy: dict[str, Any], devices: int) -> str:
    try:
        fit({}, {"split_points": ["net.middle"], **strategy}, {}, 2, devices)
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("staleness", "devices"),
    [(Staleness(stash=False), 1), (Staleness(extrapolate=True), 2)],
    ids=["live", "extrapolated"],
)
def test_a_rule_that_cannot_share_a_parameter_says_so(staleness: Staleness, devices: int) -> None:
    for error in run_ranks(refused, devices, {"staleness": staleness}, devices):
        assert "'net.embed.weight' is used by 'net.embed' and by 'net.head', on both sides of the cut" in error
        assert "`stash=False` in one process or `extrapolate=True` in several" in error
