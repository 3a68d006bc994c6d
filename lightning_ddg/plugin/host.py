"""Which of Lightning's two packages is meant, and its names: `lightning`, or its twin `pytorch_lightning`.

Both have the same source but classes of their own, so that a process uses the classes of one of them: of the one that
the program has imported before this package; of `lightning` if both or neither. `LIGHTNING_DDG_HOST` decides otherwise.
No other module imports Lightning.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

VARIABLE = "LIGHTNING_DDG_HOST"

# By the name of a package: where its halves are.
_PACKAGES = {
    "lightning": {"pytorch": "lightning.pytorch", "fabric": "lightning.fabric"},
    "pytorch_lightning": {"pytorch": "pytorch_lightning", "fabric": "lightning_fabric"},
}

# Where the names below are, in the order in which they are looked for; the command line's last, as few need it.
_PARTS = (
    "pytorch",
    "pytorch.accelerators",
    "pytorch.callbacks",
    "pytorch.core.optimizer",
    "pytorch.plugins.precision",
    "pytorch.strategies",
    "pytorch.trainer.states",
    "pytorch.utilities.exceptions",
    "pytorch.utilities.rank_zero",
    "pytorch.utilities.signature_utils",
    "pytorch.utilities.combined_loader",
    "pytorch.utilities.model_helpers",
    "pytorch.loggers.logger",
    "fabric.plugins",
    "fabric.utilities.exceptions",
    "pytorch.cli",
)


def _chosen() -> str:
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return "pytorch_lightning" if _imported("pytorch_lightning") and not _imported("lightning") else "lightning"
    if asked not in _PACKAGES:
        raise ValueError(f"{VARIABLE}={asked!r} names no package of Lightning: {' or '.join(_PACKAGES)}.")
    return asked


def _imported(package: str) -> bool:
    name = _PACKAGES[package]["pytorch"]
    # A program may have put one package in the other's place, by an alias.
    return getattr(sys.modules.get(name), "__name__", None) == name


#: The package whose classes this one uses, and its twin.
HOST = _chosen()
(OTHER,) = _PACKAGES.keys() - {HOST}


def part(path: str, package: str = HOST) -> Any:
    """Return a module of Lightning: ``"pytorch.callbacks"`` is `lightning.pytorch.callbacks`, or its twin."""
    half, dot, rest = path.partition(".")
    return import_module(_PACKAGES[package][half] + dot + rest)


def if_mixed() -> str | None:
    """Say what happened, and the remedy, to a program that has imported the other package too."""
    if not _imported(OTHER):
        return None
    return (
        f"lightning_ddg works with `{HOST}` in this process, and cannot be used by a Trainer of `{OTHER}`, which has"
        f" classes of its own. Import `{OTHER}`, and not `{HOST}`, before lightning_ddg, or set the environment"
        f" variable {VARIABLE}={OTHER}. The Trainer and the LightningModule must be of the same package."
    )


def register(strategy: Any) -> None:
    """Register the strategies; those who ask the other package for them get told why it has none.

    That package is not imported for it: where the program does so later, that is heard of.
    """

    def refuse(**_: Any) -> None:
        raise ImportError(if_mixed())

    def register_refusals() -> None:
        others = part("pytorch.strategies", OTHER).StrategyRegistry
        # A program that has put this package in the other's place has one registry for both.
        if others is registry:
            return
        for name in [name for name, entry in registry.items() if entry["strategy"] is strategy]:
            others.register(name, refuse, description=f"lightning_ddg works with {HOST} in this process", override=True)

    registry = part("pytorch.strategies").StrategyRegistry
    strategy.register_strategies(registry)
    if _imported(OTHER):
        register_refusals()
    else:
        sys.meta_path.insert(0, _WhenImported(f"{_PACKAGES[OTHER]['pytorch']}.strategies", register_refusals))


class _WhenImported(MetaPathFinder):
    """Finds no module, but calls a function once a certain one has been imported."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_call(module: ModuleType) -> None:
                run(module)
                self._then()

            spec.loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec


try:
    part("pytorch")
except ModuleNotFoundError as error:
    raise ImportError(
        f"lightning_ddg looks for the package `{HOST}`, which cannot be imported ({error}). Install it, or set the"
        f" environment variable {VARIABLE}={OTHER} to use that one."
    ) from error

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO as CheckpointIO
    from lightning.fabric.plugins import ClusterEnvironment as ClusterEnvironment
    from lightning.fabric.plugins import TorchCheckpointIO as TorchCheckpointIO
    from lightning.fabric.utilities.exceptions import MisconfigurationException as MisconfigurationException
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch import LightningDataModule as LightningDataModule
    from lightning.pytorch import LightningModule as LightningModule
    from lightning.pytorch import Trainer as Trainer
    from lightning.pytorch.accelerators import Accelerator as Accelerator
    from lightning.pytorch.callbacks import BaseFinetuning as BaseFinetuning
    from lightning.pytorch.callbacks import ModelCheckpoint as ModelCheckpoint
    from lightning.pytorch.callbacks import ModelPruning as ModelPruning
    from lightning.pytorch.callbacks import OnExceptionCheckpoint as OnExceptionCheckpoint
    from lightning.pytorch.callbacks import Timer as Timer
    from lightning.pytorch.cli import ArgsType as ArgsType
    from lightning.pytorch.cli import LightningCLI as LightningCLI
    from lightning.pytorch.core.optimizer import LightningOptimizer as LightningOptimizer
    from lightning.pytorch.loggers.logger import DummyLogger as DummyLogger
    from lightning.pytorch.plugins.precision import MixedPrecision as MixedPrecision
    from lightning.pytorch.plugins.precision import Precision as Precision
    from lightning.pytorch.strategies import ParallelStrategy as ParallelStrategy
    from lightning.pytorch.strategies import Strategy as Strategy
    from lightning.pytorch.trainer.states import TrainerFn as TrainerFn
    from lightning.pytorch.utilities.combined_loader import CombinedLoader as CombinedLoader
    from lightning.pytorch.utilities.exceptions import SIGTERMException as SIGTERMException
    from lightning.pytorch.utilities.model_helpers import is_overridden as is_overridden
    from lightning.pytorch.utilities.rank_zero import rank_zero_info as rank_zero_info  # type: ignore[attr-defined]
    from lightning.pytorch.utilities.rank_zero import rank_zero_only as rank_zero_only  # type: ignore[attr-defined]
    from lightning.pytorch.utilities.signature_utils import (
        is_param_in_hook_signature as is_param_in_hook_signature,
    )
else:

    def __getattr__(name: str) -> Any:
        # The import system asks modules for names with underscores, and would mistake this one for a package.
        for path in () if name.startswith("_") else _PARTS:
            if hasattr(module := part(path), name):
                return getattr(module, name)
        raise AttributeError(f"{__name__} has no name {name!r}")
