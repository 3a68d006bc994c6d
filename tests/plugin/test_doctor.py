"""Tests of the command ``doctor``: what it prints, and that it notices what is not exact."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lightning_ddg.cli import main
from lightning_ddg.plugin import doctor
from tests.harness import environment


@pytest.fixture(autouse=True)
def _loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_silence", lambda: None)


def diagnosed(capsys: pytest.CaptureFixture[str], *checks: tuple[str, Callable[[], str]]) -> tuple[Any, str, str]:
    def some() -> Iterator[tuple[str, Callable[[], str]]]:
        yield from checks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "checks", some)
        with pytest.raises(SystemExit) as ended:
            main(["doctor"])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_it_says_what_there_is_and_that_one_process_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = diagnosed(capsys, ("one process", lambda: doctor.one_process("cpu")))
    assert code == 0
    for fact in (torch.__version__.partition("+")[0], "Python", "cores", "gloo", "none that torch finds"):
        assert fact in printed or torch.cuda.is_available()
    assert "one process: exact: 0e+00 from plain Lightning" in printed


def test_it_notices_what_is_not_exact_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def differs() -> str:
        module, expected = doctor.Probe(), doctor.Probe()
        with torch.no_grad():
            module.net[0].weight[0, 0] += 1e-6
        return doctor._compared(module, expected, "one process")

    code, printed, errors = diagnosed(capsys, ("first", differs), ("second", lambda: "fine"))
    assert code == 1
    assert "first: FAILED: ArithmeticError: the weights differ from those of one process by 1.0e-06" in printed
    assert "second: fine" in printed
    assert "open an issue" in errors


def test_a_gpu_is_looked_at_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, backends in ((1, ["gloo"]), (2, ["gloo", "NCCL"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        named = [name for name, _ in doctor.checks()]
        assert named[2:] == ["one process, GPU", *(f"two processes, GPU{'s' * (b == 'NCCL')}, {b}" for b in backends)]


@pytest.mark.slow
def test_the_command() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "lightning_ddg", "doctor"],
        env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "two processes, CPU, gloo: exact:" in ended.stdout
    assert "a message takes" in ended.stdout
    assert "barebones" not in ended.stdout + ended.stderr
