"""The command line: LightningCLI with this package's strategies, and the commands ``plan`` and ``doctor``.

``lightning-ddg`` and ``python -m lightning_ddg`` are the same program: ``fit``, ``validate``, ``test`` and ``predict``
as :class:`~lightning.pytorch.cli.LightningCLI` has them, with four differences.

* Importing this package registered its strategies, so a YAML file may say ``strategy: ddg``.
* A module that lies next to the user's YAML file can be named as a ``class_path``, however the program was started.
* ``plan`` takes the YAML file of a ``fit`` and shows what it would be like in 2, 3, ... stages, without training.
* ``doctor`` takes nothing, and says what this machine can do.

Lightning's launcher starts the other stages by running the same command line again in the same directory. Both forms
can be repeated: neither reads its standard input, and neither depends on anything but ``sys.argv`` and the directory.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from lightning_ddg.planning.plan import NUM_STAGES, Plan
from lightning_ddg.planning.timeline import check_picture
from lightning_ddg.plugin import doctor
from lightning_ddg.plugin.host import (
    ArgsType,
    Callback,
    DummyLogger,
    LightningCLI,
    LightningDataModule,
    LightningModule,
    MisconfigurationException,
    Trainer,
)
from lightning_ddg.plugin.measure import copies_kept
from lightning_ddg.plugin.planned import plan_module

__all__ = ["main"]

# Of a config's trainer, all that bears on what a batch is and how long it takes.
_KEPT = ("accelerator", "precision", "deterministic", "benchmark", "reload_dataloaders_every_n_epochs")


class _Planned(BaseException):
    """End a fit before its first step."""


class _Planner(Callback):
    """Plan with the first batch of a fit, as its training step would get it."""

    def __init__(self, **asked: Any) -> None:
        self.plan: Plan | None = None
        self.problem: str | None = None
        self._asked = asked

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        try:
            self.plan = plan_module(
                pl_module,
                batch,
                optimizer_copies=copies_kept(trainer.optimizers[0] if trainer.optimizers else None),
                context=trainer.precision_plugin.train_step_context,
                **self._asked,
            )
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            self.problem = str(error)
        raise _Planned


class _Trainer(Trainer):
    """Lightning's Trainer, and a method for the command ``plan``."""

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        num_stages: int | list[int] = list(NUM_STAGES),  # noqa: B006 - the default is what the help shows
        picture: str | None = None,
        recompute: bool = False,
        stash: bool = True,
        micro_batches: int | list[int] = [],  # noqa: B006
        finish: float = 0.0,
        slack: int = 0,
        latency_ms: float = 0.0,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Say what a fit would be like in stages: the cuts, their speed, their memory. Nothing is trained or written.

        Args:
            model: The LightningModule.
            datamodule: Its data.
            num_stages: One number of stages, or a list of them. What is asked for is shown stage by stage.
            picture: Where to draw the simulated timelines; the name ends in .png or .svg.
            recompute: As the strategy's argument; the strategy in the config is not looked at.
            stash: As that of the strategy's staleness.
            micro_batches: One number of micro-batches into which a batch is split, or a list of them, to be compared.
            finish: As that of the strategy's staleness: what a synchronous last part of a fit costs.
            slack: As the strategy's argument.
            latency_ms: How long any message is under way, one way; which slack hides that is shown.
            ckpt_path: Accepted, so that a fit's saved config can be planned; not read.
            weights_only: Accepted, as ckpt_path.
        """
        try:
            if picture is not None:
                check_picture(picture)
        except (ImportError, ValueError) as error:
            raise SystemExit(f"lightning-ddg plan: {error}") from error
        planner = _Planner(
            num_stages=num_stages,
            recompute=recompute,
            stash=stash,
            micro_batches=micro_batches,
            finish=finish,
            slack=slack,
            latency_ms=latency_ms,
        )
        self.callbacks.append(planner)  # type: ignore[attr-defined]
        try:
            with suppress(_Planned):
                self.fit(model, datamodule=datamodule)
        except MisconfigurationException as error:
            planner.problem = str(error)
        if planner.plan is None:
            problem = planner.problem or "The training data has no batch, and a batch is what is measured. Give it one."
            raise SystemExit(f"lightning-ddg plan: {problem}")
        planner.plan.print(details=num_stages != list(NUM_STAGES))
        if picture is not None:
            planner.plan.draw(picture)
            print(f"timelines drawn in {picture}")


class _CLI(LightningCLI):
    """LightningCLI with the command ``plan``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "plan": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        if self.subcommand == "plan":
            # These would be made before anybody asks for a trainer; a logger may write files when it is made.
            trainer = self.config.plan.trainer
            for name in ("logger", "callbacks", "plugins", "profiler"):
                trainer[name] = None
            trainer.strategy = "auto"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.subcommand != "plan":
            return super().instantiate_trainer(**kwargs)
        asked = self.config_init.plan.trainer
        return _Trainer(
            **{name: asked[name] for name in _KEPT},
            devices=1,
            max_epochs=1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            # A module may speak to its logger; what it says is not kept.
            logger=[DummyLogger()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )


def main(args: ArgsType = None) -> None:
    """Parse a command line and run it.

    The current directory is put first on ``sys.path`` if it is not there: ``python -m`` does so by itself, a console
    script does not, and both must find the same modules.

    Args:
        args: What to parse, as :class:`~lightning.pytorch.cli.LightningCLI` takes it: a list of words, or a nested
            dictionary; ``None`` means ``sys.argv``. Child processes started by Lightning see only ``sys.argv``, so
            explicit arguments suit a run in one process (or ``strategy: ddg_spawn``).

    Raises:
        SystemExit: The arguments cannot be parsed, with status 2 and a message on standard error; or they ask for
            help, with status 0; or nothing can be planned, or a check of the doctor's fails, with status 1.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    if (sys.argv[1:] if args is None else args) == ["doctor"]:
        raise SystemExit(doctor.main())
    _CLI(args=args, trainer_class=_Trainer, save_config_kwargs={"overwrite": True})
