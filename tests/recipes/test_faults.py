"""Tests of the campaign of faults: how a case is judged, and a slice of it, in real processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from recipes.faults import soak
from recipes.faults.__main__ import main, summary
from recipes.faults.campaign import VARIABLE, Outcome, command, processes, run, told
from recipes.faults.cases import FAULTS, LAUNCHERS, PLACES, Case, draw
from tests.harness import environment

CASE = Case(1, "popen", 2, "raise", "setup", 2)
FIRST = "Rank 0 (stage 2) failed in set-up, in `setup`, with ArithmeticError: bang"
ENDED = Outcome(CASE, seconds=3.0, code=1, told=True, ranks=True, tracebacks=1, left=(), output=FIRST)


def test_cases_are_drawn_from_everything_and_the_same_ones_again() -> None:
    cases = list(draw(7, 300))
    assert cases[:40] == list(draw(7, 40))
    assert [case.number for case in cases] == list(range(1, 301))
    assert {case.fault for case in cases} == FAULTS.keys() - {"cut"}
    assert {case.place for case in cases} == set(PLACES)
    assert {case.launcher for case in cases} == set(LAUNCHERS)
    assert all(1 <= case.stage <= case.stages for case in cases)


@pytest.mark.parametrize(
    ("changed", "miss"),
    [
        ({"seconds": None}, "did not end"),
        ({"seconds": 11.0}, "took 11 s, more than 10"),
        ({"code": 0}, "exit code 0"),
        ({"told": False}, "the first error is not seen"),
        ({"ranks": False}, "a rank does not say why it ends"),
        ({"tracebacks": 3}, "3 tracebacks"),
        ({"left": ("process 7",)}, "left: process 7"),
    ],
)
def test_a_miss_is_named(changed: dict[str, object], miss: str) -> None:
    assert ENDED.misses == []
    assert replace(ENDED, **changed).misses == [miss]  # type: ignore[arg-type]


def test_who_must_be_killed_is_given_the_time() -> None:
    hangs = replace(ENDED, case=replace(CASE, fault="hang"), seconds=29.0, tracebacks=2)
    assert hangs.misses == []
    assert replace(hangs, seconds=31.0).misses == ["took 31 s, more than 30"]


@pytest.mark.parametrize(
    ("fault", "output"),
    [
        ("raise", FIRST),
        ("hang", "Rank 1 (stage 1) waited 0:00:10 for a message (state) from Rank 0 (stage 2)."),
        ("kill", "Rank 1 (stage 1) ends: Rank 0 (stage 2) is gone: its process ended"),
        ("sigterm", "SIGTERM came to rank 0, which stops."),
        ("sigint", "Rank 0 (stage 2) was interrupted by Ctrl-C in set-up"),
        ("full disk", "Rank 0 (stage 2) failed while saving a checkpoint, with OSError: 'x' could not be written"),
    ],
)
def test_the_first_error_must_name_the_rank(fault: str, output: str) -> None:
    case = replace(CASE, fault=fault)
    assert told(case, output)
    assert not told(replace(case, stage=1), output)
    assert not told(case, "Connection closed by peer")


def test_processes_are_found_by_what_they_have_inherited() -> None:
    with subprocess.Popen(["sleep", "600"], env={**os.environ, VARIABLE: "this one"}) as process:
        assert processes("this one") == [process.pid]
        assert processes("another") == []
        process.kill()


def test_torchrun_is_given_a_port_of_its_own() -> None:
    assert "1234" in command(replace(CASE, launcher="torchrun"), 1234)
    assert command(CASE, 1234)[1:] == ["-m", "recipes.faults.program"]


def test_the_summary_counts_by_fault(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=140).print(summary([ENDED, replace(ENDED, code=0)]))
    printed = capsys.readouterr().out
    assert "2 cases" in printed
    assert [cell.strip() for cell in printed.split("raises an exception")[1].split("│")[1:7]] == [
        "2",
        "2",
        "3.0 s",
        "2",
        "2",
        "1",
    ]


def test_a_process_that_grows_is_seen() -> None:
    flat = [(batch, 100.0, 4.0, 30.0) for batch in range(20)]
    assert not soak.grows(flat)
    for grown in ((19, 105.0, 4.0, 30.0), (19, 100.0, 5.0, 30.0), (19, 100.0, 4.0, 31.0)):
        assert soak.grows([*flat[:-1], grown])


@pytest.mark.slow
def test_a_soak_is_flat(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--soak", "2000"]) == 0
    assert capsys.readouterr().out.strip().endswith("flat")


#: Of ``--seed 7``: each fault, each launcher but the slowest to start, before, in and after the training.
SLICE = (4, 16, 17, 24, 46)
MORE = (3, 18, 25, 57, 60, 74, 82)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, Future[Outcome]]]:
    """All cases that tests ask for, two side by side, as those that wait need no processor."""
    folder: Path = tmp_path_factory.mktemp("faults")
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        asked = {item.callspec.params.get("number") for item in request.session.items if hasattr(item, "callspec")}
        chosen = [case for case in draw(7, max(SLICE + MORE)) if case.number in asked]
        yield {case.number: pool.submit(run, case, folder / str(case.number)) for case in chosen}


@pytest.mark.parametrize("number", [*SLICE, *(pytest.param(number, marks=pytest.mark.slow) for number in MORE)])
def test_a_fault_ends_all_processes_with_the_first_error(number: int, outcomes: dict[int, Future[Outcome]]) -> None:
    outcome = outcomes[number].result()
    assert outcome.seconds is not None, f"{outcome.case} did not end:\n{outcome.output}"
    # How long it takes is the campaign's business: this machine may be busy.
    assert not replace(outcome, seconds=0.0).misses, f"{outcome.case}:\n{outcome.output}"
