"""Where and with what figures are taken, and whether the machine is quiet, is found out here."""

from __future__ import annotations

import os
import platform
import statistics
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

#: Above these, what is measured is doubtful: the mean number of running processes, how much longer the median piece of
#: work takes than the shortest, and the cores that others keep busy during a measurement.
MOST_LOAD, MOST_SCATTER, MOST_OTHERS = 0.5, 0.05, 0.15

_PIECES = 60


def describe(accelerator: str = "cpu") -> dict[str, Any]:
    """Describes the machine, the versions and the moment."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if accelerator == "cuda" else []
    return {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.processor(),
        "gpus": gpus,
        "load": os.getloadavg()[0],
        "scatter": scatter(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "lightning")},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def scatter() -> float:
    """Does the same piece of work again and again: how much longer the median takes than the shortest, as a part."""
    a = torch.rand(256, 256)
    seconds = []
    for _ in range(_PIECES):
        start = time.perf_counter()
        for _ in range(10):
            a = (a @ a).clamp_(0, 1)
        seconds.append(time.perf_counter() - start)
    seconds = seconds[_PIECES // 6 :]
    return statistics.median(seconds) / min(seconds) - 1


def busy_s() -> float | None:
    """Processor seconds that all processes together have used since the machine was started, where it is known."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def warnings(machine: dict[str, Any], others: list[float]) -> list[str]:
    """What makes the figures doubtful, in sentences.

    Args:
        machine: What :func:`describe` found.
        others: The cores that others kept busy, of each measurement.
    """
    found = []
    if machine["load"] > MOST_LOAD:
        found.append(f"The load was {machine['load']:.2f} before anything was measured: stop what else runs.")
    if machine["scatter"] > MOST_SCATTER:
        found.append(
            f"The same piece of work took {machine['scatter']:.0%} longer in the median than at best: something else"
            " runs on this machine, or beside it on the same hardware."
        )
    disturbed = sum(cores > MOST_OTHERS for cores in others)
    if disturbed:
        found.append(
            f"In {disturbed} of {len(others)} measurements others kept more than {MOST_OTHERS} cores busy, up to"
            f" {max(others):.2f}: repeat the run on a quiet machine."
        )
    return found
