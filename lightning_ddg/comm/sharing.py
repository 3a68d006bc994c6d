"""Weights and states that move between ranks outside iterations: to rank 0 for a checkpoint, to all after the fit.

Which tensor is whose is in :mod:`~lightning_ddg.plugin.checkpoint`. Everything here is collective: every rank must
call it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ddg.comm.mailbox import GroupMailbox
from lightning_ddg.core.execution import Channel

STATE = Channel("state", on_host=True)


def gather_to_rank_zero(transport: GroupMailbox, own: dict[Any, Any]) -> list[dict[Any, Any]]:
    """What the other ranks have, on rank 0; an empty list on all others."""
    if transport.rank == 0:
        return [transport.take(rank, STATE) for rank in range(1, transport.size)]
    transport.send(0, STATE, own)
    transport.flush()
    return []


def share_with_all(
    transport: GroupMailbox, module: nn.Module, names: Collection[str], sources: Collection[int]
) -> None:
    """Gives every rank the parameters and buffers of ``module`` that others have.

    Args:
        transport: Connects the ranks.
        module: A module with the same names on every rank.
        names: The parameters and buffers that this rank gives.
        sources: The ranks that give.
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    others = [rank for rank in range(transport.size) if rank != transport.rank]
    if transport.rank in sources:
        own = {name: named[name].detach() for name in names if name in named}
        transport.send(others, STATE, own)
        transport.flush()
    for rank in others:
        if rank in sources:
            _assign(named, transport.take(rank, STATE))


def _assign(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            named[name].detach().copy_(value)
