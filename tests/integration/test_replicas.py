"""Several pipelines against the oracle, against one that gets all their batches at once, and against DDP."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchmetrics import Accuracy, SumMetric

from lightning_ddg import DDGStrategy, Staleness
from lightning_ddg.comm import replicas as comm
from tests import reference
from tests.harness import run_ranks, run_ranks_raw
from tests.integration.test_exact import STARTS
from tests.networks import (
    OPTIMIZERS,
    SAFELY,
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
        replicas=replicas,
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


# ---- checkpoints, decisions, and the data


class StopsOn(Callback):
    """Wants to stop after a batch, on one rank alone."""

    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == self.batch:
            trainer.should_stop = True


class Stream(IterableDataset[Any]):
    """Ends after fewer samples on some replicas."""

    def __init__(self, samples: dict[int, int]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        replica = int(os.environ["LOCAL_RANK"]) // 2
        yield from (dataset("mlp")[number] for number in range(self.samples[replica]))


class Plateau(Classifier):
    """Its rate goes by a metric that is another one on each replica."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.02)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def trained(folder: str, ckpt: str | None, devices: int, epochs: int, num_stages: int = 2) -> dict[str, Tensor]:
    """Trains from a checkpoint, or leaves one after the first epoch."""
    module = Classifier("convnet", "adamw_fused")
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = quiet_trainer(
        devices=devices,
        strategy=DDGStrategy(num_stages, ["net.5"]),
        max_epochs=epochs,
        callbacks=[saving],
        enable_checkpointing=True,
    )
    trainer.fit(module, DataLoader(dataset("convnet", COUNT), 5), ckpt_path=ckpt, **SAFELY)
    return state_of(module)


def stopped(rank: int, batch: int) -> int:
    trainer = quiet_trainer(
        devices=4, strategy=DDGStrategy(2, ["net.3"]), max_epochs=1, callbacks=[StopsOn(rank, batch)]
    )
    trainer.fit(Classifier("mlp", "sgd"), DataLoader(dataset("mlp", COUNT), 1))
    return trainer.global_step


def rates(folder: str) -> tuple[list[float], dict[str, Tensor]]:
    module = Plateau("mlp")
    trainer = quiet_trainer(
        devices=4,
        strategy=DDGStrategy(2, ["net.3"]),
        max_epochs=4,
        callbacks=[ModelCheckpoint(folder, monitor="train_loss", save_top_k=1)],
        enable_checkpointing=True,
    )
    trainer.fit(module, DataLoader(dataset("mlp", COUNT), 5), DataLoader(dataset("mlp", COUNT), 5))
    return [group["lr"] for group in trainer.optimizers[0].param_groups], state_of(module)


def streamed() -> tuple[int, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(devices=4, strategy=DDGStrategy(2, ["net.3"]), max_epochs=2)
        trainer.fit(Classifier("mlp", "sgd"), DataLoader(Stream({0: 22, 1: 13}), 5))
    return trainer.global_step, [str(entry.message) for entry in caught if "ended after" in str(entry.message)]


def evaluated() -> list[Any]:
    """Validates what was never trained, and predicts a number of samples that the replicas cannot divide."""
    module = Measured()
    trainer = quiet_trainer(devices=4, strategy=DDGStrategy(2, ["net.3"]))
    (metrics,) = trainer.validate(module, DataLoader(dataset("mlp", 18), 4), verbose=False)
    predictions = trainer.predict(module, DataLoader(dataset("mlp", 7), 2)) or []
    x, y = dataset("mlp", 18).tensors
    logits = module.head(module.net(x)).detach()
    wanted = float(nn.functional.cross_entropy(logits, y)), float(logits.argmax(dim=1).eq(y).sum())
    own = module.net(dataset("mlp", 7).tensors[0]).argmax(dim=1).tolist()
    return [metrics["val_loss"] - wanted[0], metrics["right"] - wanted[1], [p.tolist() for p in predictions], own]


def drawn() -> tuple[int, Any]:
    """The seeds of the stages' draws, and what one without a seed begins with."""
    torch.manual_seed(int(os.environ["LOCAL_RANK"]))
    module = Classifier("mlp", "sgd")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    trainer = quiet_trainer(devices=4, strategy=DDGStrategy(2, ["net.3"]), max_epochs=1, limit_train_batches=1)
    seeds: list[int] = []

    class Noting(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            seeds.append(trainer.strategy.run.site.training_batch(0).seed)

    trainer.callbacks.append(Noting())  # type: ignore[attr-defined]
    trainer.fit(module, DataLoader(dataset("mlp", COUNT), 5))
    return seeds[0], state_of(module)


def on_two_nodes(num_stages: int) -> tuple[list[Any], dict[str, Tensor]]:
    """Trains as two nodes of two processes each."""
    rank = int(os.environ["LOCAL_RANK"])
    before = dict(os.environ)
    os.environ.update(LOCAL_RANK=str(rank % 2), NODE_RANK=str(rank // 2))
    case = CASES[0]
    try:
        strategy = DDGStrategy(num_stages, [f"net.{start}" for start in STARTS[num_stages]], drain=case["drain"])
        module = Classifier("mlp", case["optimizer"])
        trainer = quiet_trainer(devices=2, num_nodes=2, strategy=strategy, max_epochs=EPOCHS)
        trainer.fit(module, DataLoader(dataset("mlp", COUNT), 5))
    finally:
        os.environ.update(before)
    return [strategy.global_rank, strategy.replica, strategy.stage, strategy.data_parallel_size], state_of(module)


def behave(folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"whole": trained(f"{folder}/whole", None, 4, 2)}
    trained(f"{folder}/half", None, 4, 1)
    results["resumed"] = trained(f"{folder}/again", f"{folder}/half/epoch=0.ckpt", 4, 2)
    results["stopped"] = [stopped(0, 3), stopped(2, 3), stopped(1, 3)]
    results["rates"], results["by rates"] = rates(f"{folder}/rates")
    results["nodes"] = on_two_nodes(2)
    results["streamed"], results["evaluated"], results["drawn"] = streamed(), evaluated(), drawn()
    return results


def resume(folder: str, devices: int) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    return trained(f"{folder}/{devices}", f"{folder}/half/epoch=0.ckpt", devices, 2)


def test_checkpoints_decisions_and_data(tmp_path: Path) -> None:
    ranks = run_ranks(behave, 4, str(tmp_path))
    first = ranks[0]
    for number, rank in enumerate(ranks):
        assert largest_difference(rank["whole"], first["whole"]) == 0.0
        assert largest_difference(rank["resumed"], first["whole"]) <= 1e-11, "as if it had not been stopped"
        # In three batches, one more than with one pipeline: the 4th asks, the last of the other replica a batch later.
        assert rank["stopped"] == first["stopped"]
        assert rank["rates"] == first["rates"]
        assert largest_difference(rank["by rates"], first["by rates"]) == 0.0
        assert rank["streamed"][0] == 2 * 3, "three batches of each epoch, as the shorter has"
        loss, right, predictions, own = rank["evaluated"]
        assert abs(loss) <= 1e-6
        assert right == 0
        assert [value for batch in predictions for value in batch] == own[number // 2 :: 2]
        assert largest_difference(rank["drawn"][1], first["drawn"][1]) == 0.0, "all begin with those of the first"
    for number, rank in enumerate(ranks):
        assert rank["nodes"][0] == [number, number // 2, 2 - number % 2, 2]
        assert largest_difference(rank["nodes"][1], expected(2, 2, CASES[0])) <= 1e-11
    assert first["rates"][0] < 0.1
    assert first["stopped"][0] == 3 + 1 + 3
    assert first["stopped"][1] in (7, 8, 9), "asked for by the other replica, which rank 0 hears of at once or later"
    assert first["stopped"][2] == 11, "by who has no loss: as with one pipeline, it does not count"
    assert len(first["streamed"][1]) == 0, "said on the rank that reads"
    assert "The data of replica 1 ended after 3 batches" in ranks[1]["streamed"][1][0]
    assert len(ranks[1]["streamed"][1]) == 2, "in each epoch"
    assert [rank["drawn"][0] == first["drawn"][0] for rank in ranks] == [True, True, False, False]

    saved = torch.load(tmp_path / "whole" / "epoch=1.ckpt", weights_only=True)
    assert largest_difference(saved["state_dict"], first["whole"]) == 0.0
    assert saved["lightning_ddg"] == {"num_stages": 2, "split_points": ["net.5"]}
    alone = resume(str(tmp_path), 1)
    for state in run_ranks(resume, 2, str(tmp_path), 2):
        assert largest_difference(state, alone) <= 1e-11


# ---- what is refused, and what fails


class Gathers(Classifier):
    def __init__(self, how: Callable[[Any, Tensor], object]) -> None:
        super().__init__("mlp", "sgd")
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.how(self, loss)
        return loss


class Sparse(Classifier):
    def __init__(self) -> None:
        super().__init__("transformer", "sgd")
        self.net[0].sparse = True  # type: ignore[index]


class Positioned(DataLoader[Any]):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def attempt(make: Callable[[], Classifier] = Classifier, data: Any = None, network: str = "mlp", **options: Any) -> str:
    """What a fit with two pipelines says."""
    validation, num_stages = options.pop("validation", None), options.pop("num_stages", 2)
    points = [f"net.{start}" for start in STARTS[num_stages]]
    strategy = DDGStrategy(num_stages, points, timeout=timedelta(seconds=20))
    try:
        trainer = quiet_trainer(**{"devices": 4, "strategy": strategy, "max_epochs": 1, **options})
        data = DataLoader(dataset(network, COUNT), 5) if data is None else data
        trainer.fit(make(), data, validation)
    except Exception as error:  # noqa: BLE001 - what each rank says is what is tested
        return f"{type(error).__name__}: {error}"
    return "trained"


def of_ranks(replicas: int, rank: int) -> Any:
    return DataLoader(dataset("mlp"), 5, sampler=DistributedSampler(dataset("mlp"), replicas, rank))


def own_share(extra: int = 0) -> Any:
    """A share by hand, of the second replica with more."""
    rank = int(os.environ["LOCAL_RANK"])
    return DataLoader(dataset("mlp", 11 + extra * (rank // 2)), 5)


def all_attempts() -> dict[str, str]:
    warnings.simplefilter("ignore")
    rank = int(os.environ["LOCAL_RANK"])
    gathers = partial(attempt, lambda: Gathers(lambda module, loss: module.all_gather(loss, sync_grads=True)))
    return {
        "one stage": attempt(num_stages=1),
        "three stages": attempt(num_stages=3),
        "sync_batchnorm": attempt(sync_batchnorm=True),
        "sampler of ranks": attempt(data=of_ranks(4, rank)),
        "sampler of replicas": attempt(data=of_ranks(2, rank // 2)),
        "own shares": attempt(data=own_share(), use_distributed_sampler=False),
        "uneven shares": attempt(data=own_share(5), use_distributed_sampler=False),
        "uneven evaluation": attempt(validation=DataLoader(Stream({0: 22, 1: 13}), 5)),
        "position": attempt(data=Positioned(dataset("mlp", COUNT), 5)),
        "gradients": gathers(),
        "operation": attempt(lambda: Gathers(lambda module, loss: module.trainer.strategy.reduce(loss, None, "bor"))),
        "collective": attempt(lambda: Gathers(lambda module, loss: dist.all_reduce(loss.detach()))),
        "sparse": attempt(Sparse, network="transformer"),
    }


REFUSED = {
    "one stage": "num_stages=1 cuts nothing, so that 4 processes would be replicas .* Use strategy='ddp'",
    "three stages": "num_stages=3 stages cannot be trained by 4 processes.* Use devices=3, or a multiple",
    "sync_batchnorm": "sync_batchnorm=True synchronises BatchNorm over 2 replicas.*Remove sync_batchnorm=True",
    "sampler of ranks": r"DistributedSampler with num_replicas=4 and rank=\d, but this is replica \d of 2.*Leave the",
    "sampler of replicas": "^trained$",
    "own shares": "^trained$",
    "uneven shares": "different numbers of batches: 3 on replica 0, 4 on replica 1.*Give each the same number",
    "uneven evaluation": "After 3 batches of an evaluation.*replica 0 has another of loader 0, replica 1 has ended",
    "position": "Positioned keeps its position.*one replica of 2.*Use a loader without `state_dict`",
    "gradients": r"all_gather\(sync_grads=True\).*Use sync_grads=False",
    "operation": "reduce_op='bor' is not known to 2 replicas of the data. Use one of 'avg', 'sum'",
    "collective": "`all_reduce` was called in a step, but the processes are the stages of 2 replicas.*Use `self.all",
    "sparse": r"The gradient of 'net.0.weight' is sparse, of which 2 replicas.*`sparse=False`",
}


def test_what_replicas_cannot_do_is_refused_by_name() -> None:
    ranks = run_ranks(all_attempts, 4)
    for name, message in REFUSED.items():
        said = [rank[name] for rank in ranks]
        # Who does not find it itself is told by who does.
        assert any(re.search(message, text) for text in said), (name, said)
        assert all((text == "trained") == (message == "^trained$") for text in said), (name, said)


class Fails(Callback):
    def __init__(self, rank: int, how: str) -> None:
        self.rank, self.how = rank, how

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and batch_idx == 1:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("bang in a hook")


def fail(rank: int, how: str) -> None:
    warnings.simplefilter("ignore")
    trainer = quiet_trainer(devices=4, strategy=DDGStrategy(2, ["net.3"]), callbacks=[Fails(rank, how)])
    trainer.fit(Classifier("mlp", "sgd"), DataLoader(dataset("mlp", COUNT), 5))


@pytest.mark.parametrize(("rank", "how"), [(3, "raise"), (2, "kill")])
def test_a_failure_in_one_replica_ends_all(rank: int, how: str) -> None:
    began = time.monotonic()
    results = run_ranks_raw(fail, 4, rank, how, timeout=60)
    assert time.monotonic() - began < 40
    name = f"Rank {rank} \\(replica 1, stage {2 - rank % 2}\\)"
    wanted = f"{name} is gone" if how == "kill" else f"{name} failed while training .epoch 0, batch 1.*bang in a hook"
    for other, result in enumerate(results):
        assert result.error is not None
        if other != rank or how == "raise":
            assert re.search(wanted, result.error), (other, result.error)
