"""What a Python that tests start does first: it hides what the package does not require, which halves its start.

Lightning imports torchmetrics, which imports torchvision, transformers, SciPy and Matplotlib where they are installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, PackageNotFoundError
from typing import Any

HIDDEN = {"matplotlib", "scipy", "torchvision", "transformers"}


class _Hiding:
    """Finds nothing, and lets nobody else find, where a hidden package is asked for."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}: the tests' interpreter hides it", name=name)
        return None


def _from_name(name: str) -> Distribution:
    if name in HIDDEN:
        raise PackageNotFoundError(name)
    return _found(name)


_found: Any = Distribution.from_name
Distribution.from_name = _from_name  # type: ignore[method-assign, assignment]
sys.meta_path.insert(0, _Hiding())  # type: ignore[arg-type]

if os.environ.get("LIGHTNING_DDG_HOST") == "pytorch_lightning":
    import tests  # noqa: F401 - the other package in the place of `lightning`, as in this process's parent
