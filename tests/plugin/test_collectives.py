"""Tests of ``collectives.py``: collectives of the user's in a training step are refused, and only there."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed import all_reduce, distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce
from torch.distributed.tensor import distribute_tensor
from torchmetrics import MeanMetric

from lightning_ddg import DDGStrategy
from lightning_ddg.plugin.collectives import collectives_refused
from tests.harness import run_ranks
from tests.networks import Classifier, ManualClassifier, loader, quiet_trainer, state_of

OUTSIDE = MeanMetric(dist_sync_on_step=True)


def own_group(module: pl.LightningModule, value: Tensor) -> Any:
    return dist.all_reduce(value, group=module.trainer.strategy.device_mesh.get_group("stage"))


#: What users call in a step, and the function of torch that it comes to.
CALLS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "dist.all_reduce": (lambda module, value: dist.all_reduce(value), "all_reduce"),
    "imported before": (lambda module, value: all_reduce(value), "all_reduce"),
    "dist.nn": (lambda module, value: differentiable_all_reduce(value), "all_reduce"),
    "all_gather": (lambda module, value: dist.all_gather([value, value.clone()], value), "all_gather"),
    "all_gather_object": (lambda module, value: dist.all_gather_object([None, None], 1), "all_gather_object"),
    "broadcast": (lambda module, value: dist.broadcast(value, 0), "broadcast"),
    "reduce": (lambda module, value: dist.reduce(value, 0), "reduce"),
    "reduce_scatter": (lambda module, value: dist.reduce_scatter(value, [value, value]), "reduce_scatter"),
    "barrier": (lambda module, value: dist.barrier(), "barrier"),
    "send": (lambda module, value: dist.send(value, 1 - dist.get_rank()), "isend|send"),
    "group": (own_group, "all_reduce"),
    "new_group": (lambda module, value: dist.new_group([0, 1]), "new_group"),
    "new_subgroups": (lambda module, value: dist.new_subgroups(2), "new_group"),
    "a mesh of its own": (lambda module, value: init_device_mesh("cpu", (2, 1)), "new_group|split_group"),
    "functional": (lambda module, value: functional.all_reduce(value, "sum", dist.group.WORLD), "all_reduce"),
    "functional, by ranks": (lambda module, value: functional.all_reduce(value, "sum", [0, 1]), "all_reduce"),
    "functional, with gradients": (
        lambda module, value: functional.all_gather_tensor_autograd(value.reshape(1), 0, dist.group.WORLD),
        "all_gather_single|all_gather_tensor",
    ),
    "functional, coalesced": (
        lambda module, value: functional.all_reduce_coalesced([value], "sum", dist.group.WORLD), "all_reduce_coalesced",
    ),
    "functional, scattered": (
        lambda module, value: functional.reduce_scatter_tensor(torch.zeros(2), "sum", 0, dist.group.WORLD),
        "reduce_scatter_single|reduce_scatter_tensor",
    ),
    "distributed tensor": (
        lambda module, value: distribute_tensor(torch.zeros(2), module.trainer.strategy.device_mesh["stage"]),
        "scatter|broadcast",
    ),
    "strategy.barrier": (lambda module, value: module.trainer.strategy.barrier(), "barrier"),
    "strategy.broadcast": (lambda module, value: module.trainer.strategy.broadcast(1), "broadcast"),
    "strategy.reduce_boolean_decision": (
        lambda module, value: module.trainer.strategy.reduce_boolean_decision(True), "reduce_boolean_decision",
    ),
}  # fmt: skip


class Calls(Classifier):
    def __init__(self, call: str) -> None:
        super().__init__("mlp")
        self.call = CALLS[call][0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert dist.get_rank() == self.trainer.global_rank
        assert dist.get_world_size() == 2
        loss = super().training_step(batch, batch_idx)
        self.call(self, loss.detach().clone())
        return loss


class CallsBefore(Calls):
    """Also the process that reads comes there, before its part of the step has ended."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.call(self, torch.zeros(1))
        return Classifier.training_step(self, batch, batch_idx)


def fit(kind: type[Calls], call: str) -> None:
    warnings.simplefilter("ignore")
    quiet_trainer(devices=2, strategy=DDGStrategy(2, ["net.3"]), max_epochs=1).fit(kind(call), loader("mlp"))


def outcomes(calls: list[str]) -> list[str]:
    said = []
    for number, call in enumerate(calls):
        try:
            fit(CallsBefore if number % 2 else Calls, call)
            said.append("trained")
        except Exception as error:  # noqa: BLE001 - what each rank says is what is tested
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_collectives_in_a_step_are_refused_at_once() -> None:
    for rank, said in enumerate(run_ranks(outcomes, 2, list(CALLS))):
        for (call, (_, name)), text in zip(CALLS.items(), said, strict=True):
            assert "one replica of the data" in text, (rank, call, text)
            assert any(f"`{one}` was called in a step" in text for one in name.split("|")), (call, text)


class Allowed(ManualClassifier):
    """What gives the same in every process, and what runs in every process alike."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if dist.is_initialized():
            dist.get_rank()
            dist.get_world_size()
            dist.get_backend()
        self.all_gather(torch.ones(1))
        self.trainer.strategy.reduce(torch.ones(1))
        super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        if dist.is_initialized():
            dist.barrier()


def fit_allowed() -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    module = Allowed("mlp")
    quiet_trainer(devices=2, strategy=DDGStrategy(2, ["net.3"]), max_epochs=1).fit(module, loader("mlp"))
    return state_of(module)


def test_questions_and_hooks_go_on_as_before() -> None:
    run_ranks(fit_allowed, 2)


def test_other_threads_are_left_alone_and_the_change_is_undone() -> None:
    before = distributed_c10d._rank_not_in_group
    answers: list[Any] = []

    def some_collective() -> None:
        answers.append(distributed_c10d._rank_not_in_group(None))

    with collectives_refused():
        thread = threading.Thread(target=some_collective)
        thread.start()
        thread.join(60)
        with pytest.raises(RuntimeError, match="`some_collective` was called in a step"):
            some_collective()
    assert distributed_c10d._rank_not_in_group is before
    some_collective()
    assert answers == [False, False]


def test_one_process_may_call_what_it_likes() -> None:
    module = Classifier("mlp")
    quiet_trainer(devices=1, strategy=DDGStrategy(2, ["net.3"]), max_epochs=1).fit(module, loader("mlp"))
    assert not dist.is_initialized()


class InEvaluation(Calls):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.all_gather(torch.ones(1))
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.call(self, loss)
        self.log("val_loss", loss)


EVALUATED = ("dist.all_reduce", "new_group", "functional")


def validate() -> list[str]:
    warnings.simplefilter("ignore")
    said = []
    for call in EVALUATED:
        trainer = quiet_trainer(devices=2, strategy=DDGStrategy(2, ["net.3"]))
        with pytest.raises(RuntimeError) as caught:
            trainer.validate(InEvaluation(call), loader("mlp"), verbose=False)
        said.append(str(caught.value))
    return said


def test_collectives_in_an_evaluation_are_refused() -> None:
    for said in run_ranks(validate, 2):
        for call, message in zip(EVALUATED, said, strict=True):
            assert f"`{CALLS[call][1]}` was called in a step" in message
            assert "each value would count as often as there are stages" in message
