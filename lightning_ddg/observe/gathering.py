"""How readings come to rank 0: by themselves, so that nobody waits for them, and are put together there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

from lightning_ddg.core.execution import Channel
from lightning_ddg.observe.metrics import Reading
from lightning_ddg.planning.tally import Tally

if TYPE_CHECKING:
    from lightning_ddg.comm.ranks import Ranks

FIGURES = Channel("figures", varied=True)

Window = Mapping[int, Reading]


class Gathering:
    """The readings of all stages; on rank 0, ``totals`` is what has come so far, by stage."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._windows: dict[int, dict[int, Reading]] = {}
        self.totals: dict[int, Tally] = {}

    def add(self, readings: Sequence[Reading]) -> list[Window]:
        """Send a rank's new readings to rank 0; there, add its own to those that have come.

        Returns:
            On rank 0: the readings, by stage, of each batch for which those of all stages are there now.
        """
        if not self._ranks.is_rank_zero:
            if readings:
                self._ranks.mailbox.send(0, FIGURES, [(*it[:3], *astuple(it.tally)) for it in readings])
            return []
        complete: list[Window] = []
        for reading in [*readings, *self._arrived()]:
            self.totals[reading.stage] = self.totals.get(reading.stage, Tally()) + reading.tally
            if reading.step is None:
                continue
            window = self._windows.setdefault(reading.batch, {})
            window[reading.stage] = reading
            if len(window) == self._ranks.num_stages:
                complete.append(self._windows.pop(reading.batch))
        return complete

    def rest(self) -> list[Window]:
        """Return what there is of the batches for which some stage has sent nothing."""
        windows, self._windows = self._windows, {}
        return [windows[batch] for batch in sorted(windows)]

    def _arrived(self) -> list[Reading]:
        readings, mailbox = [], self._ranks.mailbox
        for rank in self._ranks.others:
            while mailbox.has(rank, FIGURES):
                arrived = mailbox.take(rank, FIGURES)
                readings += [Reading(stage, batch, step, Tally(*sums)) for stage, batch, step, *sums in arrived]
        return readings
