"""What this machine and this installation can do, and whether training is exact here: the command ``doctor``.

Each way to train that can run here trains a small network in float64, and what comes out is compared with what must:
with plain Lightning where a synchronous finish makes all of a fit backpropagation, and with one process where several
processes train. None of it takes longer than it takes to start them.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ddg.comm.link import Link
from lightning_ddg.core.staleness import Staleness
from lightning_ddg.planning.report import print_table
from lightning_ddg.planning.units import show_bytes, show_ms
from lightning_ddg.plugin import host
from lightning_ddg.plugin.strategy import DDGStrategy

#: The largest difference between weights that rounding explains, of a few updates in float64.
_ROUNDING = 1e-10
_TIMEOUT = timedelta(seconds=60)
_PACKAGES = ("lightning-ddg", "torch", "lightning", "pytorch-lightning", "torchmetrics", "numpy")


class Probe(host.LightningModule):
    """A network of two stages that trains on fixed numbers, and notes how long a message takes between them."""

    link: Tensor

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)]
            self.net = nn.Sequential(*layers).double()
            self.batches = [(torch.randn(6, 8).double(), torch.randn(6, 4).double()) for _ in range(6)]
        # State, so that it comes back from the processes that measure it.
        self.register_buffer("link", torch.zeros(2, dtype=torch.float64))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be quiet in a process that is started for a check, too."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _silence()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def on_train_start(self) -> None:
        """Measure the link, where there is one."""
        strategy = self.trainer.strategy
        run = strategy.run if isinstance(strategy, DDGStrategy) else None
        if run is not None and run.ranks.others:
            self.link.copy_(torch.tensor(run.ranks.link(Link(0.0, 0.0))))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(strategy: Any, devices: int = 1, accelerator: str = "cpu") -> Probe:
    """Train the probe for two epochs."""
    module = Probe()
    trainer = host.Trainer(strategy=strategy, accelerator=accelerator, devices=devices, max_epochs=2, barebones=True)
    trainer.fit(module, DataLoader(module.batches, batch_size=None))  # type: ignore[arg-type]
    return module.cpu()


def strategy(**options: Any) -> DDGStrategy:
    """Return the strategy of a check, with the probe cut in the middle."""
    return DDGStrategy(num_stages=2, split_points=["net.2"], timeout=_TIMEOUT, **options)


def one_process(accelerator: str) -> str:
    """Train all stages in one process, once without any staleness, as plain Lightning must, and once with it."""
    plain = train("auto", accelerator=accelerator)
    synchronous = train(strategy(staleness=Staleness(finish=1.0)), accelerator=accelerator)
    train(strategy(), accelerator=accelerator)
    return _compared(synchronous, plain, "plain Lightning")


def processes(accelerator: str, backend: str) -> str:
    """Train two stages in two processes, as one process trains them."""
    shared = accelerator == "cuda" and torch.cuda.device_count() < 2
    where: dict[str, Any] = {"parallel_devices": [torch.device("cuda", 0)] * 2} if shared else {}
    several = strategy(start_method="spawn", process_group_backend=backend, **where)
    together = train(several, 2, "auto" if shared else accelerator)
    text = _compared(together, train(strategy(), accelerator=accelerator), "one process")
    latency, byte = together.link.tolist()
    return f"{text}; a message takes {show_ms(latency)}" + (f", {show_bytes(1 / byte)}/s" if byte else "")


def _compared(module: Probe, expected: Probe, what: str) -> str:
    pairs = zip(module.parameters(), expected.parameters(), strict=True)
    largest = max(float((one - other).detach().abs().max()) for one, other in pairs)
    if not largest <= _ROUNDING:
        raise ArithmeticError(f"the weights differ from those of {what} by {largest:.1e}, more than {_ROUNDING:.0e}")
    return f"exact: {largest:.0e} from {what}"


def checks() -> Iterator[tuple[str, Callable[[], str]]]:
    """List what can be checked here: for people, and what to call."""
    yield "one process, CPU", lambda: one_process("cpu")
    yield "two processes, CPU, gloo", lambda: processes("cpu", "gloo")
    if torch.cuda.is_available():
        yield "one process, GPU", lambda: one_process("cuda")
        yield "two processes, GPU, gloo", lambda: processes("cuda", "gloo")
        if torch.cuda.device_count() > 1 and dist.is_nccl_available():
            yield "two processes, GPUs, NCCL", lambda: processes("cuda", "nccl")


def facts() -> Iterator[tuple[str, str]]:
    """List what is known of the machine and the installation."""
    for package in _PACKAGES:
        try:
            yield package, version(package) + (" (used)" if package.replace("-", "_") == host.HOST else "")
        except PackageNotFoundError:
            yield package, "not installed"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "CPU", f"{cores} cores, {torch.get_num_threads()} threads of torch{_memory()}"
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    yield "GPUs", "; ".join(f"{one.name}, {show_bytes(one.total_memory)}" for one in names) or "none that torch finds"
    known = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available} if dist.is_available() else {}
    yield (
        "backends",
        ", ".join(name for name, there in known.items() if there()) or "none: torch.distributed is missing",
    )


def _memory() -> str:
    try:
        return f", {show_bytes(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} of memory"
    except (AttributeError, OSError, ValueError):
        return ""


def _silence() -> None:
    """Leave out what Lightning says of each of these small fits; this process is the doctor's own."""
    for half in ("pytorch", "fabric"):
        logging.getLogger(host.part(half).__name__).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main() -> int:
    """Print the facts, run the checks, print what they found; return 1 if one has failed."""
    table = Table("what", "is", title="lightning-ddg doctor", box=SIMPLE, show_header=False)
    for row in facts():
        table.add_row(*row)
    print_table(table)
    failed = False
    _silence()
    for name, check in checks():
        begun = time.monotonic()
        try:
            text = check()
        except Exception as error:
            failed, text = True, f"FAILED: {type(error).__name__}: {error}"
        print(f"{name}: {text} ({time.monotonic() - begun:.0f} s)", flush=True)
    if failed:
        print("Please open an issue with all of this.", file=sys.stderr)
    return int(failed)
