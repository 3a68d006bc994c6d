"""Tests of ``sameness.py``: ranks that were not given the same are ended, with what differs."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_ddg import DDGStrategy, Staleness
from lightning_ddg.plugin import host
from lightning_ddg.plugin.sameness import check_same_on_all_ranks, differences, facts_of_run
from tests.harness import run_ranks
from tests.networks import Classifier, loader, quiet_trainer


def test_what_differs_is_named_with_both_values() -> None:
    facts = [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1", "c": "x" * 200}]
    found = differences(facts)
    assert found[:2] == ["b is 2 on rank 0, but 3 on rank 1", "b is 2 on rank 0, but absent on rank 2"]
    assert found[2].startswith("c is absent on rank 0, but xxxx")
    assert found[2].endswith("... on rank 2")
    check_same_on_all_ranks([facts[0]] * 3)
    check_same_on_all_ranks([facts[0]])


def test_functions_of_the_same_name_are_the_same() -> None:
    def facts() -> dict[str, str]:
        def backend() -> None: ...

        kept.append(backend)
        module = Classifier("mlp")
        strategy = DDGStrategy(num_stages=2, compile={"backend": backend})
        trainer = quiet_trainer(devices=1, strategy=strategy)
        site: Any = SimpleNamespace(options=strategy._options, trainer=trainer, module=module)
        return facts_of_run(site)

    kept: list[Any] = []
    first, second = facts(), facts()
    assert kept[0] is not kept[1]
    assert "function" in first["the strategy's `compile`"]
    assert first["the version of torch"] == torch.__version__
    assert {"the version of lightning_ddg", f"the version of {host.HOST}"} <= first.keys()
    check_same_on_all_ranks([first, second])


class Configured(Classifier):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__("mlp")
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self)


def sgd(**options: Any) -> Callable[[Any], Any]:
    return lambda module: torch.optim.SGD(module.parameters(), **{"lr": 0.1, **options})


def scheduled(total: int) -> Callable[[Any], Any]:
    def make(module: Any) -> Any:
        optimizer = sgd()(module)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return make


def grouped(module: Any) -> Any:
    first, *rest = module.parameters()
    return torch.optim.SGD([{"params": [first]}, {"params": rest}], lr=0.1)


def wider(rank: int) -> Classifier:
    module = Configured(sgd())
    if rank:
        module.net[5], module.net[6] = nn.Linear(10, 9).double(), nn.Linear(9, 3).double()
    return module


def activated(rank: int) -> Classifier:
    module = Configured(sgd())
    module.net[2] = nn.ReLU() if rank else nn.Tanh()
    return module


def frozen(rank: int) -> Classifier:
    module = Configured(sgd())
    module.net[0].weight.requires_grad = not rank
    return module


#: By the rank: the strategy's arguments, the Trainer's, the module; and what the message says.
Case = tuple[Callable[[int], dict[str, Any]], Callable[[int], dict[str, Any]], Callable[[int], Any], str]
SAME = lambda rank: {}  # noqa: E731
CASES: dict[str, Case] = {
    "split_points": (
        lambda rank: {"split_points": [f"net.{3 + rank}"]}, SAME, lambda rank: Configured(sgd()),
        r"the strategy's `split_points` is \['net.3'\] on rank 0, but \['net.4'\] on rank 1",
    ),
    "drain": (
        lambda rank: {"drain": ("epoch", "never")[rank]}, SAME, lambda rank: Configured(sgd()),
        "the strategy's `drain` is 'epoch' on rank 0, but 'never' on rank 1",
    ),
    "staleness": (
        lambda rank: {"staleness": Staleness(shrink=(1.0, 0.5)[rank])}, SAME, lambda rank: Configured(sgd()),
        "the strategy's `staleness` is .*'shrink': 1.0.* on rank 0, but .*'shrink': 0.5.* on rank 1",
    ),
    "accumulation": (
        SAME, lambda rank: {"accumulate_grad_batches": 1 + rank}, lambda rank: Configured(sgd()),
        "the Trainer's `accumulate_grad_batches` is 1 on rank 0, but 2 on rank 1",
    ),
    "clipping": (
        SAME, lambda rank: {"gradient_clip_val": 0.5 + rank}, lambda rank: Configured(sgd()),
        "the Trainer's `gradient_clip_val` is 0.5 on rank 0, but 1.5 on rank 1",
    ),
    "batches": (
        SAME, lambda rank: {"limit_train_batches": 2 + rank}, lambda rank: Configured(sgd()),
        "the Trainer's `limit_train_batches` is 2 on rank 0, but 3 on rank 1",
    ),
    "epochs": (
        SAME, lambda rank: {"max_epochs": 1 + rank}, lambda rank: Configured(sgd()),
        "the Trainer's `max_epochs` is 1 on rank 0, but 2 on rank 1",
    ),
    "optimizer": (
        SAME, SAME, lambda rank: Configured(sgd() if rank else lambda module: torch.optim.Adam(module.parameters())),
        "the optimizer is Adam on rank 0, but SGD on rank 1",
    ),
    "learning rate": (
        SAME, SAME, lambda rank: Configured(sgd(lr=0.1 + rank)),
        "`lr` of the optimizer's group 0 is 0.1 on rank 0, but 1.1 on rank 1",
    ),
    "groups": (
        SAME, SAME, lambda rank: Configured(grouped if rank else sgd()),
        "the parameters of the optimizer's group 1 is absent on rank 0, but .* on rank 1",
    ),
    "schedule": (
        SAME, SAME, lambda rank: Configured(scheduled(10 + rank)),
        "`total_steps` of the scheduler 0 is 10 on rank 0, but 11 on rank 1",
    ),
    "shapes": (SAME, SAME, wider, r"the parameter 'net.5.weight' is float64 of the shape \(8, 10\) on rank 0, but .*9"),
    "layers": (SAME, SAME, activated, "the type of the module 'net.2' is Tanh on rank 0, but ReLU on rank 1"),
    "frozen": (SAME, SAME, frozen, r"the parameter 'net.0.weight' is .* on rank 0, but .*, frozen on rank 1"),
}  # fmt: skip


def outcomes() -> list[str]:

    warnings.simplefilter("ignore")
    said = []
    for strategy, trainer, module, _ in CASES.values():
        rank = int(os.environ["LOCAL_RANK"])
        given = {"split_points": ["net.3"], **strategy(rank)}
        try:
            made = quiet_trainer(devices=2, strategy=DDGStrategy(2, **given), **{"max_epochs": 1, **trainer(rank)})
            made.fit(module(rank), loader("mlp"))
            said.append("trained")
        except Exception as error:  # noqa: BLE001 - what each rank says is what is tested
            said.append(str(error))
    return said


def test_ranks_that_were_given_different_things_end() -> None:
    for rank, said in enumerate(run_ranks(outcomes, 2)):
        for (name, (_, _, _, message)), text in zip(CASES.items(), said, strict=True):
            assert re.search(message, text), (rank, name, text)
            assert "The ranks were not given the same: " in text
            assert "Give all ranks the same" in text
