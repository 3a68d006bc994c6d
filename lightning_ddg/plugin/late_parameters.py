"""Parameters that a training step makes, as modules do that are built when they are first needed.

The optimizer does not know them. In several processes each makes its own, of its own random numbers, and which one is
used and saved is left to chance.
"""

from __future__ import annotations

from torch import nn


class LateParameters:
    """Looks at the first batch of each epoch.

    Args:
        root: The LightningModule.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._known: set[str] | None = None

    def mark(self) -> None:
        """Note which parameters there are before a batch."""
        self._known = self._names()

    def check(self) -> None:
        """Refuse parameters that have been made since :meth:`mark`.

        Raises:
            RuntimeError: Naming them.
        """
        late, self._known = sorted(self._names() - self._known) if self._known is not None else [], None
        if late:
            raise RuntimeError(
                f"The training step has made {', '.join(map(repr, late[:4]))}{', ...' if len(late) > 4 else ''}, which"
                " the optimizer does not know, and of which each process has made its own. Make such parameters in"
                " `__init__`, in `setup`, or by one call of the network there, or train in one process (`devices=1`)."
            )

    def _names(self) -> set[str]:
        return {name for name, _ in self._root.named_parameters()}
