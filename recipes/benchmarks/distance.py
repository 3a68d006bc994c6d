"""Hosts that are far apart, on one machine: what a batch takes over links with a latency, beside what it should.

::

    namespace 1: stage 1, tun 10.78.0.1  <--\\
    namespace 2: stage 2, tun 10.78.0.2  <--- a router, which hands every packet on after the latency
    namespace 3: ...                     <--/

Run ``python -m recipes.benchmarks.distance``. Stages are emulated: 10 ms forward, 20 ms backward, asleep. It needs a
machine that lets one make network namespaces, and /dev/net/tun.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ddg.comm.ranks import PipelineRanks
from lightning_ddg.core.pipeline import Pipeline
from lightning_ddg.core.rng import Batch
from lightning_ddg.core.schedule import delay, stage_of_rank
from lightning_ddg.core.stage import Stage
from lightning_ddg.planning.simulate import Work as Seconds
from lightning_ddg.planning.simulate import slack_needed, steady_state

FORWARD_S, BACKWARD_S = 0.010, 0.020
#: 131 kB of float32, as an activation and as its gradient.
SHAPE = (128, 256)
#: The longest that hosts may take for a measurement, in seconds.
LIMIT = 300.0
_TIMEOUT = timedelta(minutes=2)
_PORT = 29502
_MTU = 9000
# Of linux/if_tun.h: make a device; it carries IP packets, without a header before them.
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def planned(stages: int, latency_s: float, slack: int = 0) -> Seconds:
    """What ``lightning-ddg plan`` would simulate."""
    links = [0.0] * (stages - 1)
    return Seconds([FORWARD_S] * stages, [BACKWARD_S] * stages, links, links, latency_s, slack)


def allowed(stages: int, latency_s: float, slack: int = 0) -> float:
    """Seconds that the schedule takes for a batch."""
    return steady_state(planned(stages, latency_s, slack)).period


def measured(stages: int, latency_s: float, batches: int, slack: int = 0) -> float:
    """Seconds that the bare loop takes for a batch, where every packet takes so long: the median, on the last stage.

    Raises:
        RuntimeError: If a host fails, or the limit is reached.
    """
    task = json.dumps({"stages": stages, "latency": latency_s, "batches": batches, "slack": slack})
    where = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-m", __spec__.name, "--route", task]
    done = subprocess.run(where, capture_output=True, text=True, timeout=LIMIT + 30)
    if done.returncode:
        raise RuntimeError(f"The hosts failed. Their last lines:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


# ---- the router


def route(stages: int, latency: float, batches: int, slack: int) -> int:
    """Starts a host for each rank and hands on what they send to each other; returns 1 if one fails."""
    hosts: list[subprocess.Popen[bytes]] = []
    devices: list[int] = []
    on_the_way: deque[tuple[float, int, bytes]] = deque()
    deadline = time.monotonic() + LIMIT
    try:
        for rank in range(stages):
            ours, theirs = socket.socketpair()
            own = {"rank": rank, "line": theirs.fileno()}
            task = json.dumps({"stages": stages, "batches": batches, "slack": slack, **own})
            command = ["unshare", "--net", sys.executable, "-m", __spec__.name, "--host", task]
            hosts.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
            theirs.close()
            ours.settimeout(60)
            devices += socket.recv_fds(ours, 1, 1)[1]
        while any(host.poll() is None for host in hosts) and not any(host.poll() for host in hosts):
            now = time.monotonic()
            if now > deadline:
                return 1
            while on_the_way and on_the_way[0][0] <= now:
                _, to, packet = on_the_way.popleft()
                os.write(devices[to], packet)
            due = on_the_way[0][0] - now if on_the_way else 0.2
            for device in select.select(devices, [], [], max(0.0, min(due, 0.2)))[0]:
                packet = os.read(device, 65536)
                # The last byte of an IPv4 packet's destination is the host's number.
                if packet[0] >> 4 == 4 and 1 <= packet[19] <= stages:
                    on_the_way.append((time.monotonic() + latency, packet[19] - 1, packet))
        return int(any(host.poll() for host in hosts))
    finally:
        for host in hosts:
            host.kill()


# ---- a host


def host(rank: int, stages: int, batches: int, slack: int, line: int) -> None:
    """Trains as one rank behind a device of its own; the last stage prints the seconds of a batch."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH14x", b"ddg0", _IFF_TUN | _IFF_NO_PI))
    for words in (
        "link set lo up",
        f"addr add 10.78.0.{rank + 1}/24 dev ddg0",
        f"link set ddg0 mtu {_MTU} txqueuelen 10000 up",
    ):
        subprocess.run(["ip", *words.split()], check=True, timeout=20)
    # BBR, where it is chosen, spreads a message over time, which is no matter of this package.
    Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text("reno")
    with socket.socket(fileno=line) as to_router:
        socket.send_fds(to_router, [b"!"], [device])
    os.environ.update(MASTER_ADDR="10.78.0.1", MASTER_PORT=str(_PORT), GLOO_SOCKET_IFNAME="ddg0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=stages, timeout=_TIMEOUT)
    seconds = train(stages, batches, slack)
    if rank == 0:
        print(seconds, flush=True)
    dist.destroy_process_group()


class _Works(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        time.sleep(FORWARD_S)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(BACKWARD_S)
        return grad


class EmulatedStage(nn.Module):
    """Sleeps as long as a device would work."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, value: Tensor) -> Tensor:
        """Shape ``(128, 256)``, in and out."""
        return _Works.apply(value * self.scale)  # type: ignore[no-any-return, no-untyped-call]


def train(stages: int, batches: int, slack: int) -> float:
    """The loop of docs/core.md; returns the median seconds from one batch to the next."""
    ranks = PipelineRanks.connect(stages, torch.device("cpu"), _TIMEOUT, "gloo", slack)
    number = stage_of_rank(dist.get_rank(), stages)
    module, inputs = EmulatedStage(), torch.ones(SHAPE)
    pipeline = Pipeline(Stage(module, delay(number, stages, slack)), number, stages, ranks.mailbox)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)

    def step() -> None:
        pipeline.before_step()
        optimizer.step()
        pipeline.after_step()
        optimizer.zero_grad()

    times = []
    for batch in range(batches):
        output = pipeline.train(Batch(batch), (inputs,), {})
        pipeline.backward(partial(_backward, output))
        step()
        times.append(time.perf_counter())
    while pipeline.drain():
        step()
    ranks.disconnect()
    # Two batches at a time: with two stages, the time from one to the next alternates.
    later = range(batches // 3, batches - 2)
    return median((times[at + 2] - times[at]) / 2 for at in later)


def _backward(output: Tensor) -> None:
    output.square().mean().backward()


def main(arguments: Sequence[str]) -> int:
    """Measures each number of stages over each latency."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.distance", description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 5.0, 20.0, 50.0], help="one way")
    parser.add_argument("--slack", default="0", help="batches, or 'needed': as many as the plan names for the latency")
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--route", help=argparse.SUPPRESS)
    parser.add_argument("--host", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.host:
        host(**json.loads(asked.host))
        return 0
    if asked.route:
        return route(**json.loads(asked.route))
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores")
    print("stages  latency  slack  a batch  allowed  ratio of speeds")
    for stages in asked.stages:
        for latency_ms in asked.latency_ms:
            work = planned(stages, latency_ms / 1000)
            slack = slack_needed(work) if asked.slack == "needed" else int(asked.slack)
            found = measured(stages, latency_ms / 1000, asked.batches, slack)
            least = allowed(stages, latency_ms / 1000, slack)
            figures = f"{found * 1000:5.1f} ms {least * 1000:5.1f} ms  {least / found:.2f}"
            print(f"{stages:6d} {latency_ms:5.0f} ms {slack:6d} {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
