"""Tests of the schedule benchmark live here: that it runs, counts and reports right; never how fast this machine is."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recipes.benchmarks import schedule
from recipes.benchmarks.schedule import Contender, Settings

PAPER = Settings(stages=4, batches=60, rounds=3, forward_ms=20, backward_ms=40, microbatches=(1, 2, 4, 8))
WAIT_FOR_EVER = "import threading; threading.Event().wait()"


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="the pipeline schedules of torch 2.6 cannot run it")
def test_the_whole_benchmark_reports_every_contender(tmp_path: Path) -> None:
    report = tmp_path / "schedule.json"
    options = ["--stages", "2", "--forward-ms", "5", "--backward-ms", "10", "--microbatches", "1", "2"]
    output = ["--json", str(report), "--markdown"]
    ended = subprocess.run(
        [sys.executable, "-m", "recipes.benchmarks.schedule", "--quick", *options, *output],
        cwd=schedule.ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr

    written = json.loads(report.read_text())
    assert {"cores", "cpu", "python", "torch", "lightning", "date"} <= written["machine"].keys()
    (result,) = written["results"]
    measured = [(contender["schedule"], contender["microbatches"]) for contender in result["contenders"]]
    assert measured == [("ddg", 1), ("gpipe", 1), ("gpipe", 2), ("1f1b", 2)]
    for contender in result["contenders"]:
        assert len(contender["rounds"]["period_ms"]) == result["settings"]["rounds"] == 1
        assert 0 < contender["period_ms"]["min"] == contender["period_ms"]["median"] == contender["period_ms"]["max"]
    assert "| 2 | torch GPipe, m = " in ended.stdout


def test_steady_state_leaves_out_the_first_2k_batches_and_the_last() -> None:
    fill, steady, last = [0.0, 5.0, 5.1, 5.2], [10.0, 10.1, 10.2, 10.6], [99.0]
    mean, median = schedule.steady_state_ms([*fill, *steady, *last], stages=2)
    assert mean == pytest.approx(200)
    assert median == pytest.approx(100)


def test_a_flushing_schedule_in_theory() -> None:
    one_microbatch = Contender("gpipe", 1).expected_ms(PAPER)
    assert one_microbatch == schedule.references_ms(PAPER)["backprop"] == 240
    assert Contender("1f1b", 8).expected_ms(PAPER) == 60 + 3 * 60 / 8
    assert Contender("ddg").expected_ms(PAPER) == schedule.references_ms(PAPER)["ideal"] == 60
    assert schedule.references_ms(PAPER)["paper"] == 120


def test_1f1b_is_measured_only_where_torch_allows_it() -> None:
    assert [c.microbatches for c in schedule.contenders(PAPER) if c.schedule == "1f1b"] == [4, 8]


def test_the_table_shows_the_best_count_of_microbatches_and_the_ratios() -> None:
    settings = Settings(stages=2, batches=10, rounds=3, forward_ms=20, backward_ms=40, microbatches=(1, 2))
    # Seconds per batch: ddg, gpipe with 1 and 2 micro-batches, 1f1b with 2; the second round is a disturbed one.
    rounds = [[0.064, 0.12, 0.1, 0.08], [0.1, 0.3, 0.2, 0.3], [0.063, 0.12, 0.08, 0.09]]
    times = [[[period * batch for batch in range(10)] for period in periods] for periods in rounds]
    rows = schedule.table_rows(schedule.summarize(settings, times))
    assert rows == [
        ("2", "ideal: F+B", "60.0", "", "", "+0.0%", "2.00", "1.07"),
        ("2", "backprop: (F+B)K", "120.0", "", "", "+100.0%", "1.00", "0.53"),
        ("2", "paper: FK+B", "80.0", "", "", "+33.3%", "1.50", "0.80"),
        ("2", "ddg", "60.0", "64.0", "63.0-100.0", "+6.7%", "1.88", "1.00"),
        ("2", "torch GPipe, m = 2", "90.0", "100.0", "80.0-200.0", "+66.7%", "1.20", "0.64"),
        ("2", "torch 1F1B, m = 2", "90.0", "90.0", "80.0-300.0", "+50.0%", "1.33", "0.71"),
    ]


def test_a_microbatch_sleeps_its_share_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    layer = schedule.SleepingLayer(PAPER)
    for samples in (PAPER.batch_size, PAPER.batch_size // 8):
        layer(torch.randn(samples, schedule.WIDTH)).sum().backward()
    assert slept == pytest.approx([0.02, 0.04, 0.02 / 8, 0.04 / 8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "2", "1"], "--stages 1: there is no schedule on one stage; give 2 or more"),
        (["--rounds", "0"], "--rounds 0: nothing would be measured; give 1 or more"),
        (["--forward-ms", "0"], "--forward-ms 0 --backward-ms 40: both must be above 0"),
        (["--backward-ms", "-1"], "--forward-ms 20 --backward-ms -1: both must be above 0"),
        (["--microbatches", "0", "8"], "--microbatches 0: a batch has 1 micro-batch or more"),
        (["--microbatches", "1", "4"], "--microbatches 4: torch's Schedule1F1B needs at least as many micro-batches"),
        (["--batches", "10"], "--batches 10: the first 2K = 8 and the last are not timed"),
    ],
)
def test_a_value_that_cannot_be_measured_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        schedule.parse(["--stages", "4", "8", *options])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_failing_worker_ends_the_others_and_its_output_is_shown() -> None:
    program = f"import os\nif os.environ['RANK'] == '1': raise ArithmeticError('boom')\n{WAIT_FOR_EVER}"
    with pytest.raises(RuntimeError, match=r"(?s)Worker 1 of 3 ended with exit code 1; .*ArithmeticError: boom"):
        schedule.run_workers([sys.executable, "-c", program], world_size=3, limit_s=250)


def test_hanging_workers_are_stopped_at_the_limit() -> None:
    with pytest.raises(RuntimeError, match=r"Worker [01] of 2 did not end within 1 s"):
        schedule.run_workers([sys.executable, "-c", WAIT_FOR_EVER], world_size=2, limit_s=1)
