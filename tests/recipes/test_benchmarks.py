"""Tests of the benchmark suite live here: contenders train right, failures are kept, reports add up; never how fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

from recipes.benchmarks import __main__ as command
from recipes.benchmarks import cost, machine, report, rounds
from recipes.benchmarks.__main__ import chosen, main, parse
from recipes.benchmarks.contenders import KINDS, Job, Outcome, run
from recipes.benchmarks.parts import ON_CPU, ON_DEVICES, Plan, run_work
from recipes.benchmarks.pictures import draw
from recipes.benchmarks.workers import Crew, WorkerError, Workers
from recipes.benchmarks.works import WORKS, Cuts, Work, make, measure_cuts, random_values, sgd
from tests import reference

ROOT = Path(__file__).parents[2]
TIMED = 3
POINTS = {2: ["network.4"], 4: ["network.2", "network.4", "network.6"]}


def small_network() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(8, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 10))


class Skipping(nn.Module):
    """Two tensors and a size cross a cut before any layer with an odd number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, _ = x.shape
        for i in range(0, 8, 2):
            x = torch.relu(self.layers[i + 1](torch.relu(self.layers[i](x))) + x)
        return self.head(x.view(samples, 8))


SMALL = Work("small", small_network, partial(random_values, 8, 8), cross_entropy)
SKIPPING = Work("skipping", Skipping, partial(random_values, 8, 8), cross_entropy)
ODD_LAYERS = {2: ["network.layers.3"], 4: [f"network.layers.{layer}" for layer in (1, 3, 5)]}


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(2) as two:
        yield two


def trained(
    crew: Crew, name: str, microbatches: int = 1, work: Work = SMALL, cuts: Cuts = POINTS
) -> dict[str, np.ndarray[Any, Any]]:
    job = Job(work, cuts, TIMED, microbatches, keep_weights=True)
    outcomes: list[Outcome | None] = crew.ask(60, run, name, job)
    weights: dict[str, np.ndarray[Any, Any]] = {}
    for outcome in outcomes:
        if outcome is not None:
            assert min(outcome.period_s, outcome.median_s, outcome.cpu_s) > 0
            weights |= outcome.weights
    return weights


def same(weights: dict[str, np.ndarray[Any, Any]], module: nn.Module, tolerance: float) -> None:
    expected = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=tolerance, err_msg=name)


WITHOUT_SCHEDULES = ("backprop", "ddp", "trainer")
SCHEDULES = [name for name in KINDS if name not in WITHOUT_SCHEDULES and not name.startswith("ddg")]
NOT_BY_OLD_TORCH = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="the pipeline schedules of torch 2.6 cannot run it"
)


@pytest.mark.parametrize(
    "name", [*WITHOUT_SCHEDULES, *(pytest.param(name, marks=NOT_BY_OLD_TORCH) for name in SCHEDULES)]
)
@pytest.mark.parametrize(("work", "cuts"), [(SMALL, POINTS), (SKIPPING, ODD_LAYERS)], ids=["chain", "skips"])
def test_a_synchronous_contender_trains_as_backprop_does(crew: Crew, name: str, work: Work, cuts: Cuts) -> None:
    training, (inputs, targets) = make(work)
    before = [parameter.detach().clone() for parameter in training.parameters()]
    optimizer = sgd(training)
    for _ in range(2 + TIMED):
        optimizer.zero_grad()
        cross_entropy(training.network(inputs), targets).backward()
        optimizer.step()
    moved = max((now - then).abs().max().item() for now, then in zip(training.parameters(), before, strict=True))
    assert moved > 1e-3, "or the comparison would be of untrained weights"
    # Sums of micro-batches, or of two processes, are rounded otherwise than the whole.
    same(trained(crew, name, 4 if KINDS[name].family else 1, work, cuts), training, tolerance=1e-6)


def test_ddg_trains_as_the_reference_does_with_and_without_the_trainer(crew: Crew) -> None:
    for names, batches in ((("ddg", "ddg-bare"), 4 + TIMED + 1), (("ddg-one-process",), 2 + TIMED)):
        training, batch = make(SMALL)
        stages = reference.flat_stages(training.network, [4])
        optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
        reference.train(training.network, stages, [[batch] * batches], optimizer, None, "epoch")
        for name in names:
            same(trained(crew, name), training, tolerance=0)


def test_the_cut_is_the_packages_own(crew: Crew) -> None:
    found = crew.ask(60, measure_cuts, SMALL, (2, 4, 9), 1)[0]
    assert found["cuts"][9] == [f"network.{layer}" for layer in range(1, 9)]
    assert [len(points) for points in found["cuts"].values()] == [1, 3, 8]
    assert all(sum(shares) == pytest.approx(1) for shares in found["shares"].values())
    assert found["crossing"][2] == [8 * 8 * 4]
    assert found["parameters"] == 4 * 72 + 90
    assert found["batch"] == [8, 8]


@pytest.mark.parametrize("name", WORKS)
def test_a_works_loss_fits_its_network(name: str) -> None:
    work = WORKS[name]
    inputs, targets = work.batch()
    with torch.no_grad():
        loss = work.loss(work.network()(inputs[:8]), targets[:8])
    assert loss.shape == ()
    assert loss.isfinite()
    assert len(inputs) % 8 == 0, "or it could not be cut into 8 micro-batches"


def test_a_contender_that_fails_is_kept_with_its_error_and_the_rest_goes_on() -> None:
    odd = Work("odd", small_network, partial(random_values, 7, 8), cross_entropy)
    said: list[str] = []
    with Crew(2) as crew:
        found = run_work(odd, ["ddp", "ddg-bare", "gpipe"], Plan(2, 2, 2, 1), crew, "cpu", said.append, (4, 7))
    by_name = {(record["name"], record["microbatches"]): record for record in found["contenders"]}
    assert "A batch of 7 samples cannot be shared evenly by 2 processes" in by_name["ddp", 1]["error"]
    assert by_name["ddp", 1]["rounds"] == []
    assert [len(by_name[key]["rounds"]) for key in (("ddg-bare", 1), ("gpipe", 7))] == [2, 2]
    assert any("round 2" in text for text in said)
    (line,) = [line for line in report.failures(found["contenders"]) if line.startswith("DDP")]
    assert "cannot be shared evenly" in line


def test_the_cost_is_measured_beside_the_same_stages_alone(crew: Crew) -> None:
    network, batch = partial(cost.many_tensors, 4), partial(random_values, 4, 8)
    found = cost.added(crew, network, batch, "network.2", rounds=1)
    assert {"own_s", "bare_s", "trainer_s", "own_cpu_s", "bare_cpu_s", "trainer_cpu_s"} == found.keys()
    assert min(found["own_s"], found["own_cpu_s"]) > 0
    assert all(found["own_s"] + found[key] > 0 for key in ("bare_s", "trainer_s"))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")
def test_memory_is_what_the_theory_says(crew: Crew) -> None:
    width = 512
    work = Work("", partial(cost.equal_blocks, 2, 4, width), partial(random_values, width, 16), cross_entropy)
    last, first = crew.ask(60, cost.fullest, Job(work, {2: ["network.8"]}, timed=4))
    weights, activations = width * 4 * (16 + 3 * width + 4), 4 * width * width * 4
    assert (first["stage"], first["in_flight"], last["stage"], last["in_flight"]) == (1, 2, 2, 1)
    assert first["theory_bytes"] == pytest.approx(2 * (activations + weights) + weights, rel=0.02)
    for row in (first, last):
        assert row["message_bytes"] == 4 * width * width
        assert row["theory_bytes"] <= row["planned_bytes"]
        assert 0.7 * row["theory_bytes"] < row["measured_bytes"] < 1.3 * row["planned_bytes"]


# ---- processes


def _fail_as_rank_one() -> None:
    if os.environ["LOCAL_RANK"] == "1":
        raise ArithmeticError("boom")
    signal.pause()


def _end_as_rank_one() -> None:
    if os.environ["LOCAL_RANK"] == "1":
        os.write(2, b"last words\n")
        os._exit(7)
    signal.pause()


def test_a_failing_worker_ends_the_others_and_its_error_is_shown() -> None:
    workers = Workers(3)
    processes = list(workers._processes)
    with pytest.raises(WorkerError, match=r"(?s)Worker 1 of 3 failed; .*ArithmeticError: boom"):
        workers.ask(60, _fail_as_rank_one)
    assert not workers.alive
    assert not any(process.is_alive() for process in processes)


def test_a_worker_that_ends_is_noticed_and_its_output_is_shown() -> None:
    with (
        Workers(2) as workers,
        pytest.raises(WorkerError, match=r"(?s)Worker 1 of 2 ended with exit code 7.*last words"),
    ):
        workers.ask(60, _end_as_rank_one)


def test_hanging_workers_are_stopped_at_the_limit() -> None:
    workers = Workers(2)
    with pytest.raises(WorkerError, match=r"Worker 0 of 2 did not answer within 0.5 s"):
        workers.ask(0.5, signal.pause)
    assert not workers.alive


def test_a_crew_goes_on_with_new_processes_after_a_failure() -> None:
    with Crew(2) as crew:
        first = crew.ask(60, os.getpid)
        with pytest.raises(WorkerError):
            crew.ask(60, _fail_as_rank_one)
        assert not set(first) & set(crew.ask(60, os.getpid))


def test_a_set_of_no_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size=0: there is nothing to run without processes; give 1 or more"):
        Workers(0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="how a process ended is read from Linux's /proc")
def test_no_process_outlives_the_one_that_started_it() -> None:
    program = """
import os, signal
from recipes.benchmarks.workers import Workers
workers = Workers(2)
print(*workers.ask(60, os.getpid), flush=True)
for connection in workers._connections:
    connection.send((signal.pause, ()))
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    pids = [int(word) for word in ended.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, f"one of {pids} still runs"
        os.sched_yield()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # What nobody waits for any more has ended all the same.
    return " Z " not in Path(f"/proc/{pid}/stat").read_text()


# ---- what the figures say


def record(name: str, *periods: float, microbatches: int = 1, error: str | None = None) -> dict[str, Any]:
    kind = KINDS[name]
    figures = [{"period_s": p, "median_s": p, "cpu_s": [0.3 * p, 0.2 * p], "others": 0.0} for p in periods]
    named = {"name": name, "label": kind.label, "family": kind.family, "microbatches": microbatches}
    return {**named, "trial": None, "rounds": figures, "chosen": True, "error": error, "theory_ms": None}


MADE_UP = {
    "machine": {},
    "works": [
        {
            "name": "A work",
            "processes": 2,
            "shares": {"2": [0.5, 0.5]},
            "error": None,
            "contenders": [
                record("backprop", 1.0, 3.0, 1.2),
                record("gpipe", 0.8, 2.4, 0.9, microbatches=8),
                record("1f1b", 0.9, 2.0, 0.9, microbatches=4),
                record("zbv", microbatches=2, error="Worker 0 failed\nNotImplementedError: no such backend"),
                record("ddg", 0.5, 1.6, 0.5),
            ],
        }
    ],
    "devices": [],
    "cost": {
        "tensors": [
            {
                "tensors": n,
                **{f"{who}{what}": n * 1e-5 for who in ("own", "bare", "trainer") for what in ("_s", "_cpu_s")},
            }
            for n in (2, 16)
        ],
        "messages": [],
        "memory": [
            {
                "layers": 4,
                "stage": k,
                "in_flight": 3 - k,
                "theory_bytes": 2e6,
                "planned_bytes": 3e6,
                "measured_bytes": 2.2e6,
                "message_bytes": 1e5,
                "ratio": 1.1,
            }
            for k in (1, 2)
        ],
        "flat": [],
        "errors": [],
    },
}


def test_ratios_are_medians_of_the_ratios_within_rounds() -> None:
    rows = report.work_rows(MADE_UP["works"][0])  # type: ignore[index]
    assert rows == [
        ("backprop, one process", "", "1200.0", "1000.0-3000.0", "1.00", "0.80", "500.0"),
        ("torch GPipe", "8", "900.0", "800.0-2400.0", "1.25", "1.00", "400.0"),
        ("torch 1F1B", "4", "900.0", "900.0-2000.0", "1.33", "1.00", "450.0"),
        ("DDG through the Trainer", "", "500.0", "500.0-1600.0", "2.00", "1.60", "250.0"),
    ]


def test_the_report_tells_who_failed_and_the_charts_are_drawn(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.tables(MADE_UP))
    text = console.export_text()
    assert "torch zero bubble V, m = 2: failed: NotImplementedError: no such backend" in text
    assert "A work, 2 processes, stages 50%, 50% of the time" in text
    drawn = draw(MADE_UP, tmp_path / "pictures")
    assert [path.name for path in drawn] == ["work-a-work.png", "cost-tensors.png", "cost-memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_only_the_best_of_a_family_goes_on_from_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int, int]] = []
    speeds = {("gpipe", 2): 0.9, ("gpipe", 4): None, ("gpipe", 8): 0.7}

    def measure(crew: Crew, record: dict[str, Any], job: Job) -> dict[str, Any] | None:
        taken.append((record["name"], record["microbatches"], job.timed))
        period = speeds.get((record["name"], record["microbatches"]), 0.5)
        if period is None:
            record["error"] = "no"
        return period and {"period_s": period}

    monkeypatch.setattr(rounds, "measure", measure)
    records = rounds.entries(["backprop", "gpipe"], (2, 4, 8), processes=2)
    rounds.compete(None, records, lambda record: Job(SMALL, {}, timed=6), 2, lambda text: None)  # type: ignore[arg-type]
    trial = [("gpipe", 2, 2), ("gpipe", 4, 2), ("gpipe", 8, 2)]
    assert taken == [*trial, *[("backprop", 1, 6), ("gpipe", 8, 6)] * 2]


def test_a_busy_machine_is_named() -> None:
    quiet = {"load": 0.1, "scatter": 0.01}
    assert machine.warnings(quiet, [0.0, 0.1]) == []
    busy = machine.warnings({"load": 1.5, "scatter": 0.2}, [0.0, 0.4, 0.7])
    assert [text.split(":")[0] for text in busy] == [
        "The load was 1.50 before anything was measured",
        "The same piece of work took 20% longer in the median than at best",
        "In 2 of 3 measurements others kept more than 0.15 cores busy, up to 0.70",
    ]


def test_only_leaves_what_is_named() -> None:
    on_gpus = parse([])
    on_gpus.accelerator, on_gpus.processes = "cuda", 1 + torch.cuda.device_count()
    assert set(chosen(on_gpus)["contenders"]) == {"backprop", "ddp", "trainer", "ddg-one-process", "ddg", "ddg-bare"}
    on_gpus.processes = torch.cuda.device_count()
    assert chosen(on_gpus)["contenders"] == list(KINDS)
    everything = chosen(parse([]))
    assert everything["parts"] == ["work", "devices", "cost"]
    assert everything["works"] == list(WORKS)
    assert "ddg-one-process" not in everything["contenders"]
    some = chosen(parse(["--only", "mlp", "ddg", "naive"]))
    assert (some["parts"], some["works"], some["contenders"]) == (["work"], ["mlp"], ["ddg", "naive"])
    assert chosen(parse(["--only", "devices", "ddg"]))["devices"] == ["ddg"]
    assert chosen(parse(["--only", "cost"]))["parts"] == ["cost"]


@pytest.mark.parametrize(
    ("only", "parts", "works", "contenders", "devices"),
    [
        (["work"], ["work"], list(WORKS), ON_CPU, ON_DEVICES),
        (["devices"], ["devices"], list(WORKS), ON_CPU, ON_DEVICES),
        (["cost", "devices"], ["devices", "cost"], list(WORKS), ON_CPU, ON_DEVICES),
        (["resnet56"], ["work"], ["resnet56"], ON_CPU, ON_DEVICES),
        (["resnet56", "work"], ["work"], ["resnet56"], ON_CPU, ON_DEVICES),
        (["resnet56", "devices"], ["work", "devices"], ["resnet56"], ON_CPU, ON_DEVICES),
        (["cost", "mlp", "gpt"], ["work", "cost"], ["mlp", "gpt"], ON_CPU, ON_DEVICES),
        (["mlp", "mlp"], ["work"], ["mlp"], ON_CPU, ON_DEVICES),
        # A contender alone: the parts that know it.
        (["ddg"], ["work", "devices"], list(WORKS), ["ddg"], ["ddg"]),
        (["naive"], ["work"], list(WORKS), ["naive"], ON_DEVICES),
        (["naive", "ddg"], ["work", "devices"], list(WORKS), ["naive", "ddg"], ["ddg"]),
        # A contender beside parts: it restricts those that know it, and the others stay whole.
        (["devices", "ddg", "gpipe"], ["devices"], list(WORKS), ["ddg", "gpipe"], ["gpipe", "ddg"]),
        (["cost", "work", "ddp"], ["work", "cost"], list(WORKS), ["ddp"], ON_DEVICES),
        (["work", "devices", "ddp"], ["work", "devices"], list(WORKS), ["ddp"], ON_DEVICES),
        # All three; and what is left out at first runs where it is named.
        (["lstm", "devices", "ddg", "ddp"], ["work", "devices"], ["lstm"], ["ddg", "ddp"], ["ddg"]),
        (["mlp", "ddg-one-process"], ["work"], ["mlp"], ["ddg-one-process"], ON_DEVICES),
    ],
)
def test_only_is_a_union_of_parts_and_works_that_contenders_restrict(
    only: list[str], parts: list[str], works: list[str], contenders: list[str], devices: list[str]
) -> None:
    found = chosen(parse(["--only", *only]))
    assert found["parts"] == parts
    if "work" in parts:
        assert (found["works"], found["contenders"]) == (works, contenders)
    if "devices" in parts:
        assert found["devices"] == devices


def test_only_runs_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(command, "Crew", lambda *_: nullcontext())
    monkeypatch.setattr(command, "run_work", lambda work, contenders, *_: ran.append((work.name, contenders)))
    monkeypatch.setattr(command, "run_devices", lambda stages, times, contenders, *_: ran.append((stages, contenders)))
    monkeypatch.setattr(command, "run_cost", lambda *_: ran.append("cost"))
    options = parse(["--only", "mlp", "devices", "cost", "ddg", "naive", "--stages", "2"])
    results: dict[str, Any] = {"works": [], "devices": [], "cost": None, "machine": {}}
    command.measure(options, results, Console(quiet=True))
    assert ran == [("Wide MLP", ["ddg", "naive"]), (2, ["ddg"]), "cost"]


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (["devices", "ddp"], "--only ddp: devices does not run it here; add work, or leave it out"),
        (["devices", "ddg", "naive"], "--only naive: devices does not run it here; add work, or leave it out"),
        (["cost", "ddg"], "--only ddg: cost does not run it here; add work or devices, or leave it out"),
        (["cost", "devices", "ddp"], "--only ddp: devices, cost does not run it here; add work, or leave it out"),
    ],
)
def test_a_contender_that_no_chosen_part_knows_is_refused(
    only: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--only", *only])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_pipeline_that_shared_gpus_cannot_run_is_refused() -> None:
    options = parse(["--only", "naive"])
    options.accelerator, options.processes = "cuda", 1 + torch.cuda.device_count()
    with pytest.raises(ValueError, match="--only naive: no part runs it here; leave it out"):
        chosen(options)
    options.only = ["mlp", "gpipe"]
    with pytest.raises(ValueError, match="--only gpipe: work does not run it here; add devices, or leave it out"):
        chosen(options)
    options.only = ["gpipe"]
    assert chosen(options)["parts"] == ["devices"]


def test_results_are_written_to_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "results.json"

    def measure(*args: object) -> None:
        assert path.exists(), "before anything is measured"

    monkeypatch.setattr("recipes.benchmarks.__main__.measure", measure)
    main(["--quick", "--json", str(path)])
    assert json.loads(path.read_text())["settings"]["quick"] is True
