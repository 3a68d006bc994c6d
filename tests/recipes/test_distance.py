"""Tests of hosts that are far apart: they are real namespaces, joined by the tool's own router."""

from __future__ import annotations

import os
import subprocess

import pytest

from recipes.benchmarks import distance
from recipes.faults import hosts


def why_not() -> str | None:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no /dev/net/tun here"
    if (reason := hosts.why_not()) is not None:
        return reason
    made = subprocess.run(
        hosts.start("ip", "tuntap", "add", "dev", "ddg0", "mode", "tun"), capture_output=True, text=True, timeout=30
    )
    return made.stderr.strip() if made.returncode else None


def test_the_schedule_pays_half_a_round_trip_a_batch_with_two_stages() -> None:
    assert distance.allowed(2, 0.0) == pytest.approx(0.030)
    assert distance.allowed(2, 0.050) == pytest.approx(0.080)
    assert distance.allowed(4, 0.020) == pytest.approx(0.060)
    assert distance.allowed(2, 0.050, slack=1) == pytest.approx(0.160 / 3)
    assert distance.allowed(2, 0.050, slack=4) == pytest.approx(0.030)


@pytest.mark.slow
def test_a_message_pays_one_latency() -> None:
    if reason := why_not():
        pytest.skip(f"this machine does not let one make a link: {reason}")
    near, far = (distance.measured(2, latency, 30) for latency in (0.0, 0.1))
    # One latency a batch is 100 ms; what the receiver says first, and waits for an answer to, would be 100 ms more.
    assert 0.09 < far - near < 0.15


@pytest.mark.slow
def test_slack_hides_a_latency() -> None:
    if reason := why_not():
        pytest.skip(f"this machine does not let one make a link: {reason}")
    # Four more batches on their way in a round trip of 100 ms: without them, 80 ms a batch at least.
    assert distance.measured(2, 0.05, 45, slack=4) < 0.06


@pytest.mark.slow
def test_a_host_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.defpath)
    if reason := why_not():
        pytest.skip(f"this machine does not let one make a link: {reason}")
    with pytest.raises(RuntimeError, match="The hosts failed. Their last lines"):
        distance.measured(1, 0.0, -1)
