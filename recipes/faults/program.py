"""The program that fails: a small network trained in K processes, told by an environment variable what to do where.

``recipes.faults.campaign`` starts it. Nothing in it knows how it will be judged.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddg import DDGStrategy
from recipes.faults import hosts
from recipes.faults.cases import Case

#: Describes the case; it marks all processes of the case, too.
VARIABLE = "DDG_FAULT"
#: The longest that a rank waits for another, in seconds.
TIMEOUT = 10
#: The file that is written when the fault happens: when, by the clock that all processes of a machine share.
STRUCK = "struck"
WIDTH = 64
_BATCH = 3
# In bytes: less than a checkpoint has, and more than the file in which a process leaves its error.
_DISK = 20_000


class Fault:
    """What happens, once, on one stage at one place."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.folder = folder
        self.armed = False
        self.struck = False

    def at(self, place: str, trainer: Trainer) -> None:
        """Tells that a stage is at a place."""
        if place == self.case.place and trainer.strategy.stage == self.case.stage:  # type: ignore[attr-defined]
            self.strike()

    def strike(self) -> None:
        """Lets it happen."""
        if self.struck:
            return
        self.struck = True
        (self.folder / STRUCK).write_text(str(time.monotonic()))
        match self.case.fault:
            case "raise":
                raise ArithmeticError("bang")
            case "hang":
                while True:
                    time.sleep(3600)
            case "exit":
                os._exit(0)
            case "cut":
                hosts.cut()
            case "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (_DISK, resource.RLIM_INFINITY))
            case name:
                sent = {"freeze": "SIGSTOP", "kill": "SIGKILL", "sigterm": "SIGTERM", "sigint": "SIGINT"}[name]
                os.kill(os.getpid(), signal.Signals[sent])


class Layer(nn.Module):
    """A layer in which the fault may happen, once the fault is armed."""

    def __init__(self, fault: Fault, stage: int) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.fault, self.stage = fault, stage

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.fault.armed and self.stage == self.fault.case.stage:
            if self.fault.case.place == "forward":
                self.fault.strike()
            elif self.fault.case.place == "backward" and x.requires_grad:
                x.register_hook(lambda _: self.fault.strike())
        return x


class Module(LightningModule):
    """K layers, of which each is a stage."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault
        self.net = nn.Sequential(*[Layer(fault, stage) for stage in range(1, fault.case.stages + 1)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.fault.at("configure_optimizers", self.trainer)
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Places(Callback):
    """Tells the fault where the program is."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == _BATCH:
            self.fault.armed = True
            self.fault.at("on_train_batch_start", trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == _BATCH:
            self.fault.at("on_train_batch_end", trainer)


def _tell(name: str) -> Any:
    def hook(self: Places, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.fault.at(name, trainer)

    return hook


for _name in ("setup", "teardown", "on_fit_start", "on_train_start", "on_validation_start", "on_train_epoch_end",
              "on_save_checkpoint", "on_train_end"):  # fmt: skip
    setattr(Places, _name, _tell(_name))


def main() -> None:
    """Trains two epochs, or fails."""
    told = json.loads(os.environ[VARIABLE])
    folder = Path(told.pop("folder"))
    fault = Fault(Case(**told), folder)
    case = fault.case
    torch.set_num_threads(1)
    data = DataLoader(TensorDataset(torch.randn(64, WIDTH)), batch_size=4)
    started = {"start_method": case.launcher} if case.launcher in ("popen", "spawn", "fork") else {}
    nodes = 2 if case.launcher == "hosts" else 1
    cut = [f"net.{stage}" for stage in range(1, case.stages)]
    trainer = Trainer(
        accelerator="cpu",
        devices=case.stages // nodes,
        num_nodes=nodes,
        strategy=DDGStrategy(split_points=cut, timeout=timedelta(seconds=TIMEOUT), **started),  # type: ignore[arg-type]
        max_epochs=2,
        callbacks=[Places(fault), ModelCheckpoint(folder / "checkpoints", save_last=True)],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(fault), data, data)
    print("trained")


if __name__ == "__main__":
    main()
