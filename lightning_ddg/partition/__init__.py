"""From a module to a cut: find the network's layers, cost them, cut them into stages, show the cut.

Only the re-exports live here; add a name when the rest of the package needs it. Nothing in this folder imports
Lightning.
"""

from lightning_ddg.partition.chain import Chain, Segment
from lightning_ddg.partition.cost import flop_costs, parameter_costs, time_costs
from lightning_ddg.partition.cut import best_cut, check_cut, cut_at, forbidden_cuts
from lightning_ddg.partition.find import Network, find_network
from lightning_ddg.partition.table import cut_table, print_cut

__all__ = [
    "Chain",
    "Network",
    "Segment",
    "best_cut",
    "check_cut",
    "cut_at",
    "cut_table",
    "find_network",
    "flop_costs",
    "forbidden_cuts",
    "parameter_costs",
    "print_cut",
    "time_costs",
]
