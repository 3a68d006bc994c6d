"""Tests of what a rank says last: which rank it is, what came first, and where."""

from __future__ import annotations

import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessExitedException

from lightning_ddg.comm.mailbox import PeerError, UnmatchedError
from lightning_ddg.plugin import first_error

RANK, OTHER = "Rank 1 (stage 2)", "Rank 0 (stage 3) failed in set-up, with ValueError: no"


def trainer_in(stage: RunningStage, hook: str | None = None) -> Any:
    return SimpleNamespace(
        state=SimpleNamespace(stage=stage),
        training=stage is RunningStage.TRAINING,
        current_epoch=2,
        fit_loop=SimpleNamespace(batch_idx=7),
        strategy=SimpleNamespace(lightning_module=SimpleNamespace(_current_fx_name=hook)),
    )


def raised(where: str) -> ArithmeticError:
    """An exception that has come through a function of a name."""
    functions: dict[str, Any] = {}
    exec(f"def {where}():\n    raise ArithmeticError('bang')", functions)
    with pytest.raises(ArithmeticError) as caught:
        functions[where]()
    return caught.value


@pytest.mark.parametrize(
    ("stage", "through", "hook", "place"),
    [
        (RunningStage.TRAINING, "_run_stage", None, "while training (epoch 2, batch 7)"),
        (RunningStage.TRAINING, "_run_stage", "on_x", "while training (epoch 2, batch 7), in `on_x`"),
        (RunningStage.TRAINING, "setup", "setup", "in set-up, in `setup`"),
        (RunningStage.TRAINING, "save_checkpoint", None, "while saving a checkpoint"),
        (RunningStage.VALIDATING, "_run_stage", "validation_step", "while validating, in `validation_step`"),
        (RunningStage.SANITY_CHECKING, "_run_stage", None, "in the sanity check"),
    ],
)  # fmt: skip
def test_the_place_is_told(stage: RunningStage, through: str, hook: str | None, place: str) -> None:
    trainer = trainer_in(stage, hook)
    assert first_error.place(trainer, raised(through)) == place
    assert first_error.reason(RANK, trainer, raised(through)) == f"{RANK} failed {place}, with ArithmeticError: bang"


@pytest.mark.parametrize(
    ("exception", "says"),
    [
        (KeyboardInterrupt(), "was interrupted by Ctrl-C in set-up"),
        (SIGTERMException(), "was ended by SIGTERM in set-up"),
        (AssertionError(), "failed in set-up, with AssertionError"),
    ],
)
def test_what_has_no_text_is_told_in_words(exception: BaseException, says: str) -> None:
    assert first_error.reason(RANK, trainer_in(RunningStage.TRAINING), exception) == f"{RANK} {says}"


def test_the_first_failure_is_the_last_line_of_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    error = raised("setup")
    for _ in range(2):
        first_error.sign(error, RANK, f"{RANK} failed in set-up,\n with ArithmeticError: bang")
    line = f"{RANK} failed in set-up, with ArithmeticError: bang"
    assert error.__notes__ == [line]
    assert capfd.readouterr().err == ("" if sys.version_info >= (3, 11) else f"{line}\n")


def test_what_another_has_done_is_said_in_one_line_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    error = PeerError(OTHER)
    for _ in range(2):
        first_error.sign(error, RANK, OTHER)
    assert capfd.readouterr().err == f"{RANK} ends: {OTHER}\n"


def test_a_rank_that_fails_because_of_another_names_it() -> None:
    error = RuntimeError("Connection closed by peer")
    first_error.sign(error, RANK, OTHER)
    assert error.__notes__ == [f"{RANK} ends: {OTHER}"]


@pytest.mark.parametrize(
    ("rank", "code", "says"),
    [
        (0, -signal.SIGTERM, "Rank 0 (stage 3) was ended by SIGTERM"),
        (2, -signal.SIGKILL, "Rank 2 (stage 1) was ended by SIGKILL"),
        (1, 3, "Rank 1 (stage 2) has left with exit code 3"),
    ],
)
def test_who_starts_processes_says_which_rank_has_ended(rank: int, code: int, says: str) -> None:
    error = ProcessExitedException("process terminated", rank, 1234, code)
    first_error.sign_exit(error, 3, 3)
    assert error.__notes__ == [says]


def test_each_rank_that_gives_up_waiting_says_so_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    for error in (TimeoutError("waited"), ValueError("no")):
        first_error.sign(error, RANK, f"{RANK} failed, with {error}")
        first_error.say_waited(error)
    printed = capfd.readouterr().err.splitlines()
    assert printed == [
        f"{RANK} failed, with waited",
        *([] if sys.version_info >= (3, 11) else [f"{RANK} failed, with no"]),
    ]


def test_a_line_has_an_end() -> None:
    assert first_error.one_line("a\n  b") == "a b"
    assert len(first_error.one_line("long " * 1000)) < 700


@pytest.mark.parametrize(("error", "tracebacks"), [(PeerError("of another"), 0), (UnmatchedError("of both"), 1)])
def test_only_what_others_have_told_prints_no_traceback(
    error: Exception, tracebacks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    for _ in range(2):
        first_error.silence_told()
    sys.excepthook(type(error), error, None)
    printed = capsys.readouterr().err
    assert printed.count(str(error)) == tracebacks
