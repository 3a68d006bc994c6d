"""Validation, test and predict steps, run in stages with today's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any

from torch import Tensor, nn

from lightning_ddg.core.execution import Execution
from lightning_ddg.network.cut import Cut
from lightning_ddg.plugin.data import share_generators
from lightning_ddg.plugin.ownership import Ownership
from lightning_ddg.plugin.redirection import Redirection
from lightning_ddg.plugin.relay import Relay
from lightning_ddg.plugin.site import Site


class Outside(Enum):
    """Whether all ranks have the weights outside the network as the last stage's process trains them."""

    SHARED = "shared"
    TRAINED = "trained"


class Evaluation:
    """Runs evaluation steps.

    Modules outside the network train on the last stage's process, and every rank evaluates with its weights. These are
    given to all when a validation starts, and once more before its first batch: a callback may have exchanged them, for
    their average, in between.
    """

    def __init__(
        self,
        site: Site,
        cut: Cut,
        execution: Execution,
        redirection: Redirection,
        ownership: Ownership,
        alone: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._site, self._execution, self._alone = site, execution, alone
        self._relay = Relay(site, cut.owners, lambda: redirection.answers)
        self._in_stages = cut.chain.evaluates
        self._redirection, self._ownership = redirection, ownership
        self._outside = Outside.SHARED

    def share_outside(self, wanted: Callable[[Tensor], bool]) -> None:
        """Give all ranks rank 0's parameters and buffers outside the network, those that are wanted."""
        if not self._site.ranks.others:
            return
        # Rank 0 may have names that others do not know yet.
        self._site.ranks.share(self._site.module, self._ownership.names_outside(wanted), [0])
        between = self._ownership.names_between
        if between:
            own = set(self._ownership.own_names).intersection(between)
            self._site.ranks.share(self._site.module, own, range(self._site.ranks.size))

    def begin(self) -> None:
        """Called when a validation starts; every rank must."""
        self.share_outside(_trained_or_buffer)
        self._outside = Outside.TRAINED
        # A callback may exchange the weights for the validation.
        self._execution.before_step()

    def end(self) -> None:
        """Called when an evaluation has ended; every rank must."""
        if not self._site.fits:
            share_generators(self._site.ranks)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Answer the network's calls inside, which may be several: for the sake of random draws, each is a batch."""
        if self._outside is Outside.TRAINED:
            self.share_outside(_trained_or_buffer)
            self._outside = Outside.SHARED
        answered = self._redirection.handled_by(self._answer) if self._in_stages else nullcontext()
        with self._alone(), self._relay.step(self._site.evaluated_batch()), answered:
            yield

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._execution.evaluate(self._site.evaluated_batch(), args, kwargs)


def _trained_or_buffer(tensor: Tensor) -> bool:
    return tensor.requires_grad or not isinstance(tensor, nn.Parameter)
