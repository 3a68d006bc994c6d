"""What can go wrong, where, on which stage and under which launcher; cases are drawn from all of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass

#: The faults, and what each does.
FAULTS = {
    "raise": "raises an exception",
    "hang": "never returns",
    "freeze": "is stopped by SIGSTOP",
    "kill": "is killed by SIGKILL",
    "exit": "leaves by os._exit(0)",
    "sigterm": "gets SIGTERM",
    "sigint": "gets Ctrl-C",
    "full disk": "cannot write to the disk",
    "cut": "is cut off from the other host",
}

#: Hooks of a callback or of the module, in their order; "forward" and "backward" are a layer's of the stage.
PLACES = (
    "setup",
    "configure_optimizers",
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "forward",
    "backward",
    "on_train_batch_end",
    "on_validation_start",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_train_end",
    "teardown",
)

LAUNCHERS = ("popen", "spawn", "fork", "torchrun")


@dataclass(frozen=True)
class Case:
    """One program that fails.

    Attributes:
        number: Of the case, in the order in which it was drawn.
        launcher: Of ``LAUNCHERS``, or ``"hosts"``: one process on each of two hosts.
        stages: K, and the number of processes.
        fault: Of ``FAULTS``.
        place: Of ``PLACES``.
        stage: The stage, from 1, whose process it happens to.
    """

    number: int
    launcher: str
    stages: int
    fault: str
    place: str
    stage: int

    @property
    def rank(self) -> int:
        """The process of the stage: the last stage is rank 0's."""
        return self.stages - self.stage

    @property
    def name(self) -> str:
        """The name of that process in messages."""
        return f"Rank {self.rank} (stage {self.stage})"

    def __str__(self) -> str:
        told = asdict(self)
        return ", ".join(f"{key} {told[key]}" for key in ("launcher", "stages", "fault", "place", "stage"))


def draw(seed: int, cases: int) -> Iterator[Case]:
    """Draws cases; the first of them are the same however many are asked for."""
    chance = random.Random(seed)
    for number in range(1, cases + 1):
        stages, fault = chance.choice((2, 3)), chance.choice([name for name in FAULTS if name != "cut"])
        launcher, place, stage = chance.choice(LAUNCHERS), chance.choice(PLACES), chance.randint(1, stages)
        if fault == "full disk":
            # Only rank 0 writes.
            place, stage = "on_save_checkpoint", stages
        if place == "teardown" and fault in ("hang", "freeze"):
            # The ranks have parted by then, and nobody waits.
            place = "on_train_end"
        yield Case(number, launcher, stages, fault, place, stage)
