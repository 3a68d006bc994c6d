"""From a module to a cut: find the network's layers, cost them, cut them into stages, show the cut.

Only the re-exports live here; add a name when the rest of the package needs it. Nothing in this folder imports
Lightning.
"""

from lightning_ddg.partition.chain import Chain, Layers, Segment
from lightning_ddg.partition.cost import NotTheSame, Profile, check_same, flop_costs, measure_profile, parameter_costs
from lightning_ddg.partition.cut import (
    best_cut,
    best_stages,
    check_cut,
    cut_at,
    forbidden_cuts,
    stage_memory,
    stage_seconds,
)
from lightning_ddg.partition.find import Network, find_network
from lightning_ddg.partition.table import cut_table, print_cut
from lightning_ddg.partition.units import parse_bytes, show_bytes

__all__ = [
    "Chain",
    "Layers",
    "Network",
    "NotTheSame",
    "Profile",
    "Segment",
    "best_cut",
    "best_stages",
    "check_cut",
    "check_same",
    "cut_at",
    "cut_table",
    "find_network",
    "flop_costs",
    "forbidden_cuts",
    "measure_profile",
    "parameter_costs",
    "parse_bytes",
    "print_cut",
    "show_bytes",
    "stage_memory",
    "stage_seconds",
]
