"""How long a message takes between two processes of this machine over gloo: the figure a plan is made with.

Run ``python -m recipes.benchmarks.link``. It measures as training does before it cuts a network.
"""

from __future__ import annotations

import argparse
import os
import platform
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_ddg.comm.link import Link
from lightning_ddg.comm.ranks import PipelineRanks
from recipes.ports import held_port


def measure(rank: int, port: int, repeats: int, results: SimpleQueue[list[Link]]) -> None:
    """Measure as one of the two processes; the first says what it found."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=2))
    ranks = PipelineRanks.connect(2, torch.device("cpu"), timedelta(minutes=2), "gloo")
    links = [ranks.link(Link(0.0, 0.0)) for _ in range(repeats)]
    if rank == 0:
        results.put(links)
    ranks.disconnect()
    dist.destroy_process_group()


def main() -> None:
    """Parse the command line, measure, and print nanoseconds per byte, and the latency."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="measurements, of which the median is printed")
    repeats = parser.parse_args().repeats
    results = mp.get_context("spawn").SimpleQueue()
    with held_port() as port:
        mp.spawn(measure, (port, repeats, results), nprocs=2)
    links = results.get()
    seconds, latency = sorted(link.seconds_per_byte for link in links), median(link.latency for link in links)
    least, most = seconds[0] * 1e9, seconds[-1] * 1e9
    print(f"{median(seconds) * 1e9:.2f} ns per byte one way (from {least:.2f} to {most:.2f}, {repeats} measurements), "
          f"{latency * 1e6:.0f} us for the smallest message, "
          f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")  # fmt: skip


if __name__ == "__main__":
    main()
