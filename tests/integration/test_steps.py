"""Steps that are more than one call of one network: both executions alike, and what cannot be done is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddg import DDGStrategy, Staleness
from tests.harness import run_ranks
from tests.integration.steps import Autoencoder, Contrastive, Denoising, Step, TruncatedBackprop, Variational
from tests.networks import largest_difference, quiet_trainer, state_of


def batches(count: int = 6) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4 * count, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (4 * count,), generator=generator)), batch_size=4)


def fit(module: Step, strategy: Any, devices: int, **arguments: Any) -> Any:
    """Train two epochs of six batches; return the state, or what is said instead."""
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    trainer = quiet_trainer(max_epochs=2, strategy=strategy, devices=devices, precision="64-true", **arguments)
    try:
        trainer.fit(module, batches(), batches(2))
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    return state_of(module), {name: float(value) for name, value in trainer.callback_metrics.items()}


# ---- both executions alike


class NoisyVariational(Variational):
    """Noise between the layers, and dropout inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 36))

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn_like(like)


class NoisyContrastive(Contrastive):
    """Dropout in two stages, each of which comes twice in a step; a view that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 16), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Linear(16, 8), nn.Dropout(0.3), nn.Linear(8, 4), nn.Linear(4, 4),
        )  # fmt: skip

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return super().loss((x + 0.1 * torch.randn_like(x), y))


class NoisyDenoising(Denoising):
    """The noise is drawn, and its weight; both are used before the first layer and after the last."""

    def loss(self, batch: Any) -> Tensor:
        x = batch[0].flatten(1)
        t = torch.randint(0, 4, (len(x),))
        noise = torch.randn_like(x)
        alpha = ((t + 1) / 5).unsqueeze(1)
        return (alpha * (self.denoised(alpha * x + (1 - alpha) * noise, t) - noise).square()).mean()


KINDS: list[type[Step]] = [NoisyVariational, NoisyContrastive, NoisyDenoising, TruncatedBackprop]


def fit_all(num_stages: int, devices: int) -> list[Any]:
    strategies = [
        {},
        {"drain": "never"},
        {"staleness": Staleness(stash=False)},
        {"recompute": True},
    ]
    return [
        fit(kind(), DDGStrategy(num_stages, balance="parameters", **arguments), devices)
        for kind in KINDS
        for arguments in strategies
        if kind is not TruncatedBackprop or arguments.keys() <= {"drain"} and num_stages == 2
    ]


@pytest.mark.parametrize("num_stages", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_train_what_one_process_trains(num_stages: int) -> None:
    expected = fit_all(num_stages, 1)
    for rank, found in enumerate(run_ranks(fit_all, num_stages, num_stages, num_stages, timeout=240)):
        for (state, logged), (own, metrics) in zip(expected, found, strict=True):
            assert largest_difference(own, state) < 1e-9
            if rank == 0:
                assert metrics == pytest.approx(logged, rel=1e-9)


def test_the_delay_is_the_paper_s() -> None:
    """With one layer a stage, against gradients that are put through queues by hand."""
    module = Variational()
    state, _ = fit(module, DDGStrategy(2, ["mean"], drain="never"), 1)
    other = Variational()
    torch.manual_seed(1)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.1)
    other.double()
    late = list(other.encoder.parameters())
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    queue: list[list[Tensor | None]] = [[None] * len(late)]
    other.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    for x, y in [*batches(), *batches()]:
        optimizer.zero_grad()
        other.loss((x.double(), y)).backward()
        queue.append([parameter.grad for parameter in late])
        for parameter, grad in zip(late, queue.pop(0), strict=True):
            parameter.grad = grad
        optimizer.step()
    assert largest_difference(state, state_of(other)) < 1e-12


# ---- evaluation in another form than training


class OtherForms(Step):
    """Trains by one call of the network; validates and predicts by its methods, or by its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Autoencoder()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def loss(self, batch: Any) -> Tensor:
        z = self.net.encode(batch[0])
        return (self.net.down[4](self.net.down[:4](batch[0])) * self.net.scale - z).square().mean() + z.mean()

    def predicted(self, x: Tensor) -> Tensor:
        return self.net.decode(self.net(x) + 1)


class FeedsBack(Step):
    """In evaluation the network gets back what it has said, as a decoder does: no stage could run that in one go."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 36)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1 if self.training else 3):
                x = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
            return x

    def __init__(self) -> None:
        super().__init__()
        self.net = FeedsBack.Net()

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0].flatten(1)), batch[0].flatten(1))

    def predicted(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1))


def evaluate(kind: type[Step], devices: int, fitted: bool) -> Any:
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    module = kind()
    strategy = DDGStrategy(2, ["net.second" if kind is FeedsBack else "net.down.4"])
    trainer = quiet_trainer(
        max_epochs=1, strategy=strategy, devices=devices, precision="64-true", num_sanity_val_steps=1
    )
    if fitted:
        trainer.fit(module, batches(1), batches())
    validated = trainer.validate(module, batches(), verbose=False)
    return validated, trainer.predict(module, batches())


@pytest.mark.parametrize("kind", [OtherForms, FeedsBack])
@pytest.mark.parametrize("fitted", [False, True])
def test_evaluation_may_call_the_network_in_another_form(kind: type[Step], fitted: bool) -> None:
    (metrics,), predicted = evaluate(kind, 1, fitted)
    for rank in run_ranks(evaluate, 2, kind, 2, fitted):
        assert rank[0][0] == pytest.approx(metrics)
        torch.testing.assert_close(rank[1], predicted)


# ---- what cannot be done is said


class GoesBack(Step):
    """What the last layer has made is given to the first one in the same step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(36, 36), nn.Linear(36, 36)

    def loss(self, batch: Any) -> Tensor:
        h = self.second(self.first(batch[0].flatten(1)))
        return self.first(h).square().mean()


class ByTime(Step):
    """Goes by what only one process knows, but for the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Autoencoder()

    def loss(self, batch: Any) -> Tensor:
        here = self.trainer.strategy.global_rank if self.trainer.global_step else 0
        return self.net.loss(batch[0] * (1 + here))


class OneLayer(Step):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(36, 3)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.layer(batch[0].flatten(1)) + self.layer(batch[0].flatten(1)), batch[1])


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (GoesBack, {}, "a Linear is called with what an output of 'second' has a part in, which is in a later stage"),
        (OneLayer, {}, "does not call one network once (it calls 'layer', 'layer')"),
        (TruncatedBackprop, {"staleness": Staleness(stash=False)}, "stash=False in one process runs the training step"),
    ],
)
def test_a_step_is_refused_by_name(kind: type[Step], arguments: dict[str, Any], words: str) -> None:
    assert words in fit(kind(), DDGStrategy(2, **arguments), 1)


def fit_refused(kind: type[Step], arguments: dict[str, Any]) -> str:
    return str(fit(kind(), DDGStrategy(2, balance="parameters", **arguments), 2))


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (ByTime, {}, "In batch 1 of this run, the process of stage 1 gives something else to its layer"),
        (TruncatedBackprop, {"recompute": True}, "recompute=True runs the training step more than once a batch"),
    ],
)
def test_a_step_is_refused_in_several_processes(kind: type[Step], arguments: dict[str, Any], words: str) -> None:
    errors = run_ranks(fit_refused, 2, kind, arguments)
    assert words in errors[0]
    assert all("{" not in error for error in errors)
