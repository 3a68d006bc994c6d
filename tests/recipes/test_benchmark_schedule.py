"""Tests of the benchmark on emulated devices live here: that it runs, counts and reports right."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from recipes.benchmarks import devices
from recipes.benchmarks.__main__ import main, parse
from recipes.benchmarks.contenders import Laps
from recipes.benchmarks.devices import SAMPLES, Times, references_ms, sleeping_batch, theory_ms
from recipes.benchmarks.parts import Plan, run_devices
from recipes.benchmarks.report import device_rows
from recipes.benchmarks.rounds import entries

PAPER = Times(forward_ms=20, backward_ms=40, message_ms=0)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="the pipeline schedules of torch 2.6 cannot run it")
def test_the_whole_benchmark_reports_every_contender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "devices.json"
    only = ["--only", "devices", "ddg", "gpipe", "1f1b"]
    times = ["--forward-ms", "5", "--backward-ms", "10"]
    main(["--quick", "--stages", "2", *only, *times, "--json", str(report), "--pictures", str(tmp_path)])

    written = json.loads(report.read_text())
    assert {"cores", "cpu", "load", "scatter", "python", "torch", "lightning", "date"} <= written["machine"].keys()
    assert written["works"] == []
    assert written["cost"] is None
    (result,) = written["devices"]
    taken = [(record["name"], record["microbatches"]) for record in result["contenders"]]
    assert taken == [*(("gpipe", m) for m in (2, 4, 8)), *(("1f1b", m) for m in (2, 4, 8)), ("ddg", 1)]
    for family in ("gpipe", "1f1b"):
        tried = [record for record in result["contenders"] if record["family"] == family]
        assert all(record["trial"]["period_s"] > 0 for record in tried)
        assert [len(record["rounds"]) for record in tried if record["chosen"]] == [1]
    (figures,) = result["contenders"][-1]["rounds"]
    assert figures["period_s"] >= 0.9 * 0.015, "a stage sleeps 15 ms for a batch"
    assert len(figures["cpu_s"]) == 2
    assert min(figures["cpu_s"]) > 0
    assert "torch GPipe" in capsys.readouterr().out
    assert (tmp_path / "devices.png").stat().st_size > 1000


def test_steady_state_leaves_out_the_first_batches_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([0.0, 5.0, 5.1, 5.2, 5.5, 5.6, 5.8, 99.0])
    laps = Laps(warm=4, timed=3, after=1, device=torch.device("cpu"))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ends))
    assert list(laps) == list(range(8))
    outcome = laps.outcome({})
    assert outcome.period_s == pytest.approx(0.2)
    assert outcome.median_s == pytest.approx(0.2)


def test_a_flushing_schedule_in_theory() -> None:
    references = references_ms(4, PAPER)
    assert theory_ms("gpipe", 1, 4, PAPER) == references["backprop"] == 240
    assert theory_ms("1f1b", 8, 4, PAPER) == 60 + 3 * 60 / 8
    assert theory_ms("interleaved", 8, 4, PAPER) == 60 + 3 * 60 / 8 / 2
    assert theory_ms("ddg", 1, 4, PAPER) == references["ideal"] == 60
    assert references["paper"] == 120
    assert theory_ms("zb", 8, 4, PAPER) is None


def test_messages_cost_backprop_all_of_their_time_and_ddg_what_the_package_simulates() -> None:
    late = PAPER._replace(message_ms=10)
    assert references_ms(2, late)["backprop"] == 120 + 20
    assert theory_ms("ddg", 1, 2, late) == pytest.approx(70)
    assert theory_ms("gpipe", 8, 2, late) is None


def test_1f1b_is_measured_only_where_torch_allows_it() -> None:
    assert [record["microbatches"] for record in entries(["1f1b"], (1, 2, 4, 8), processes=4)] == [4, 8]


def test_the_table_shows_the_ratios() -> None:
    def record(name: str, family: str, *periods: float) -> dict[str, object]:
        rounds = [{"period_s": period, "cpu_s": [0.002, 0.001]} for period in periods]
        return {
            "name": name,
            "label": name.upper(),
            "family": family,
            "microbatches": 2,
            "theory_ms": 60.0 if name == "ddg" else None,
            "rounds": rounds,
        }

    contenders = [
        record("ddg", "", 0.064, 0.1, 0.063),
        record("gpipe", "gpipe"),
        record("zb", "zero bubble", 0.1, 0.2, 0.08),
    ]
    rows = device_rows({"stages": 2, "references_ms": references_ms(2, PAPER), "contenders": contenders})
    assert rows == [
        ("2", "ideal: F+B", "", "60.0", "", "", "100.0%", "2.00", ""),
        ("2", "backprop: (F+B)K", "", "120.0", "", "", "50.0%", "1.00", ""),
        ("2", "paper: FK+B", "", "80.0", "", "", "75.0%", "1.50", ""),
        ("2", "DDG", "", "60.0", "64.0", "63.0-100.0", "93.8%", "1.88", "3.0"),
        ("2", "ZB", "2", "", "100.0", "80.0-200.0", "60.0%", "1.20", "3.0"),
    ]


def test_one_device_alone_shows_what_no_pipeline_can_beat() -> None:
    result = run_devices(2, Times(2, 4, 0), ["backprop", "trainer"], Plan(1, 1, 3, 1), lambda text: None)
    alone, trainer = result["contenders"]
    assert [record["label"] for record in (alone, trainer)] == ["one device alone", "one device alone, Trainer"]
    for record in (alone, trainer):
        (figures,) = record["rounds"]
        assert figures["period_s"] >= 0.9 * 0.006
        assert record["theory_ms"] == 6


class Clock:
    """Time that passes only while somebody sleeps, a little longer than asked for."""

    def __init__(self, late: float = 0.0) -> None:
        self.now, self.late, self.slept = 1000.0, late, []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds + self.late


def stopped(monkeypatch: pytest.MonkeyPatch, late: float = 0.0) -> Clock:
    clock = Clock(late)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(devices, "_clock", devices._Clock())
    return clock


def test_a_microbatch_sleeps_its_share_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = stopped(monkeypatch)
    layer = devices.SleepingLayer(PAPER, share=0.5)
    inputs, _ = sleeping_batch()
    for samples in (SAMPLES, SAMPLES // 8):
        layer(inputs[:samples])[:, 2:].sum().backward()
    whole = [0.01, 0.01, 0.01]
    assert clock.slept == pytest.approx([*whole, *(seconds / 8 for seconds in whole)])


def test_sleeping_too_long_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = stopped(monkeypatch, late=0.0001)
    device = devices._Clock()
    for _ in range(100):
        device.begin()
        device.work(0.005)
        device.work(0.005)
    assert clock.now - 1000 == pytest.approx(100 * 0.01, abs=0.0002)


def test_a_device_is_busy_while_the_layer_computes_but_not_while_nobody_gives_it_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = stopped(monkeypatch)
    device = devices._Clock()
    device.begin()
    clock.now += 0.001
    device.work(0.01)
    assert clock.slept == pytest.approx([0.009])
    clock.now += 0.001
    device.begin()
    device.work(0.01)
    clock.now += 1
    device.work(0.01)
    assert clock.slept[1:] == pytest.approx([0.01, 0.01])


def test_a_message_is_awaited_unless_it_comes_from_the_same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = stopped(monkeypatch)
    layer = devices.SleepingLayer(PAPER._replace(message_ms=8), share=1.0)
    inputs, _ = sleeping_batch()
    for sender, waited in ((os.getpid(), []), (os.getpid() + 1, [0.005])):
        clock.slept.clear()
        inputs[:, 0], inputs[:, 1] = clock.now - 0.003, sender
        sent = layer(inputs)
        assert clock.slept == pytest.approx([*waited, 0.02])
        assert sent[0, :2].tolist() == [clock.now, os.getpid()]
    clock.slept.clear()
    gradient = torch.zeros_like(sent)
    gradient[:, 0], gradient[:, 1] = clock.now, os.getpid() + 1
    sent.backward(gradient)
    assert clock.slept == pytest.approx([0.008, 0.02, 0.02]), "the gradient's message, then both halves of the backward"


def test_memory_without_a_stamp_is_not_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = stopped(monkeypatch)
    inputs, _ = sleeping_batch()
    for garbage in (1e300, float("nan"), float("inf"), -1e300):
        inputs[:, :2] = garbage
        clock.slept.clear()
        devices.SleepingLayer(PAPER._replace(message_ms=8), share=1.0)(inputs)
        assert clock.slept == pytest.approx([0.02])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "2", "1"], "--stages 1: there is no schedule on one stage; give 2 or more"),
        (["--stages", "64"], "--stages 64: torch's Schedule1F1B needs as many micro-batches as stages"),
        (["--rounds", "0"], "--rounds 0: nothing would be measured; give 1 or more"),
        (["--processes", "1"], "--processes 1: there is no pipeline in one process; give 2 or more"),
        (["--forward-ms", "0"], "--forward-ms 0 --backward-ms 40: both must be above 0"),
        (["--backward-ms", "-1"], "--forward-ms 20 --backward-ms -1: both must be above 0"),
        (["--message-ms", "-2"], "--message-ms -2: a message cannot arrive before it is sent; give 0 or more"),
        (["--only", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_a_value_that_cannot_be_measured_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(options)
    assert message in " ".join(capsys.readouterr().err.split())


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse(["--accelerator", "cuda"])
    assert "--accelerator cuda: torch finds no GPU here" in capsys.readouterr().err
