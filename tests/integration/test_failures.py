"""Nothing hangs: whatever goes wrong on one rank, every rank ends within 30 seconds, and the first error is shown."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_ddg import DDGStrategy
from tests.harness import environment, run_ranks_raw
from tests.networks import Classifier, loader, quiet_trainer

LIMIT = 30.0


class Bomb(nn.Module):
    """Fails in the forward or the backward of its third batch."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.batches = where, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
        if self.batches == 3 and self.where == "forward":
            raise ArithmeticError("bang in forward")
        if self.batches == 3 and self.where == "shape":
            return x[:, :-1]
        if self.batches == 3 and self.where == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.batches == 3 and self.where == "backward":
            x.register_hook(self._fail)
        return x

    def _fail(self, grad: Tensor) -> None:
        raise ArithmeticError("bang in backward")


class FailingData(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        if index == 9:
            raise ArithmeticError("bang in the data")
        return torch.zeros(6, dtype=torch.float64), 0


class FailingHook(Callback):
    def __init__(self, stage: int, hook: str) -> None:
        self.stage = stage
        setattr(self, hook, self.fail)

    def fail(self, trainer: Any, *args: Any) -> None:
        if trainer.strategy.stage == self.stage:
            raise ArithmeticError("bang in a hook")


class FailingLoss(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            raise ArithmeticError("bang in the step")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.current_epoch == 1 and self.trainer.strategy.stage == 2:  # type: ignore[attr-defined]
            raise ArithmeticError("bang in validation")


class FailingValidation(FailingLoss):
    training_step = Classifier.training_step


class SavesWhenItFails(Callback):
    """A callback of the user's that cannot know that the other stages are out of reach."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint("never-written.ckpt")


def break_down(what: str, stage: int, folder: str) -> str:
    warnings.simplefilter("ignore")
    module: Classifier = Classifier("mlp")
    data: Any = loader("mlp")
    callbacks: list[Callback] = [ModelCheckpoint(folder, save_last=True), SavesWhenItFails()]
    if what in ("forward", "backward", "shape", "kill"):
        module.net.insert({1: 1, 2: 4, 3: 7}[stage], Bomb(what))
    elif what == "data":
        data = torch.utils.data.DataLoader(FailingData(), 4)
    elif what == "worker":
        data = torch.utils.data.DataLoader(FailingData(), 4, num_workers=1)
    elif what == "step":
        module = FailingLoss("mlp")
    elif what == "validation":
        module = FailingValidation("mlp")
    else:
        callbacks.append(FailingHook(stage, what))
    strategy = DDGStrategy(num_stages=3, split_points=["net.2", "net.5"])
    trainer = quiet_trainer(devices=3, strategy=strategy, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, data, loader("mlp"))
    return "trained"


CASES = [
    *[(what, stage) for what in ("forward", "backward", "kill") for stage in (1, 2, 3)],
    ("shape", 1),
    ("data", 1),
    ("worker", 1),
    ("step", 3),
    ("validation", 2),
    ("on_train_batch_start", 1),
    ("on_train_batch_end", 2),
    ("on_train_epoch_end", 3),
    ("on_validation_start", 2),
    ("on_after_backward", 1),
]


@pytest.mark.parametrize(("what", "stage"), CASES)
def test_every_rank_ends(what: str, stage: int, tmp_path: Path) -> None:
    results = run_ranks_raw(break_down, 3, what, stage, str(tmp_path), timeout=LIMIT)
    guilty = 3 - stage
    for rank, result in enumerate(results):
        assert result.exitcode != 0, (rank, result)
        assert result.error is not None
        if what == "kill":
            assert (
                rank == guilty
                or f"Rank {guilty} (stage {stage}) is gone" in result.error
                or "Connection" in result.error
            )
        elif what != "shape":
            assert "bang" in result.error, (rank, result.error)
    if what == "shape":
        assert any("Given normalized_shape" in str(result.error) for result in results)
    if what == "kill":
        said = "".join(str(result.error) for rank, result in enumerate(results) if rank != guilty)
        assert f"Rank {guilty} (stage {stage}) is gone" in said


class Hangs(Classifier):
    """One rank hangs in a hook until the others have ended."""

    def __init__(self, hook: str, folder: str) -> None:
        super().__init__("mlp")
        self.hook, self.folder = hook, Path(folder)

    def here(self, hook: str) -> None:
        if hook == self.hook and self.trainer.strategy.stage == 2:  # type: ignore[attr-defined]
            deadline = time.monotonic() + LIMIT - 5
            while len(list(self.folder.glob("*.ended"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            os._exit(0)

    def setup(self, stage: str) -> None:
        self.here("setup")

    def configure_optimizers(self) -> Any:
        self.here("configure_optimizers")
        return super().configure_optimizers()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.here("on_save_checkpoint")


def wait_for_a_rank_that_hangs(hook: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    strategy = DDGStrategy(num_stages=3, split_points=["net.2", "net.5"], timeout=timedelta(seconds=2))
    saving = ModelCheckpoint(folder)
    trainer = quiet_trainer(devices=3, strategy=strategy, callbacks=[saving], enable_checkpointing=True, max_epochs=1)
    try:
        trainer.fit(Hangs(hook, folder), loader("mlp"))
    finally:
        (Path(folder) / f"{trainer.global_rank}.ended").touch()


@pytest.mark.parametrize("hook", ["setup", "configure_optimizers", "on_save_checkpoint"])
def test_a_rank_that_hangs_ends_the_others_within_the_timeout(hook: str, tmp_path: Path) -> None:
    first, hanging, last = run_ranks_raw(wait_for_a_rank_that_hangs, 3, hook, str(tmp_path), timeout=LIMIT)
    assert hanging.value is None
    assert len(list(tmp_path.glob("*.ended"))) == 2
    for result in (first, last):
        assert re.search(
            r"Rank \d \(stage \d\) waited 0:00:02 for a message \(\w+\) from Rank 1 \(stage 2\)", result.error or ""
        )


class SavesAlone(Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == 2:
            trainer.save_checkpoint("alone.ckpt")


def save_alone() -> None:
    warnings.simplefilter("ignore")
    quiet_trainer(devices=2, strategy="ddg", callbacks=[SavesAlone()]).fit(Classifier("mlp"), loader("mlp"))


def test_a_rank_that_saves_alone_is_told_so_at_once() -> None:
    """Not at the timeout, of half an hour."""
    for result in run_ranks_raw(save_alone, 2, timeout=LIMIT):
        assert "each waits for the other. Do on all ranks what one of them does here" in (result.error or "")


class Diverging(Classifier):
    """Skips the rest of an epoch on one rank only."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.trainer.strategy.stage == 1 and batch_idx == 2 else None  # type: ignore[attr-defined]


def diverge() -> None:
    warnings.simplefilter("ignore")
    quiet_trainer(devices=2, strategy="ddg").fit(Diverging("mlp"), loader("mlp"))


def test_ranks_that_count_differently_are_told_so() -> None:
    results = run_ranks_raw(diverge, 2, timeout=LIMIT)
    assert all(result.exitcode != 0 for result in results)
    assert any("already ended the epoch" in str(result.error) for result in results)


SCRIPT = """
import warnings
warnings.simplefilter("ignore")
import lightning_ddg
from tests.integration.test_failures import Bomb
from tests.networks import Classifier, loader, quiet_trainer
from lightning_ddg import DDGStrategy

module = Classifier("mlp")
module.net.insert({position}, Bomb({where!r}))
strategy = DDGStrategy(split_points=["net.4"], start_method={start!r})
if __name__ == "__main__":
    quiet_trainer(devices=2, strategy=strategy, max_epochs=1).fit(module, loader("mlp"))
    print("trained", module.net[0].weight.sum().item())
"""


def run_script(tmp_path: Path, **values: Any) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(**values))
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(("start", "position"), [("popen", 7), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_started_processes_end_with_the_first_error(start: str, position: int, tmp_path: Path) -> None:
    done = run_script(tmp_path, position=position, where="forward", start=start)
    assert done.returncode != 0
    assert "ArithmeticError: bang in forward" in done.stderr
    assert "trained" not in done.stdout
