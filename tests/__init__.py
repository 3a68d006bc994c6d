"""The tests run with either of Lightning's packages: `LIGHTNING_DDG_HOST=pytorch_lightning python -m pytest ...`.

They import `lightning`; where the other package is to be tested, that is what they get.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_TWINS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


class _Twins:
    """Finds the other package's modules where those of `lightning` are imported."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name == "lightning":
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return ModuleSpec(name, self) if name.startswith("lightning.") else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Let a plain module be made."""

    def exec_module(self, module: ModuleType) -> None:
        half = ".".join(module.__name__.split(".")[:2])
        if half in _TWINS:
            sys.modules[module.__name__] = import_module(_TWINS[half] + module.__name__.removeprefix(half))


if os.environ.get("LIGHTNING_DDG_HOST") == "pytorch_lightning":
    sys.meta_path.insert(0, _Twins())  # type: ignore[arg-type]

# Every Trainer reads what all installed packages declare (20 ms); a test has as many as ten.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)  # type: ignore[assignment]
