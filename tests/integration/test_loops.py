"""Every option of the loops does what it does without the strategy, and every way to end a fit ends it on all ranks.

A case is run under ``strategy="auto"``, under ddg in one process and in several; what was trained, validated and in
which order must be the same, and the weights those of the one process. Add a case to :data:`CASES`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from lightning_ddg import DDGStrategy
from tests.harness import environment, run_ranks
from tests.networks import Classifier, largest_difference, loader, quiet_trainer, state_of

CUT = ["net.3"]


class Loops(Classifier):
    """Takes whatever a combination of loaders makes of a batch, and makes new loaders when asked to."""

    def __init__(self, train: Callable[[], Any], validation: Callable[[], Any]) -> None:
        super().__init__("mlp", "nesterov", step_lr=False)
        self.train_loader, self.validation_loader = train, validation
        self.journal: list[Any] = []

    def train_dataloader(self) -> Any:
        self.journal.append("train loader")
        return self.train_loader()

    def val_dataloader(self) -> Any:
        self.journal.append("validation loader")
        return self.validation_loader()

    @staticmethod
    def pair(batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, dict):
            batch = list(batch.values())
        if isinstance(batch[0], Tensor):
            return batch[0], batch[1]
        parts = [part for part in batch if part is not None]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(self.pair(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = self.pair(batch)
        self.log("val_loss", nn.functional.cross_entropy(self(x), y), batch_size=len(x))


class Journal(Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        module.journal.append(("train", trainer.current_epoch, batch_idx, trainer.global_step))

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        module.journal.append(("validation", trainer.sanity_checking, dataloader_idx, batch_idx))


class WantsToStop(Callback):
    """On the loss rank only."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 0 and trainer.global_step == 2:
            trainer.should_stop = True


@dataclass(frozen=True)
class Case:
    """Arguments of the Trainer, the loaders, further callbacks."""

    options: dict[str, Any]
    train: Callable[[], Any] = lambda: loader("mlp")
    validation: Callable[[], Any] = lambda: loader("mlp", 7, 3)
    callbacks: tuple[type[Callback], ...] = ()


def combined(mode: str) -> Callable[[], CombinedLoader]:
    return lambda: CombinedLoader({"a": loader("mlp", 22, 5), "b": loader("mlp", 8, 3)}, mode)


CASES: dict[str, Case] = {
    "max_steps": Case({"max_steps": 7, "max_epochs": -1}),
    "max_epochs": Case({"max_epochs": 2}),
    "min_epochs": Case({"max_epochs": 4, "min_epochs": 2}, callbacks=(WantsToStop,)),
    "min_steps": Case({"max_epochs": 4, "min_steps": 8}, callbacks=(WantsToStop,)),
    "limits as counts": Case({"limit_train_batches": 3, "limit_val_batches": 1}),
    "limits as fractions": Case({"limit_train_batches": 0.5, "limit_val_batches": 0.7}),
    "no training": Case({"limit_train_batches": 0}),
    "no validation": Case({"limit_val_batches": 0}),
    "overfit batches": Case({"overfit_batches": 2}),
    "overfit a fraction": Case({"overfit_batches": 0.5}),
    "fast dev run": Case({"fast_dev_run": True}),
    "fast dev run of 3": Case({"fast_dev_run": 3}),
    "sanity check of 1": Case({"num_sanity_val_steps": 1}),
    "sanity check of all": Case({"num_sanity_val_steps": -1}),
    "no sanity check": Case({"num_sanity_val_steps": 0}),
    "validation every 2 batches": Case({"val_check_interval": 2}),
    "validation twice an epoch": Case({"val_check_interval": 0.5}),
    "validation every 7 batches": Case({"val_check_interval": 7, "check_val_every_n_epoch": None}),
    "validation every 2 epochs": Case({"check_val_every_n_epoch": 2}),
    "two validation loaders": Case({}, validation=lambda: [loader("mlp", 7, 3), loader("mlp", 4, 2)]),
    "combined, longest, cycling": Case({}, combined("max_size_cycle")),
    "combined, longest": Case({}, combined("max_size")),
    "combined, shortest": Case({}, combined("min_size")),
    "a list of loaders": Case({}, lambda: [loader("mlp", 22, 5), loader("mlp", 8, 3)]),
    "combined validation": Case({}, validation=combined("max_size_cycle")),
    "sequential validation": Case({}, validation=combined("sequential")),
    "new loaders every epoch": Case({"reload_dataloaders_every_n_epochs": 1}),
    "new loaders every 2 epochs": Case({"reload_dataloaders_every_n_epochs": 2}),
    "barebones": Case({"barebones": True}),
    "inference_mode off": Case({"inference_mode": False}),
}


def live(name: str, strategy: Any, devices: int) -> tuple[list[Any], dict[str, Tensor], tuple[int, int]]:
    warnings.simplefilter("ignore")
    case = CASES[name]
    module = Loops(case.train, case.validation)
    options = {"max_epochs": 3, **case.options}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    trainer = quiet_trainer(
        **{**(quiet if "barebones" in options else {}), **options},
        devices=devices,
        strategy=strategy,
        callbacks=[callback() for callback in (*case.callbacks, Journal)],
    )
    trainer.fit(module)
    return module.journal, state_of(module), (trainer.global_step, trainer.current_epoch)


def live_all(kind: str, devices: int) -> dict[str, Any]:
    return {name: live(name, DDGStrategy(split_points=CUT) if kind == "ddg" else kind, devices) for name in CASES}


@pytest.fixture(scope="module")
def auto() -> Any:
    return run_ranks(live_all, 1, "auto", 1)[0]


@pytest.fixture(scope="module")
def one_process() -> Any:
    return run_ranks(live_all, 1, "ddg", 1)[0]


@pytest.fixture(scope="module")
def two_processes() -> Any:
    return run_ranks(live_all, 2, "ddg", 2)


def without_first(journal: list[Any], event: str) -> list[Any]:
    at = journal.index(event) if event in journal else len(journal)
    return journal[:at] + journal[at + 1 :]


@pytest.mark.parametrize("name", CASES)
def test_the_loops_do_what_they_do_without_the_strategy(
    name: str, auto: Any, one_process: Any, two_processes: Any
) -> None:
    journal, state, counts = one_process[name]
    # What the step calls is seen on the first batch, for which the loader is made a little earlier.
    assert without_first(journal, "train loader") == without_first(auto[name][0], "train loader")
    assert counts == auto[name][2]
    for rank in two_processes:
        assert rank[name][0] == journal
        assert rank[name][2] == counts
        assert largest_difference(rank[name][1], state) <= 1e-12


# ---- profilers, and what Lightning itself refuses


def profile(folder: str) -> list[str]:
    """Fits with each built-in profiler and returns the files there are then."""
    warnings.simplefilter("ignore")
    for name in ("simple", "advanced", "pytorch"):
        options = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0, "profiler": name}
        quiet_trainer(devices=2, strategy="ddg", default_root_dir=folder, **options).fit(Classifier(), loader("mlp"))
    for made in (SimpleProfiler, AdvancedProfiler):
        profiler = made(dirpath=folder, filename=made.__name__)
        options = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0, "profiler": profiler}
        quiet_trainer(devices=2, strategy="ddg", **options).fit(Classifier(), loader("mlp"))
    return sorted(path.name for path in Path(folder).iterdir() if path.is_file())


def test_each_rank_writes_a_profile_of_its_own(tmp_path: Path) -> None:
    run_ranks(profile, 2, str(tmp_path))
    files = {path.name for path in tmp_path.rglob("*.txt")}
    expected = {f"fit-{name}-{rank}.txt" for name in ("SimpleProfiler", "AdvancedProfiler") for rank in (0, 1)}
    assert expected <= files
    for name in expected:
        (text,) = [path.read_text() for path in tmp_path.rglob(name)]
        assert "run_training_batch" in text


def fit_sequentially(devices: int) -> str:
    trainer = quiet_trainer(devices=devices, strategy="ddg")
    try:
        trainer.fit(Loops(combined("sequential"), lambda: loader("mlp")))
    except ValueError as error:
        return str(error)
    return "trained"


def test_loaders_in_sequence_are_refused_by_lightning_for_training() -> None:
    for message in (*run_ranks(fit_sequentially, 1, 1), *run_ranks(fit_sequentially, 2, 2)):
        assert "sequential" in message
        assert "max_size_cycle" in message


# ---- signals


class SendsSignals(Callback):
    """Sends its own process a signal on some ranks, as an operator would, and keeps count."""

    def __init__(self, number: int, ranks: tuple[int, ...], where: str = "training", times: int = 1) -> None:
        self.number, self.ranks, self.where, self.times = number, ranks, where, times
        self.batches = 0

    def send(self, trainer: Any) -> None:
        if trainer.global_rank in self.ranks:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.batches += 1
        if self.where == "training" and self.batches == 2:
            self.send(trainer)

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        if self.where == "epoch end":
            self.send(trainer)

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.where == "validation" and not trainer.sanity_checking:
            self.send(trainer)


@dataclass
class Ended:
    """How a rank ended: its exception, after how many batches, and its own stage's weights then."""

    error: str
    batches: int
    weights: dict[str, Tensor]


def fit_until_a_signal(folder: str, number: int, ranks: tuple[int, ...], where: str, times: int) -> Ended:
    warnings.simplefilter("ignore")
    # A shell that starts the tests in the background has it ignored, for all processes that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sends = SendsSignals(number, ranks, where, times)
    strategy = DDGStrategy(split_points=["net.2", "net.5"])
    callbacks = [sends, OnExceptionCheckpoint(folder)]
    trainer = quiet_trainer(devices=3, strategy=strategy, max_epochs=50, callbacks=callbacks, enable_checkpointing=True)
    module = Classifier("mlp", "nesterov")
    error: BaseException | None = None
    try:
        trainer.fit(module, loader("mlp"), loader("mlp", 7, 3))
    except BaseException as caught:  # noqa: BLE001 - these are no `Exception`s
        error = caught
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)
    assert strategy.stage is not None
    own = set(strategy.stage_parameter_names[strategy.stage - 1])
    weights = {name: value for name, value in state_of(module).items() if name in own}
    return Ended(f"{type(error).__name__}: {error}", sends.batches, weights)


@pytest.mark.parametrize(
    ("number", "ranks", "where"),
    [
        (signal.SIGTERM, (0, 1, 2), "training"),
        (signal.SIGTERM, (0,), "training"),
        (signal.SIGTERM, (2,), "training"),
        (signal.SIGTERM, (0, 1, 2), "epoch end"),
        (signal.SIGINT, (0, 1, 2), "training"),
        (signal.SIGINT, (1,), "training"),
        (signal.SIGINT, (0,), "epoch end"),
    ],
)
def test_a_signal_ends_all_ranks_after_the_same_batch_and_with_a_checkpoint(
    number: int, ranks: tuple[int, ...], where: str, tmp_path: Path
) -> None:
    results = run_ranks(fit_until_a_signal, 3, str(tmp_path), number, ranks, where, 1, timeout=60)
    error = "SIGTERMException" if number == signal.SIGTERM else "SystemExit: 1"
    assert all(result.error.startswith(error) for result in results), [result.error for result in results]
    assert len({result.batches for result in results}) == 1
    if where == "training" and ranks == (0,):
        assert results[0].batches == 2 + 3, "as many batches later as there are stages"
    if where == "training" and ranks == (0, 1, 2):
        # The stages before rank 0's are ahead, and rank 0 may hear of theirs before its own comes.
        assert results[0].batches <= 2 + 3
    if where == "epoch end":
        assert results[0].batches == 5
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    together: dict[str, Tensor] = {}
    for result in results:
        together.update(result.weights)
    assert largest_difference(saved["state_dict"], together) == 0.0
    assert saved["global_step"] == results[0].batches


@pytest.mark.parametrize(
    ("number", "where", "times"), [(signal.SIGTERM, "validation", 1), (signal.SIGINT, "training", 2)]
)
def test_elsewhere_a_signal_ends_all_ranks_at_once(number: int, where: str, times: int, tmp_path: Path) -> None:
    """In a validation; and a second Ctrl-C, for who does not want to wait."""
    results = run_ranks(fit_until_a_signal, 3, str(tmp_path), number, (1,), where, times, timeout=60)
    expected = "SIGTERMException" if number == signal.SIGTERM else "SystemExit"
    assert results[1].error.startswith(expected)
    how = "ended by SIGTERM while validating" if number == signal.SIGTERM else "interrupted by Ctrl-C while training"
    for other in (results[0], results[2]):
        assert f"Rank 1 (stage 2) was {how}" in other.error
    assert not (tmp_path / "on_exception.ckpt").exists()


SCRIPT = """
import warnings
warnings.simplefilter("ignore")
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
import lightning_ddg
from tests.networks import Classifier, loader, quiet_trainer


class Speaks(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            print("training", trainer.global_rank, flush=True)


if __name__ == "__main__":
    callbacks = [Speaks(), OnExceptionCheckpoint(".")]
    options = {"max_epochs": -1, "callbacks": callbacks, "enable_checkpointing": True}
    trainer = quiet_trainer(devices=2, strategy="STRATEGY", **options)
    trainer.fit(Classifier("mlp"), loader("mlp"))
"""


@pytest.mark.parametrize(
    ("number", "strategy"),
    [
        (signal.SIGINT, "ddg"),
        pytest.param(signal.SIGTERM, "ddg", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "ddg_notebook", marks=pytest.mark.slow),
    ],
)
def test_a_script_ends_with_all_its_processes(number: int, strategy: str, tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of a terminal; SIGTERM to the one that was started, which hands it on."""
    (tmp_path / "script.py").write_text(SCRIPT.replace("STRATEGY", strategy))
    with subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A job in the background is started with Ctrl-C ignored, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        try:
            lines = []
            while sum("training" in line for line in lines) < 2:
                line = process.stdout.readline()
                assert line, "".join(lines)
                lines.append(line)
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            # The pipe ends when the last process that writes to it has ended.
            rest, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    # For Ctrl-C Lightning decides.
    assert process.returncode == (1 if number == signal.SIGINT else 128 + signal.SIGTERM)
    assert "failed with" not in rest
    if number == signal.SIGTERM:
        assert "SIGTERM came to rank 0: all stages stop after the same batch" in "".join(lines) + rest
    if strategy == "ddg_notebook":
        # Lightning calls `on_exception` in the process that waits, which has no weights to save.
        assert not list(tmp_path.glob("*.ckpt"))
        return
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] >= 3
