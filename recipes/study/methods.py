"""What can be compared lives here: a method is a line in ``METHODS``, and a new one needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """A way to train a network in K stages.

    Attributes:
        label: What tables and figures call it.
        kind: ``"backprop"`` has one stage; ``"ddg"`` is the package's strategy with all stages in one process;
            ``"dni"`` is the LightningModule of ``recipes/dni.py``, whose parts are as even in units as can be.
        arguments: What the strategy, or the LightningModule, is given beside the number of stages and the cut.
    """

    label: str
    kind: Literal["backprop", "ddg", "dni"]
    arguments: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "backprop": Method("backprop", "backprop"),
    "ddg": Method("DDG", "ddg"),
    # The paper's bare algorithm: gradients in flight at the end of an epoch are applied in the next.
    "ddg-undrained": Method("DDG, undrained", "ddg", {"drain": "never"}),
    "dni": Method("DNI", "dni"),
    "cdni": Method("cDNI", "dni", {"conditioned": True}),
}
