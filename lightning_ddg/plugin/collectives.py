"""Collectives of ``torch.distributed`` in the user's training step: refused, as other processes would not join them.

A loss written for data parallelism reduces or gathers over the replicas of the data where ``dist.is_initialized()``.
Here there is one replica, but several processes, each of which runs another part of the step.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import distributed_c10d

from lightning_ddg.comm.ranks import is_own_group


@contextmanager
def collectives_refused() -> Iterator[None]:
    """Refuse collectives, and messages of the user's, that the calling thread starts inside.

    Each of these functions of torch first asks whether the rank is in the group. This is the one place that also those
    pass through which were imported by name before, so it is changed there.

    Raises:
        RuntimeError: Where one is called.
    """
    torch_part: Any = distributed_c10d
    inside, thread = torch_part._rank_not_in_group, threading.get_ident()

    def ask(group: Any = None) -> bool:
        if threading.get_ident() == thread and not is_own_group(group):
            name = sys._getframe(1).f_code.co_name
            # Questions such as `get_rank` ask the same, and are answered.
            if not name.startswith(("get_", "_get_", "set_")):
                raise RuntimeError(
                    f"`{name}` was called in a step, but there is one replica of the data: the processes are stages of"
                    " it. In training they run different parts of the step, so that others would never join; in an"
                    " evaluation all have the same batch, and each value would count as often as there are stages."
                    " Leave the call out, also where `torch.distributed.is_initialized()`: values in the step are those"
                    " of the whole batch."
                )
        return bool(inside(group))

    torch_part._rank_not_in_group = ask
    try:
        yield
    finally:
        torch_part._rank_not_in_group = inside
