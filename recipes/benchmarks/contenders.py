"""What is compared lives here: each way to train a work, through its public API; a new one goes into ``KINDS``.

Each contender runs in all processes of a set (:mod:`~recipes.benchmarks.workers`) at the same time, trains the same
work with the same optimizer, and notes the end of each batch, its optimizer's step included.
"""

from __future__ import annotations

import gc
import inspect
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from lightning_ddg import DDGStrategy
from lightning_ddg.comm.ranks import PipelineRanks
from lightning_ddg.core import rng
from lightning_ddg.core.pipeline import Pipeline
from lightning_ddg.core.schedule import delay, stage_of_rank
from lightning_ddg.core.stage import Stage
from recipes.benchmarks.workers import TIMEOUT
from recipes.benchmarks.works import Batch, Cuts, Work, make, network_of, positional_segments, segments, sgd

# Before torch 2.9 the option does not exist, and would be taken for an argument of the network.
_NO_OUTPUTS = {"return_outputs": False} if "return_outputs" in inspect.signature(ScheduleGPipe.step).parameters else {}


@dataclass(frozen=True)
class Job:
    """What a contender is to do.

    Attributes:
        work: What is trained.
        cuts: Where it is cut, by the number of stages.
        timed: Batches that are timed.
        microbatches: Pieces of a batch, for the schedules that cut it.
        accelerator: ``"cpu"`` or ``"cuda"``; processes share the GPUs if there are fewer.
        keep_weights: Whether the trained weights are wanted.
    """

    work: Work
    cuts: Cuts
    timed: int
    microbatches: int = 1
    accelerator: str = "cpu"
    keep_weights: bool = False

    @property
    def device(self) -> torch.device:
        """This process's device."""
        if self.accelerator == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", dist.get_rank() % torch.cuda.device_count())


@dataclass
class Outcome:
    """How a contender did in one process.

    Attributes:
        period_s: Seconds a batch: from the end of the last batch before those timed to the end of the last timed one.
        median_s: The median time between the ends of two timed batches, in seconds.
        cpu_s: Processor seconds of this process a batch, of all its threads.
        spent_s: Processor seconds of this process from beginning to end.
        weights: The trained weights of this process by name, if wanted.
    """

    period_s: float
    median_s: float
    cpu_s: float
    spent_s: float
    weights: dict[str, np.ndarray[Any, Any]]


class Laps:
    """Notes when each batch ends, and counts them.

    Args:
        warm: Batches before those timed, 1 or more.
        timed: Batches timed.
        after: Batches after them.
        device: Where the work is done.
    """

    def __init__(self, warm: int, timed: int, after: int, device: torch.device) -> None:
        self.warm, self.timed, self.total = warm, timed, warm + timed + after
        self.device = device
        self._began = time.process_time()
        self._ends: list[tuple[float, float]] = []

    def __iter__(self) -> Iterator[int]:
        """Goes through the batches and notes the end of each."""
        for batch in range(self.total):
            yield batch
            self.note()

    def note(self) -> None:
        """Notes that a batch has ended."""
        # In between, a GPU is left to itself: waiting for it would slow down whoever launches ahead of it.
        if self.device.type == "cuda" and len(self._ends) + 1 in (self.warm, self.warm + self.timed):
            torch.cuda.synchronize(self.device)
        self._ends.append((time.perf_counter(), time.process_time()))

    def outcome(self, weights: dict[str, np.ndarray[Any, Any]]) -> Outcome:
        """What was noted of the timed batches."""
        timed = self._ends[self.warm - 1 : self.warm + self.timed]
        (first, first_cpu), (last, last_cpu) = timed[0], timed[-1]
        median = statistics.median(after - before for (before, _), (after, _) in pairwise(timed))
        period, cpu = (last - first) / self.timed, (last_cpu - first_cpu) / self.timed
        return Outcome(period, median, cpu, time.process_time() - self._began, weights)


Run = Callable[[Job, Laps], nn.Module]


@dataclass(frozen=True)
class Kind:
    """A way to train.

    Attributes:
        label: For people.
        run: Trains in one process; returns a module that holds this process's trained weights.
        chunks: Stages of a process; the cut has that many times as many stages as there are processes.
        alone: Whether one process does it all, with all cores.
        delayed: Whether stages run ahead of each other: then the first and the last batches are not typical.
        family: Of one family only the best is reported; those with one cut the batch into micro-batches.
    """

    label: str
    run: Run = field(repr=False)
    chunks: int = 1
    alone: bool = False
    delayed: bool = False
    family: str = ""


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(name: str, job: Job) -> Outcome | None:
    """Lets a contender train in this process; all processes of the set call it at the same time.

    Args:
        name: Of one of ``KINDS``.
        job: What to do.

    Returns:
        How it did; nothing in a process that has no part in it.
    """
    kind, size = KINDS[name], dist.get_world_size()
    dist.barrier()
    if kind.alone and dist.get_rank():
        return None
    torch.set_num_threads(cores() if kind.alone else max(1, cores() // size))
    if job.accelerator == "cuda":
        torch.cuda.set_device(job.device)
    laps = Laps(2 * size, job.timed, 1, job.device) if kind.delayed else Laps(2, job.timed, 0, job.device)
    module = kind.run(job, laps)
    names = ((name.replace("segment.", "").replace("module.", ""), p) for name, p in module.named_parameters())
    return laps.outcome({name: p.detach().cpu().numpy() for name, p in names} if job.keep_weights else {})


def _on_device(job: Job) -> tuple[Any, Batch]:
    training, (inputs, targets) = make(job.work)
    return training, (inputs.to(job.device), targets.to(job.device))


def own_stage(job: Job, number: int) -> tuple[nn.Module, Batch]:
    """The module of one stage, 1 for the first, and the batch; the other stages are not kept if they need not be."""
    training, batch = _on_device(job)
    module = segments(network_of(training, job.work), job.cuts[dist.get_world_size()])[number - 1].to(job.device)
    del training
    # LightningModules are parts of cycles.
    gc.collect()
    return module, batch


# ---- one process, and copies of it


def backprop(job: Job, laps: Laps) -> nn.Module:
    """Plain backpropagation in one process."""
    training, (inputs, targets) = _on_device(job)
    return _train(training.to(job.device), training, inputs, targets, laps)


def ddp(job: Job, laps: Laps) -> nn.Module:
    """Torch's data parallelism: each process has the whole network and its share of the batch."""
    training, (inputs, targets) = _on_device(job)
    rank, size = dist.get_rank(), dist.get_world_size()
    if len(inputs) % size:
        raise ValueError(f"A batch of {len(inputs)} samples cannot be shared evenly by {size} processes: change either")
    training.network = DistributedDataParallel(training.network.to(job.device))
    return _train(training, training, inputs.chunk(size)[rank], targets.chunk(size)[rank], laps)


def _train(module: nn.Module, training: Any, inputs: Any, targets: Any, laps: Laps) -> nn.Module:
    optimizer = sgd(module)
    for batch in laps:
        optimizer.zero_grad()
        training.training_step((inputs, targets), batch).backward()
        optimizer.step()
    return module


# ---- torch's pipelines


_SPLIT = (ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble)


def flushing(schedule_class: Any, chunks: int = 1) -> Run:
    """One of torch's schedules, with this many stages of a process."""

    def train(job: Job, laps: Laps) -> nn.Module:
        training, (inputs, targets) = _on_device(job)
        rank, size = dist.get_rank(), dist.get_world_size()
        total = chunks * size
        piece = job.work.batch()[0][: len(inputs) // job.microbatches]
        parts = positional_segments(network_of(training, job.work), job.cuts[total], piece, schedule_class in _SPLIT)
        v_shaped = schedule_class is ScheduleZBVZeroBubble
        mine = [rank, total - 1 - rank] if v_shaped else [rank + size * chunk for chunk in range(chunks)]
        own = nn.ModuleList(parts[number].to(job.device) for number in mine)
        stages = [PipelineStage(parts[number], number, total, job.device) for number in mine]
        one_a_process = schedule_class in (ScheduleGPipe, Schedule1F1B)
        schedule = schedule_class(stages[0] if one_a_process else stages, job.microbatches, loss_fn=job.work.loss)
        optimizer = sgd(own)
        given = (inputs,) if 0 in mine else ()
        wanted = {"target": targets} if total - 1 in mine else {}
        for _ in laps:
            optimizer.zero_grad()
            schedule.step(*given, **wanted, **_NO_OUTPUTS)
            optimizer.step()
        return _Joined(own)

    return train


class _Joined(nn.Module):
    """Parts under the names their parameters have in the whole."""

    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for part in self.parts:
            yield from part.named_parameters(*args, **kwargs)


# ---- decoupled


class _Note(Callback):
    """Notes the end of each training batch."""

    def __init__(self, laps: Laps) -> None:
        self.laps = laps

    def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
        self.laps.note()


class Again(Dataset[Batch]):
    """The same batch, over and over."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, index: int) -> Batch:
        return self.batch


def _fit(job: Job, laps: Laps, **options: Any) -> nn.Module:
    training, batch = make(job.work)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[_Note(laps)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(training, DataLoader(Again(batch, laps.total), batch_size=None))
    return training


def ddg(job: Job, laps: Laps) -> nn.Module:
    """This package through the Trainer, one stage a process."""
    size = dist.get_world_size()
    points = list(job.cuts[size])
    if job.accelerator == "cuda" and torch.cuda.device_count() < size:
        devices = [torch.device("cuda", rank % torch.cuda.device_count()) for rank in range(size)]
        return _fit(
            job, laps, strategy=DDGStrategy(size, points, process_group_backend="gloo", parallel_devices=devices)
        )
    return _fit(job, laps, strategy=DDGStrategy(size, points), accelerator=job.accelerator, devices=size)


def ddg_in_one_process(job: Job, laps: Laps) -> nn.Module:
    """This package through the Trainer, all stages in one process."""
    size = dist.get_world_size()
    strategy = DDGStrategy(size, list(job.cuts[size]))
    return _fit(job, laps, strategy=strategy, accelerator=job.accelerator, devices=1)


def trainer_alone(job: Job, laps: Laps) -> nn.Module:
    """Plain backpropagation through the Trainer, what the one-process execution is compared with."""
    return _fit(job, laps, accelerator=job.accelerator, devices=1)


def ddg_bare(job: Job, laps: Laps) -> nn.Module:
    """This package's core without Lightning: the loop of docs/core.md; tensors of GPUs travel through the host."""
    size = dist.get_world_size()
    ranks = PipelineRanks.connect(size, job.device, TIMEOUT, "gloo")
    number = stage_of_rank(dist.get_rank(), size)
    module, (inputs, targets) = own_stage(job, number)
    pipeline = Pipeline(Stage(module, delay(number, size)), number, size, ranks.mailbox)
    optimizer = sgd(module)

    def step() -> None:
        pipeline.before_step()
        optimizer.step()
        pipeline.after_step()
        optimizer.zero_grad()

    try:
        for number in laps:
            output = pipeline.train(rng.Batch(number), (inputs,), {})
            pipeline.backward(partial(_backward, job.work.loss, output, targets))
            step()
        while pipeline.drain():
            step()
    except BaseException as error:
        ranks.abort(repr(error))
        raise
    finally:
        ranks.disconnect()
    return module


def _backward(loss: Callable[..., Any], output: Any, targets: Any) -> None:
    loss(output, targets).backward()


KINDS = {
    "backprop": Kind("backprop, one process", backprop, alone=True),
    "ddp": Kind("DDP", ddp),
    "naive": Kind("naive model parallel", flushing(ScheduleGPipe)),
    "gpipe": Kind("torch GPipe", flushing(ScheduleGPipe), family="gpipe"),
    "1f1b": Kind("torch 1F1B", flushing(Schedule1F1B), family="1f1b"),
    "interleaved": Kind("torch interleaved 1F1B", flushing(ScheduleInterleaved1F1B, 2), 2, family="interleaved"),
    "zb": Kind("torch zero bubble", flushing(ScheduleInterleavedZeroBubble, 2), 2, family="zero bubble"),
    "zbv": Kind("torch zero bubble V", flushing(ScheduleZBVZeroBubble, 2), 2, family="zero bubble"),
    "trainer": Kind("backprop through the Trainer", trainer_alone, alone=True),
    "ddg-one-process": Kind("DDG in one process", ddg_in_one_process, alone=True),
    "ddg": Kind("DDG through the Trainer", ddg, delayed=True),
    "ddg-bare": Kind("DDG, bare loop", ddg_bare, delayed=True),
}
