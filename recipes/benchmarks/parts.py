"""The parts of the suite live here: what is run for the works and for the emulated devices, and what is kept of it.

The third part, what the package costs in each iteration, is in ``cost.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recipes.benchmarks.contenders import KINDS, Job
from recipes.benchmarks.devices import SAMPLES, Times, emulated, references_ms, theory_ms
from recipes.benchmarks.rounds import LIMIT_S, Record, Say, compete, entries
from recipes.benchmarks.workers import Crew, WorkerError
from recipes.benchmarks.works import Work, measure_cuts

MICROBATCHES = (2, 4, 8)

# In one process there is only one device: how far that falls short of F + B is nobody's schedule.
_ALONE = {"backprop": "one device alone", "trainer": "one device alone, Trainer"}

#: Who competes where: the one-process execution is a question of GPUs.
ON_CPU = [name for name in KINDS if name not in ("trainer", "ddg-one-process")]
ON_DEVICES = ["backprop", "trainer", "gpipe", "1f1b", "interleaved", "zb", "zbv", "ddg", "ddg-bare"]


def on_cuda(shared: bool) -> list[str]:
    """Who trains the works on GPUs.

    Args:
        shared: Whether processes share them. NCCL does not connect such, and gloo, which then does, sends nothing from
            a GPU by itself: torch's pipelines cannot take part.
    """
    return [name for name, kind in KINDS.items() if not (shared and (kind.family or name == "naive"))]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: Rounds of each part.
        timed: Batches timed in a round, of a work.
        timed_devices: The same on emulated devices.
        repeats: How often each layer is measured before a work is cut.
    """

    rounds: int
    timed: int
    timed_devices: int
    repeats: int


def backend_for(accelerator: str, processes: int) -> str:
    """The backend that connects processes: NCCL where each has a GPU of its own."""
    if accelerator == "cuda" and torch.cuda.device_count() >= processes:
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def run_work(
    work: Work, names: Sequence[str], plan: Plan, crew: Crew, accelerator: str, say: Say, counts: Sequence[int]
) -> dict[str, Any]:
    """Cuts a work and lets the contenders train it.

    Args:
        work: What is trained.
        names: Who takes part.
        plan: How much is measured.
        crew: Who runs it.
        accelerator: ``"cpu"`` or ``"cuda"``.
        say: Told what is going on.
        counts: The numbers of micro-batches to try.
    """
    say(f"{work.name}: measuring its layers")
    report: dict[str, Any] = {"name": work.name, "processes": crew.size, "contenders": [], "error": None}
    numbers = sorted({KINDS[name].chunks * crew.size for name in names} | {crew.size})
    try:
        found = crew.ask(LIMIT_S, measure_cuts, work, numbers, plan.repeats)[0]
    except WorkerError as error:
        return {**report, "error": str(error)}
    report.update(found)
    records = report["contenders"] = entries(names, counts, crew.size)
    job = Job(work, found["cuts"], plan.timed, accelerator=accelerator)
    compete(crew, records, lambda record: job, plan.rounds, lambda text: say(f"{work.name}: {text}"))
    return report


def run_devices(stages: int, times: Times, names: Sequence[str], plan: Plan, say: Say) -> dict[str, Any]:
    """Lets the contenders drive K emulated devices.

    Args:
        stages: K, one process each.
        times: What a device takes for a batch.
        names: Who takes part.
        plan: How much is measured.
        say: Told what is going on.
    """
    counts = [count for count in (stages, 2 * stages, 4 * stages) if count <= SAMPLES]
    records = entries(names, counts, stages)
    jobs = {}
    for chunks in {KINDS[name].chunks for name in names}:
        points = [f"network.{layer}" for layer in range(1, chunks * stages)]
        jobs[chunks] = Job(emulated(stages, times, chunks), {chunks * stages: points}, plan.timed_devices)

    alone = Job(emulated(1, times, 1), {}, plan.timed_devices)

    def job(record: Record) -> Job:
        return alone if record["name"] in _ALONE else jobs[KINDS[record["name"]].chunks]

    for record in records:
        record["label"] = _ALONE.get(record["name"], record["label"])
        record["theory_ms"] = theory_ms(record["name"], record["microbatches"], stages, times)
    with Crew(stages) as crew:
        compete(crew, records, job, plan.rounds, lambda text: say(f"{stages} emulated devices: {text}"))
    return {
        "stages": stages,
        "times": times._asdict(),
        "references_ms": references_ms(stages, times),
        "contenders": records,
    }
