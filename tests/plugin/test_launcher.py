"""Tests of the launchers: who has been started is not left behind; SIGTERM reaches those who are waited for."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lightning_ddg import DDGStrategy
from lightning_ddg.plugin import compat, launcher
from lightning_ddg.plugin.launcher import ForkLauncher, ScriptLauncher, kill_if_stopped, kill_those_left


def test_a_frozen_process_is_killed_and_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    ended, frozen = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "600"])
    os.kill(frozen.pid, signal.SIGSTOP)
    kill_those_left([ended, frozen])
    assert (ended.returncode, frozen.returncode) == (0, -signal.SIGKILL)
    said = capfd.readouterr().err
    assert f"the process of local rank 2 (PID {frozen.pid}) has not ended within 0 seconds" in said
    assert "local rank 1" not in said


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the system does not say which processes are stopped")
def test_the_first_process_is_killed_only_if_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    with subprocess.Popen(["sleep", "600"]) as running, subprocess.Popen(["sleep", "600"]) as stopped:
        os.kill(stopped.pid, signal.SIGSTOP)
        # It is stopped when the one that waits for it is told.
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)
        kill_if_stopped(running.pid)
        kill_if_stopped(stopped.pid)
        assert (running.poll(), stopped.wait(10)) == (None, -signal.SIGKILL)
        running.kill()
    kill_if_stopped(stopped.pid)
    said = capfd.readouterr().err
    assert said == f"lightning_ddg: the process of local rank 0 (PID {stopped.pid}) is stopped, and is killed.\n"


@pytest.mark.parametrize("fails", [False, True])
def test_scripts_are_looked_after_when_a_run_fails(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(launcher.atexit, "register", lambda *args: registered.append(args))
    monkeypatch.setattr(compat.SubprocessScriptLauncher, "launch", lambda self, function: function())
    starts = ScriptLauncher.__new__(ScriptLauncher)
    starts.procs = ["a process"]
    if fails:
        with pytest.raises(ZeroDivisionError):
            starts.launch(lambda: 1 / 0)
    else:
        assert starts.launch(lambda: 7) == 7
    assert registered == ([(kill_those_left, ["a process"])] if fails else [])
    # Lightning's own watch would kill this process, before it has said why it ends.
    assert starts.procs == ([] if fails else ["a process"])


class Process:
    terminated = 0

    def terminate(self) -> None:
        self.terminated += 1


def test_sigterm_is_handed_on_and_ends_the_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(self: Any, function: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("process 0 terminated with exit code 143")

    monkeypatch.setattr(compat.MultiProcessingLauncher, "launch", wait)
    starts, process = ForkLauncher.__new__(ForkLauncher), Process()
    starts.procs = [process]
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            starts.launch(print)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended.value.code, process.terminated) == (143, 1)


def test_a_handler_of_the_program_s_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    monkeypatch.setattr(
        compat.MultiProcessingLauncher, "launch", lambda self, function: os.kill(os.getpid(), signal.SIGTERM)
    )
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        ForkLauncher.__new__(ForkLauncher).launch(print)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_the_process_that_waits_writes_no_checkpoint_of_a_failed_run(tmp_path: Path) -> None:
    strategy = DDGStrategy(start_method="spawn")
    strategy._launcher = ForkLauncher.__new__(ForkLauncher)
    strategy.save_checkpoint({"step": 1}, tmp_path / "whole.ckpt")
    assert (tmp_path / "whole.ckpt").is_file()
    strategy._launcher.failed = True
    with pytest.warns(UserWarning, match="no.ckpt': this process only waits for those that train, which have ended"):
        strategy.save_checkpoint({"step": 1}, tmp_path / "no.ckpt")
    assert not (tmp_path / "no.ckpt").exists()
