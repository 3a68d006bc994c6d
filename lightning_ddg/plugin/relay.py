"""Evaluation steps that call layers in any form: each call is done where the layer lives, and all get its output.

Every process runs the user's step. Where it calls a layer of another stage, it waits for what that one's process has
computed from the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_ddg.core.execution import OUTPUT
from lightning_ddg.core.rng import Batch, Streams, untouched
from lightning_ddg.core.schedule import rank_of_stage
from lightning_ddg.network.replay.module_calls import calls_left, calls_taken, check_call, configs_of, plain_calls
from lightning_ddg.plugin.site import Site


class Relay:
    """Runs evaluation steps whose layers live in several processes.

    Args:
        site: What the run is built of.
        owners: Modules that lie in one stage, with its number; one inside another counts if it is called by itself.
        passes: Says whether calls are to be left alone at the moment.
    """

    def __init__(self, site: Site, owners: Mapping[nn.Module, int], passes: Callable[[], bool]) -> None:
        self._site, self._owners, self._passes = site, owners, passes
        self._configs = configs_of(site.module)

    @contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """Relay the calls inside."""
        streams, inside = Streams(batch), False

        def call(module: nn.Module, stage: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal inside
            if inside or self._passes():
                with calls_left(module):
                    return module(*args, **kwargs)
            check_call(module, self._configs, kwargs)
            inside = True
            streams.enter(stage)
            try:
                return self._computed(module, stage, args, kwargs)
            finally:
                inside = False
                streams.enter(0)

        handlers = {module: partial(call, module, stage) for module, stage in self._owners.items()}
        with untouched(batch.device), plain_calls(self._configs), calls_taken(handlers):
            streams.enter(0)
            yield

    def _computed(self, module: nn.Module, stage: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ranks = self._site.ranks
        if ranks.stage not in (None, stage):
            return ranks.mailbox.take(rank_of_stage(stage, self._site.num_stages), OUTPUT)
        # Without gradients everywhere, as none could come from another process.
        with calls_left(module), torch.no_grad() if ranks.others else nullcontext():
            output = nn.Module.__call__(module, *args, **kwargs)
        if ranks.others:
            # A snapshot: the step may change the output in place while it is still on its way.
            ranks.mailbox.send(ranks.others, OUTPUT, output, snapshot=True)
        return output
