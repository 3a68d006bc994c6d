"""Collectives of ``torch.distributed`` in the user's training step: refused, as other processes would not join them.

A loss written for data parallelism reduces or gathers over the replicas of the data where ``dist.is_initialized()``.
Here there are several processes to a replica, each of which runs another part of the step. What Lightning's own methods
reduce and gather is reduced and gathered over the replicas.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from lightning_ddg.comm.ranks import is_own_group
from lightning_ddg.comm.replicas import Replicas

# What torch's functions call before they communicate: whether the rank is in the group, how a new group is called, and
# which group a functional collective means. Also those that were imported by name before come here.
_RESOLVE = "_resolve_group" if hasattr(functional, "_resolve_group") else "_resolve_group_name"
_ASKED: Any = (
    (distributed_c10d, "_rank_not_in_group"),
    (distributed_c10d, "_process_group_name"),
    (functional, _RESOLVE),
)

# Whether this thread is where they are refused.
_here = threading.local()


@contextmanager
def collectives_refused(replicas: int = 1) -> Iterator[None]:
    """Refuse collectives, messages and new groups of the user's, that the calling thread starts inside.

    Methods of a process group and torch's operators themselves, of which its functions are made, are not noticed.

    Args:
        replicas: How many there are of the data, for the message.

    Raises:
        RuntimeError: Where one is called.
    """
    before = [getattr(module, name) for module, name in _ASKED]
    outer, _here.refused = getattr(_here, "refused", 0), replicas
    for (module, name), inside in zip(_ASKED, before, strict=True):
        setattr(module, name, partial(_ask, inside, threading.get_ident()))
    try:
        yield
    finally:
        _here.refused = outer
        for (module, name), inside in zip(_ASKED, before, strict=True):
            setattr(module, name, inside)


def check_outside_step(name: str) -> None:
    """Refuse a method of the strategy's for which all ranks have to meet, where collectives are refused.

    Raises:
        RuntimeError: Naming it.
    """
    if getattr(_here, "refused", 0):
        raise _refusal(name)


_OPERATIONS = {"avg": "mean"} | {name: name for name in ("sum", "mean", "min", "max", "product")}


def reduced(replicas: Replicas, value: Any, operation: Any) -> Any:
    """Return the sum, mean, minimum, maximum or product of a tensor, or a number, over the replicas.

    Raises:
        ValueError: For another operation.
    """
    name = "sum" if operation is None else str(operation).rpartition(".")[2].lower()
    if name not in _OPERATIONS:
        raise ValueError(
            f"reduce_op={operation!r} is not known to {replicas.size} replicas of the data. Use one of"
            f" {', '.join(map(repr, _OPERATIONS))}."
        )
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    return replicas.reduce(tensor, _OPERATIONS[name])


def gathered(replicas: Replicas, tensor: Tensor, sync_grads: bool) -> Tensor:
    """Return the tensors of all replicas, stacked.

    Raises:
        ValueError: With gradients through it.
    """
    if sync_grads:
        raise ValueError(
            f"all_gather(sync_grads=True) lets gradients go from one of {replicas.size} replicas to another, which"
            " DDGStrategy does not do. Use sync_grads=False, with the own part put in again, or one pipeline"
            " (devices=num_stages), whose last stage has the whole batch."
        )
    return torch.stack(replicas.gather(tensor))


def _refusal(name: str) -> RuntimeError:
    if _here.refused > 1:
        return RuntimeError(
            f"`{name}` was called in a step, but the processes are the stages of {_here.refused} replicas of the data,"
            " and run different parts of the step, so that others would never join. Use `self.all_gather`,"
            " `self.log(..., sync_dist=True)` or a torchmetrics object: these go over the replicas."
        )
    return RuntimeError(
        f"`{name}` was called in a step, but there is one replica of the data: the processes are stages of it. In"
        " training they run different parts of the step, so that others would never join; in an evaluation all have"
        " the same batch, and each value would count as often as there are stages. Leave the call out, also where"
        " `torch.distributed.is_initialized()`: values in the step are those of the whole batch."
    )


def _ask(inside: Callable[..., Any], thread: int, group: Any = None, *args: Any, **kwargs: Any) -> Any:
    own = isinstance(group, ProcessGroup) and is_own_group(group)
    if threading.get_ident() == thread and not own:
        name = _caller()
        # Questions such as `get_rank` ask the same, and are answered.
        if not name.startswith(("get_", "_get_", "set_")):
            raise _refusal(name)
    return inside(group, *args, **kwargs)


def _caller() -> str:
    """The function of torch that the user has called, or another part of torch has."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in ("_new_group_with_tag", "_resolve_group_name") and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name
