"""Every feature with replicas: with the same data on both, two pipelines train what one does, and one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lightning_ddg import DDGStrategy
from tests.harness import run_ranks
from tests.integration import test_callbacks, test_loops, test_optimization
from tests.integration.test_optimization import same_optimizer_state
from tests.networks import largest_difference

pytestmark = pytest.mark.slow


@contextmanager
def not_divided(module: Any) -> Iterator[None]:
    """Let all Trainers of a test's module give each replica all of the data."""
    before = module.quiet_trainer
    module.quiet_trainer = partial(before, use_distributed_sampler=False)
    try:
        yield
    finally:
        module.quiet_trainer = before


def optimize_all(devices: int) -> dict[str, Any]:
    with not_divided(test_optimization):
        return {name: test_optimization.train(name, devices) for name in test_optimization.CASES}


def test_optimization_is_what_it_is_without_replicas() -> None:
    ranks = run_ranks(optimize_all, 6, 6, timeout=600)
    for name in test_optimization.CASES:
        expected = test_optimization.train(name, 1)
        for number, rank in enumerate(ranks):
            got = rank[name]
            assert (got.steps, got.rates) == (expected.steps, expected.rates), (name, number)
            assert largest_difference(got.state, expected.state) <= 1e-11, (name, number)
        assert same_optimizer_state(ranks[0][name].optimizer, expected.optimizer), name


#: A decision inside an epoch takes effect a batch later where there are replicas.
LATER = {
    *("stop in an epoch", "stop before the end of an epoch", "stop in an epoch, never drained", "timer"),
    *("checkpoint by the clock", "checkpoint by the clock on a training metric", "early stopping in an epoch"),
}


def call_back_all(devices: int, folder: str) -> dict[str, Any]:
    with not_divided(test_callbacks):
        return {name: test_callbacks.train(name, devices, folder) for name in test_callbacks.CASES}


def test_callbacks_do_what_they_do_without_replicas(tmp_path: Path) -> None:
    ranks = run_ranks(call_back_all, 6, 6, str(tmp_path / "six"), timeout=600)
    for name in test_callbacks.CASES:
        for rank in ranks:
            for key in ("steps", "batches", "epochs", "groups", "lr"):
                assert rank[name][key] == ranks[0][name][key], (name, key)
            assert largest_difference(rank[name]["state"], ranks[0][name]["state"]) == 0.0, name
        if name in LATER:
            continue
        got, expected = ranks[0][name], test_callbacks.train(name, 1, str(tmp_path / "one"))
        for key in ("steps", "batches", "epochs", "groups"):
            assert got[key] == expected[key], (name, key)
        assert got["metrics"] == pytest.approx(expected["metrics"], abs=1e-5), name
        assert largest_difference(got["state"], expected["state"]) <= 1e-11, name
        for file, state in (expected["saved"] or {"files": {}})["files"].items():
            assert largest_difference(got["saved"]["files"][file], state) <= 1e-11, (name, file)


def loop_all(devices: int) -> dict[str, Any]:
    with not_divided(test_loops):
        return {name: test_loops.live(name, DDGStrategy(2, test_loops.CUT), devices) for name in test_loops.CASES}


def test_loops_do_what_they_do_without_replicas() -> None:
    ranks = run_ranks(loop_all, 4, 4, timeout=600)
    for name in test_loops.CASES:
        journal, state, counts = test_loops.live(name, DDGStrategy(2, test_loops.CUT), 1)
        for number, rank in enumerate(ranks):
            assert rank[name][0] == journal, (name, number)
            assert rank[name][2] == counts, (name, number)
            assert largest_difference(rank[name][1], state) <= 1e-11, (name, number)
