"""What the package costs in each iteration is measured here: microseconds beside a stage's own compute, and memory.

Two equal stages in two processes compute next to nothing, once alone, once in the bare loop and once in the Trainer;
what a batch takes longer is what is added. Memory is what a process holds when it is fullest, beside the theory.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_ddg.core.schedule import delay, stage_of_rank
from lightning_ddg.network.cut import CostModel
from lightning_ddg.network.profile import measure_profile
from recipes.benchmarks.contenders import KINDS, Job, Laps, own_stage, run
from recipes.benchmarks.workers import Crew, WorkerError
from recipes.benchmarks.works import Batch, Work, make, network_of, random_values, segments, sgd

TENSORS = (2, 16, 64, 256, 1024)
MESSAGE_BYTES = (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
MEMORY_STAGES = 4
MEMORY_LAYERS = (4, 16)
FLAT_ITERATIONS = (500, 1000, 2000, 5000)

_LIMIT_S = 300.0
_SAMPLES = 64


# What is trained


class Affine(nn.Module):
    """Scales and shifts every feature: two parameter tensors and next to no compute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def many_tensors(count: int) -> nn.Module:
    """Two stages of this many parameter tensors each."""
    return nn.Sequential(*(Affine(8) for _ in range(count)))


class Widen(nn.Module):
    """Makes wide rows of narrow ones: (samples, 1) to (samples, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def large_message(size: int) -> nn.Module:
    """Two stages with a message of this many bytes between them."""
    width = size // (4 * _SAMPLES)
    return nn.Sequential(Widen(width), Affine(width))


def mean_loss(output: Tensor, targets: Tensor) -> Tensor:
    """The mean of the output, whatever the targets."""
    return output.mean()


def equal_blocks(stages: int, layers: int, width: int) -> nn.Module:
    """Stages of as many linear layers each, whose activations and weights are about equally large for `width` samples.

    A message is as large as the activations of one layer.
    """
    modules: list[nn.Module] = []
    for number in range(layers * stages):
        modules += [nn.Linear(width if number else 16, width if number + 1 < layers * stages else 10), nn.Tanh()]
    return nn.Sequential(*modules)


# ---- time


def own_compute(job: Job, iterations: int) -> tuple[float, float]:
    """What this process's stage takes by itself: forward, backward and the optimizer's step.

    Returns:
        Seconds of an iteration in the median, and processor seconds in the mean.
    """
    torch.set_num_threads(1)
    size = dist.get_world_size()
    number = stage_of_rank(dist.get_rank(), size)
    module, (given, targets) = own_stage(job, number)
    for before in range(1, number):
        given = own_stage(job, before)[0](given).detach()
    given.requires_grad_(number > 1)
    optimizer = sgd(module)
    gradient = None
    dist.barrier()
    laps, spent = [], []
    for _ in range(iterations):
        start, started = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        given.grad = None
        output = module(given)
        if number == size:
            job.work.loss(output, targets).backward()
        else:
            gradient = torch.ones_like(output) if gradient is None else gradient
            output.backward(gradient)
        optimizer.step()
        laps.append(time.perf_counter() - start)
        spent.append(time.process_time() - started)
    return median(laps[iterations // 5 :]), mean(spent[iterations // 5 :])


def added(crew: Crew, network: Callable[[], nn.Module], batch: Callable[[], Batch], split: str, rounds: int) -> Any:
    """Measures two stages alone, in the bare loop and in the Trainer.

    Returns:
        ``own_s`` of the slower stage, and what the other two add to it in ``bare_s`` and ``trainer_s``, in seconds an
        iteration; the same in processor seconds of the first stage's process as ``own_cpu_s`` and so on: what others
        do on the machine, and waiting for messages, is not in it.
    """
    job = Job(Work("", network, batch, mean_loss), {2: [split]}, timed=60)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        alone = crew.ask(_LIMIT_S, own_compute, job, 60)
        figures = {"own_s": max(seconds for seconds, _ in alone), "own_cpu_s": alone[-1][1]}
        for key, name in (("bare", "ddg-bare"), ("trainer", "ddg")):
            outcomes = crew.ask(_LIMIT_S, run, name, job)
            figures[f"{key}_s"] = outcomes[0].median_s - figures["own_s"]
            figures[f"{key}_cpu_s"] = outcomes[-1].cpu_s - figures["own_cpu_s"]
        for key, value in figures.items():
            found.setdefault(key, []).append(value)
    return {key: median(values) for key, values in found.items()}


# ---- memory


def resident_bytes() -> int:
    """Bytes of memory that this process holds, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _give_back_freed_memory() -> None:
    """Makes the C library map every larger tensor by itself, so that what is freed is not held any longer."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD of glibc's malloc.h


def fullest(job: Job) -> dict[str, float]:
    """What this process's stage holds at its fullest, just after a forward, beside the theory.

    Returns:
        ``stage``; ``in_flight``, the batches d + 1; ``measured_bytes``; ``theory_bytes``, (d + 1) activations and
        weights and the optimizer's state; ``planned_bytes``, what a plan of the package says, which also counts the
        gradients, the module's own weights beside those stashed, and messages that wait for their turn;
        ``message_bytes``, the larger of the messages to either neighbour.
    """
    _give_back_freed_memory()
    size = dist.get_world_size()
    number = stage_of_rank(dist.get_rank(), size)
    training, (inputs, _) = make(job.work)
    network = network_of(training, job.work)
    profile = measure_profile(network.chain, (inputs,), {}, repeats=1)
    names = list(network.chain.names)
    starts = [names.index(name) for name in job.cuts[size]]
    begin, end = [0, *starts, len(names)][number - 1 : number + 1]
    late = delay(number, size)
    weights = sum(profile.parameters[begin:end])
    kept = sum(profile.activations[begin:end]) + profile.crossing[begin]
    planned = CostModel(profile, optimizer_copies=1).stage_memory(starts)[number - 1]
    own = segments(network, job.cuts[size])[number - 1]
    assert sum(p.numel() * p.element_size() for p in own.parameters()) == weights
    del training, network, inputs, own
    small = small_blocks(size, len(names) // (2 * size))
    KINDS["ddg-bare"].run(Job(small, job.cuts, 2), Laps(2 * size, 2, 1, job.device))
    gc.collect()
    before = resident_bytes()
    most = 0

    def look(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal most
        most = max(most, resident_bytes())

    hook = nn.modules.module.register_module_forward_hook(look)
    try:
        KINDS["ddg-bare"].run(job, Laps(2 * size, job.timed, 1, job.device))
    finally:
        hook.remove()
    theory = (late + 1) * (kept + weights) + weights
    return {
        "stage": number,
        "in_flight": late + 1,
        "measured_bytes": most - before,
        "theory_bytes": theory,
        "planned_bytes": planned,
        "message_bytes": max(profile.crossing[begin : end + 1 : end - begin]),
        "ratio": (most - before) / theory,
    }


def small_blocks(stages: int, layers: int) -> Work:
    """What prepares a process for :func:`fullest`: the same with next to no memory."""
    return Work("", partial(equal_blocks, stages, layers, 32), partial(random_values, 32, 16), cross_entropy)


class _Resident(Laps):
    """Looks at the memory after some numbers of batches."""

    def __init__(self, at: tuple[int, ...], device: torch.device) -> None:
        super().__init__(1, max(at), 0, device)
        self.at = at
        self.found: dict[int, int] = {}
        self._count = 0

    def note(self) -> None:
        self._count += 1
        if self._count in self.at:
            self.found[self._count] = resident_bytes()


def resident_after(job: Job, iterations: tuple[int, ...]) -> dict[int, int]:
    """The bytes that this process holds after some numbers of batches of one fit through the Trainer."""
    torch.set_num_threads(1)
    laps = _Resident(iterations, job.device)
    KINDS["ddg"].run(job, laps)
    return laps.found


# ---- all of it


def run_cost(quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures all costs, of ever larger stages.

    Args:
        quick: Whether to measure each once and leave the largest out.
        say: Told what is going on.

    Returns:
        The tables ``"tensors"``, ``"messages"``, ``"memory"`` and ``"flat"``, and ``"errors"``.
    """
    rounds = 1 if quick else 3
    found: dict[str, Any] = {"tensors": [], "messages": [], "memory": [], "flat": [], "errors": []}
    narrow = partial(random_values, _SAMPLES, 8)
    with Crew(2) as crew:

        def attempt(what: str, function: Callable[[], None]) -> None:
            say(f"cost: {what}")
            try:
                function()
            except WorkerError as error:
                found["errors"].append(f"{what}: {error}")

        def one(table: str, key: str, value: int, network: Callable[[], nn.Module], batch: Any, split: str) -> None:
            found[table].append({key: value, **added(crew, network, batch, split, rounds)})

        for count in TENSORS[: 3 if quick else None]:
            network = partial(many_tensors, count)
            split = f"network.{count // 2}"
            attempt(f"{count} parameter tensors", partial(one, "tensors", "tensors", count, network, narrow, split))
        for size in MESSAGE_BYTES[: 4 if quick else None]:
            batch = partial(random_values, _SAMPLES, 1)
            task = partial(one, "messages", "bytes", size, partial(large_message, size), batch, "network.1")
            attempt(f"messages of {size} bytes", task)

        def flat() -> None:
            job = Job(Work("", partial(many_tensors, 4), narrow, mean_loss), {2: ["network.2"]}, timed=1)
            iterations = FLAT_ITERATIONS[: 2 if quick else None]
            resident = crew.ask(_LIMIT_S, resident_after, job, iterations)[0]
            found["flat"] = [{"iterations": n, "resident_bytes": size} for n, size in resident.items()]

        def memory() -> None:
            width = 256 if quick else 1024
            with Crew(MEMORY_STAGES) as larger:
                for layers in MEMORY_LAYERS:
                    blocks = partial(equal_blocks, MEMORY_STAGES, layers, width)
                    work = Work("", blocks, partial(random_values, width, 16), cross_entropy)
                    points = [f"network.{2 * layers * stage}" for stage in range(1, MEMORY_STAGES)]
                    rows = larger.ask(_LIMIT_S, fullest, Job(work, {MEMORY_STAGES: points}, timed=4))
                    found["memory"] += [{"layers": layers, **row} for row in sorted(rows, key=lambda row: row["stage"])]

        if sys.platform == "linux":
            attempt("memory of 5,000 iterations" if not quick else "memory of 1,000 iterations", flat)
            attempt(f"memory of {MEMORY_STAGES} stages", memory)
    return found
