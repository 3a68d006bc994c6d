"""When every process gets all trained weights: before user code that may look at them, and at a fit's end.

While training, a process has the current weights of its own stage only, and those of the others as they were. Between
the moments below, :class:`~lightning_ddg.plugin.redirection.Redirection` refuses to give a state dict of the others::

    a validation begins      always
    an epoch ends            if a hook of the user's follows, in any process
    a checkpoint is saved    if a hook of the user's is asked what to save, in any process
    training ends            always, before the users' hooks, and after them, as they may change weights
"""

from __future__ import annotations

from lightning_ddg.comm.weights import renew
from lightning_ddg.plugin.ownership import Ownership
from lightning_ddg.plugin.site import Site


class Sharing:
    """Gives every process the weights of all; every process must call each method.

    Args:
        site: What the run is built of.
        ownership: Whose tensor is whose.
    """

    def __init__(self, site: Site, ownership: Ownership) -> None:
        self._site, self._ownership = site, ownership

    def share(self) -> None:
        """Give every process all weights, until the next step; buffers are those of the first replica."""
        if not self._site.weights.whole:
            site, names = self._site, self._ownership.own_names
            buffers = {name for name, _ in site.module.named_buffers()}
            site.ranks.share_first(site.module, [name for name in names if name in buffers], renew)
            site.ranks.share(site.module, names, range(site.ranks.size))
            self._site.weights.shared = True

    def share_if(self, wanted: bool) -> bool:
        """Do so if any process wants it; return whether that is so."""
        shared = not self._site.weights.whole and any(self._site.ranks.exchange(wanted))
        if shared:
            self.share()
        return shared

    def end(self) -> None:
        """Give every process all weights for good."""
        self.share()
        self._site.weights.whole = True
