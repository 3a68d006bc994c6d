"""What can be compared lives here: a method is a line in ``METHODS``, and a new one needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_ddg import Staleness


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

    @property
    def recompute(self) -> bool:
        """Whether stages do their forwards twice."""
        return bool(self.arguments.get("recompute", False))


METHODS = {
    "backprop": Method("backprop", "backprop"),
    "ddg": Method("DDG", "ddg"),
    # The paper's bare algorithm: gradients in flight at the end of an epoch are applied in the next.
    "ddg-undrained": Method("DDG, undrained", "ddg", {"drain": "never"}),
    # Other rules for stale gradients, see docs/staleness.md; the first is what the authors' released code does.
    "ddg-unstashed": Method("DDG, unstashed", "ddg", {"staleness": Staleness(stash=False)}),
    "features-replay": Method("Features Replay", "ddg", {"recompute": True, "staleness": Staleness(stash=False)}),
    "ddg-shrink": Method("DDG, shrink 0.5", "ddg", {"staleness": Staleness(shrink=0.5)}),
    "ddg-predict": Method("DDG, predict", "ddg", {"staleness": Staleness(extrapolate=True)}),
    "dni": Method("DNI", "dni"),
    "cdni": Method("cDNI", "dni", {"conditioned": True}),
}
