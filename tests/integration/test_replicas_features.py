"""Every feature with replicas: with the same data on both, two pipelines train what one does, and one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_ddg import DDGMonitor, DDGStrategy
from tests.harness import run_ranks
from tests.integration import test_callbacks, test_loops, test_optimization
from tests.integration.test_optimization import same_optimizer_state
from tests.networks import Classifier, largest_difference, loader, quiet_trainer, state_of

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


def end_by_a_signal(folder: str, number: int, ranks: tuple[int, ...]) -> Any:
    with not_divided(test_loops):
        before = test_loops.quiet_trainer
        strategy = partial(DDGStrategy, 3)
        test_loops.DDGStrategy, test_loops.quiet_trainer = strategy, lambda **kwargs: before(**{**kwargs, "devices": 6})  # type: ignore[assignment,misc]
        return test_loops.fit_until_a_signal(folder, number, ranks, "training", 1)


@pytest.mark.parametrize("ranks", [(0,), (5,), (3,)])
def test_a_signal_ends_all_replicas_after_the_same_batch(ranks: tuple[int, ...], tmp_path: Path) -> None:
    results = run_ranks(end_by_a_signal, 6, str(tmp_path), signal.SIGTERM, ranks, timeout=120)
    assert all(result.error.startswith("SIGTERMException") for result in results), [one.error for one in results]
    assert len({result.batches for result in results}) == 1
    if ranks == (0,):
        assert results[0].batches == 5, "one batch later than with one pipeline the epoch would have ended"
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    for half in (results[:3], results[3:]):
        together = {name: value for result in half for name, value in result.weights.items()}
        assert largest_difference(saved["state_dict"], together) == 0.0


SCRIPT = """
import os
import warnings
warnings.simplefilter("ignore")
from lightning_ddg import DDGStrategy
from tests.networks import Classifier, loader, quiet_trainer

if __name__ == "__main__":
    strategy = DDGStrategy(2, ["net.3"], start_method="METHOD")
    trainer = quiet_trainer(devices=4, strategy=strategy, max_epochs=2)
    module = Classifier("mlp", "adam")
    trainer.fit(module, loader("mlp"))
    sums = [str(float(module.net[layer].weight.sum())) for layer in (0, 6)]
    # In one piece: several processes write.
    os.write(1, f"weights {trainer.global_rank} {' '.join(sums)}\\n".encode())
"""


def test_scripts_start_replicas_in_every_way(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    found = {}
    for method in ("popen", "spawn", "fork"):
        (tmp_path / "script.py").write_text(SCRIPT.replace("METHOD", method))
        ended = subprocess.run(
            [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
        )
        assert ended.returncode == 0, ended.stderr
        lines = [line.split() for line in ended.stdout.splitlines() if line.startswith("weights")]
        assert len(lines) == (4 if method == "popen" else 1), ended.stdout
        found[method] = {tuple(line[2:]) for line in lines}
    assert len(set.union(*found.values())) == 1, found


class Single(Classifier):
    """In single precision, as most are."""

    def __init__(self) -> None:
        super().__init__("mlp", "nesterov")
        self.net.float()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].float(), batch[1]


def log_all(folder: str, devices: int) -> list[Any]:
    results = []
    for precision in ("bf16-mixed", "32-true"):
        module, monitor = Single(), DDGMonitor(timeline=False, every_n_steps=2)
        trainer = quiet_trainer(
            devices=devices,
            strategy=DDGStrategy(2, ["net.3"]),
            precision=precision,
            callbacks=[monitor],
            logger=CSVLogger(folder, precision, ""),
            log_every_n_steps=1,
            use_distributed_sampler=False,
        )
        trainer.fit(module, loader("mlp"), loader("mlp"))
        results.append((state_of(module), {stage: set(values) for stage, values in monitor.figures.items()}))
    return results


def test_precisions_loggers_and_the_monitor(tmp_path: Path) -> None:
    several, one = (run_ranks(log_all, devices, str(tmp_path / str(devices)), devices) for devices in (4, 2))
    for at, precision in enumerate(("bf16-mixed", "32-true")):
        for number, rank in enumerate(several):
            assert largest_difference(rank[at][0], one[0][at][0]) == 0.0
            assert rank[at][1] == (one[0][at][1] if number == 0 else {})
        lines = [(tmp_path / str(devices) / precision / "metrics.csv").read_text().splitlines() for devices in (4, 2)]
        assert len(lines[0]) == len(lines[1])
        assert set(lines[0][0].split(",")) == set(lines[1][0].split(","))
