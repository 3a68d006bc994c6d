"""Tests of ``planning/tally.py``."""

from __future__ import annotations

from lightning_ddg.planning.tally import Tally


def test_tallies_add_up_to_means() -> None:
    first = Tally(batches=2, seconds=4.0, activations=1.0, due=2, delay=4, updates=2, norms=1, staleness=0.25)
    both = first + Tally(batches=2, seconds=4.0, gradients=1.0, due=2, delay=4, updates=4)
    assert both.waiting == 0.25
    assert both.busy == 1.5
    ages = {"delay": 2.0, "delay_updates": 1.5, "staleness": 0.25}
    assert both.figures(waits=True) == {"waits_activations": 0.125, "waits_gradients": 0.125, **ages}
    assert both.figures(waits=False) == ages
    assert Tally().figures(waits=True) == {}
    assert (Tally().waiting, Tally().busy) == (0.0, 0.0)
