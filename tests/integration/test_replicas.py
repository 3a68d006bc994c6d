"""Several pipelines against the oracle, against one that gets all their batches at once, and against DDP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Accuracy, SumMetric

from lightning_ddg import DDGStrategy, Staleness
from lightning_ddg.comm import replicas as comm
from tests import reference
from tests.harness import run_ranks
from tests.integration.test_exact import STARTS
from tests.networks import (
    OPTIMIZERS,
    Classifier,
    ManualClassifier,
    dataset,
    largest_difference,
    quiet_trainer,
    seeded_network,
    state_of,
)

EPOCHS = 2
COUNT = 22
Case = dict[str, Any]


def batches_of(data: Any, replicas: int, epoch: int = 0) -> list[Any]:
    """As many batches at once as there are replicas, each with its share, the last ones smaller."""
    # Lightning shuffles what is trained in shares.
    samplers: list[DistributedSampler[Any]] = [DistributedSampler(data, replicas, number) for number in range(replicas)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(batches) for batches in zip(*(DataLoader(data, 5, sampler=one) for one in samplers), strict=True)]


# ---- the oracle

CASES: list[Case] = [
    {"optimizer": "nesterov", "drain": "epoch"},
    {"optimizer": "adamw_fused", "drain": "fit"},
    {"optimizer": "adam", "drain": "never"},
    {"optimizer": "nesterov", "drain": "epoch", "network": "convnet"},
    {"optimizer": "adamw_fused", "drain": "fit", "accumulate": 2},
    {"optimizer": "nesterov", "drain": "epoch", "clip": ("norm", 0.3)},
    {"optimizer": "nesterov", "drain": "fit", "clip": ("value", 0.02), "accumulate": 2},
    {"optimizer": "nesterov", "drain": "epoch", "micro": 2},
    {"optimizer": "adamw_fused", "drain": "fit", "micro": 3, "accumulate": 2, "options": {"recompute": True}},
    {"optimizer": "nesterov", "drain": "fit", "finish": 4},
    {"optimizer": "nesterov", "drain": "epoch", "skipped": [(1, 0), (3, 1), 4]},
    {"optimizer": "adamw_fused", "drain": "epoch", "manual": True},
    {"optimizer": "nesterov", "drain": "fit", "manual": True, "options": {"recompute": True}},
]


class Skipping(Classifier):
    """Has no loss for some batches, or for those of some replicas."""

    skipped: Any = ()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        now = 3 * self.current_epoch + batch_idx
        strategy: Any = self.trainer.strategy
        loss = super().training_step(batch, batch_idx)
        return None if now in self.skipped or (now, strategy.replica) in self.skipped else loss


def fit(num_stages: int, replicas: int, case: Case) -> dict[str, Tensor]:
    name = case.get("network", "mlp")
    module = (ManualClassifier if case.get("manual") else Skipping)(name, case["optimizer"])
    if isinstance(module, Skipping):
        module.skipped = case.get("skipped", ())
    batches = 2 * len(batches_of(dataset(name, COUNT), replicas))
    strategy = DDGStrategy(
        num_stages,
        [f"net.{start}" for start in STARTS[num_stages]],
        drain=case["drain"],
        micro_batches=case.get("micro", 1),
        staleness=Staleness(finish=1 - case["finish"] / batches if "finish" in case else 0.0),
        **case.get("options", {}),
    )
    how, by = case.get("clip", ("norm", None))
    trainer = quiet_trainer(
        devices=num_stages * replicas,
        strategy=strategy,
        max_epochs=EPOCHS,
        accumulate_grad_batches=case.get("accumulate", 1),
        gradient_clip_val=by,
        gradient_clip_algorithm=how if by else None,
    )
    trainer.fit(module, DataLoader(dataset(name, COUNT), 5))
    return state_of(module)


def fit_all(num_stages: int, replicas: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    warnings.simplefilter("ignore")
    # As if what is averaged were large.
    comm._SMALL_BYTES = 64
    return [fit(num_stages, replicas, case) for case in cases]


def expected(num_stages: int, replicas: int, case: Case) -> dict[str, Tensor]:
    name = case.get("network", "mlp")
    net: Any = seeded_network(name)
    how, by = case.get("clip", ("norm", 0.0))
    clips: Any = {
        "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, by),
        "value": lambda parameters: nn.utils.clip_grad_value_(parameters, by),
    }
    reference.train(
        net,
        reference.flat_stages(net, STARTS[num_stages]),
        [batches_of(dataset(name, COUNT), replicas, epoch) for epoch in range(EPOCHS)],
        OPTIMIZERS[case["optimizer"]],
        lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.8),
        case["drain"],
        case.get("skipped", ()),
        case.get("micro", 1),
        case.get("accumulate", 1),
        clips[how] if "clip" in case else None,
        case.get("finish"),
        replicas,
    )
    return {f"net.{key}": tensor for key, tensor in state_of(net).items()}


def compare(num_stages: int, replicas: int, cases: list[Case]) -> None:
    ranks = run_ranks(fit_all, num_stages * replicas, num_stages, replicas, cases)
    for index, case in enumerate(cases):
        wanted = expected(num_stages, replicas, case)
        for rank, states in enumerate(ranks):
            assert largest_difference(states[index], wanted) <= 1e-11, (rank, case)
            assert largest_difference(states[index], ranks[0][index]) == 0.0, (rank, case)


def test_two_pipelines_apply_the_mean_of_their_delayed_gradients() -> None:
    compare(2, 2, CASES)


@pytest.mark.slow
@pytest.mark.parametrize(("num_stages", "replicas"), [(3, 2), (2, 3)])
def test_wider_ones_do_so_too(num_stages: int, replicas: int) -> None:
    # The convnet's last batch would have one sample on some replicas and BatchNorm.
    finish = [case for case in CASES if "finish" not in case and "skipped" not in case]
    compare(num_stages, replicas, finish)


# ---- all their batches at once


class TiedNetwork(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.last = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.middle(self.embed(x).mean(dim=1)))
        return self.head(torch.tanh(self.last(h)))


class Tied(Classifier):
    def __init__(self, optimizer: str) -> None:
        super().__init__("mlp", optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.net = TiedNetwork().double()  # type: ignore[assignment]


class Measured(Classifier):
    """Metrics of all kinds, a step that is more than one call of a network, and a part that only it uses."""

    def __init__(self, optimizer: str = "nesterov") -> None:
        super().__init__("mlp", optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(6)
            self.head = nn.Linear(3, 3).double()
        self.accuracy, self.all_right = Accuracy("multiclass", num_classes=3), SumMetric()
        self.shapes: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = self.net[:4](x)
        logits = self.head(self.net[4:](h))
        loss = nn.functional.cross_entropy(logits, y) + 0.01 * h.square().mean()
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.head(self.net(x))
        self.all_right(logits.argmax(dim=1).eq(y).sum())
        self.log("right", self.all_right)
        self.log("val_loss", nn.functional.cross_entropy(logits, y), sync_dist=True)
        self.log("largest", logits.max(), sync_dist=True, reduce_fx="max")
        self.shapes.append(tuple(self.all_gather(logits[0]).shape))


class Joined:
    """Of each epoch, the batches of all replicas joined."""

    def __init__(self, data: Any) -> None:
        self.data, self.epoch = data, -1

    def __len__(self) -> int:
        return len(batches_of(self.data, 2))

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        for batches in batches_of(self.data, 2, self.epoch):
            yield [torch.cat(parts) for parts in zip(*batches, strict=True)]


OPTIONS: dict[str, Case] = {
    "tied": {"make": Tied, "points": ["net.last"], "data": "transformer"},
    "tied, recomputed": {"make": Tied, "points": ["net.last"], "data": "transformer", "options": {"recompute": True}},
    "extrapolated": {"optimizer": "adamw_fused", "rules": {"extrapolate": True}},
    "compensated": {"rules": {"extrapolate": True, "compensate": True, "shrink": 0.8}, "trainer": {"accumulate": 2}},
    "today's weights": {"rules": {"stash": False, "slow_start": 4}, "options": {"recompute": True}},
    "finish": {"rules": {"finish": 0.5}, "trainer": {"accumulate": 2, "clip": 0.2}},
    "the step itself": {"make": Measured, "points": ["net.3"]},
    "the step itself, drained late": {"make": Measured, "points": ["net.3"], "options": {"drain": "fit"}},
    "compiled": {"options": {"compile": {"backend": "eager"}}},
}


def fit_option(name: str, devices: int) -> tuple[dict[str, Tensor], dict[str, float], list[Any]]:
    warnings.simplefilter("ignore")
    case = OPTIONS[name]
    made: Any = case.get("make", partial(Classifier, "mlp"))(optimizer=case.get("optimizer", "nesterov"))
    rules, limits = Staleness(**case.get("rules", {})), case.get("trainer", {})
    strategy = DDGStrategy(2, case.get("points", ["net.3"]), staleness=rules, **case.get("options", {}))
    trainer = quiet_trainer(
        devices=devices,
        strategy=strategy,
        max_epochs=EPOCHS,
        accumulate_grad_batches=limits.get("accumulate", 1),
        gradient_clip_val=limits.get("clip"),
    )
    data = dataset(case.get("data", "mlp"), 24)
    held_out = DataLoader(dataset(case.get("data", "mlp"), 18), 4)
    trainer.fit(made, DataLoader(data, 5) if devices > 1 else Joined(data), held_out)  # type: ignore[arg-type]
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if "step" not in key}
    return state_of(made), metrics, getattr(made, "shapes", [])


def fit_options() -> dict[str, Any]:
    return {name: fit_option(name, 4) for name in OPTIONS}


def test_two_pipelines_train_as_one_process_with_all_their_batches() -> None:
    ranks = run_ranks(fit_options, 4)
    for name, case in OPTIONS.items():
        state, metrics, _ = fit_option(name, 1)
        for rank, results in enumerate(ranks):
            got, values, shapes = results[name]
            assert largest_difference(got, state) <= 1e-11, (name, rank)
            assert largest_difference(got, ranks[0][name][0]) == 0.0, (name, rank)
            if case.get("make") is not Measured:
                continue
            assert values == ranks[0][name][1], (name, rank)
            # The batches of an evaluation are as large on both, as 18 samples are 9 on each.
            assert values.keys() >= {"accuracy", "loss_epoch", "right", "val_loss", "largest"}
            for key in values.keys() & metrics.keys():
                assert values[key] == pytest.approx(metrics[key], abs=1e-6), (name, rank, key)
            assert set(shapes) == {(2, 3)}
