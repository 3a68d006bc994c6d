"""lightning-ddg: train a network cut into stages without waiting for backpropagation.

Importing the package registers the strategies. Public names only; what they do lives in the modules they come from.
"""

from lightning_ddg.core.staleness import Staleness
from lightning_ddg.observe.monitor import DDGMonitor
from lightning_ddg.plugin import host
from lightning_ddg.plugin.mixin import DDGMixin
from lightning_ddg.plugin.strategy import DDGStrategy
from lightning_ddg.version import __version__

__all__ = ["DDGMixin", "DDGMonitor", "DDGStrategy", "Staleness", "__version__"]

host.register(DDGStrategy)
