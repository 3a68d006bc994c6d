"""Tests of ``planning/simulate.py``: the schedule against its rule, its closed form, and figures worked out by hand."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ddg.core.schedule import delay
from lightning_ddg.planning.simulate import (
    Event,
    SteadyState,
    Work,
    simulate,
    slack_needed,
    steady_state,
    synchronous_period,
)

NONE: list[float] = []


def of(events: list[Event], stage: int, *kinds: str) -> list[Event]:
    return [event for event in events if event.stage == stage and (not kinds or event.kind in kinds)]


def settled(work: Work, batches: int = 400) -> float:
    """Seconds per batch of the simulation, over the second half of its forwards of the last stage."""
    starts = [event.start for event in of(simulate(work, batches), len(work.forward), "F")]
    half = batches // 2
    return (starts[-1] - starts[-1 - half]) / half


def test_a_synchronous_batch_fills_and_empties_the_pipeline() -> None:
    work = Work([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [0.5, 0.25], [0.125, 0.0])
    assert synchronous_period(work) == sum(work.busy) + 0.875
    # GPipe's bubble: m + K - 1 forwards and backwards of equal stages one after the other.
    assert synchronous_period(Work([1.0] * 4, [2.0] * 4, [0.0] * 3, [0.0] * 3), 6) == 3 * (6 + 3)


def test_two_equal_stages_by_hand() -> None:
    events = simulate(Work([1.0, 1.0], [2.0, 2.0], [0.0], [0.0]), 3)
    assert [event[1:] for event in of(events, 1)] == [
        ("F", 0, 0.0, 1.0),
        ("F", 1, 1.0, 2.0),
        ("idle", 0, 2.0, 4.0),
        ("B", 0, 4.0, 6.0),
        ("F", 2, 6.0, 7.0),
        ("B", 1, 7.0, 9.0),
        ("idle", 2, 9.0, 10.0),
        ("B", 2, 10.0, 12.0),
    ]
    assert [event[1:] for event in of(events, 2)] == [
        ("idle", 0, 0.0, 1.0),
        ("F", 0, 1.0, 2.0),
        ("B", 0, 2.0, 4.0),
        ("F", 1, 4.0, 5.0),
        ("B", 1, 5.0, 7.0),
        ("F", 2, 7.0, 8.0),
        ("B", 2, 8.0, 10.0),
    ]


def test_one_stage_is_backpropagation() -> None:
    assert [event[1:] for event in simulate(Work([1.0], [2.0], NONE, NONE), 2)] == [
        ("F", 0, 0.0, 1.0),
        ("B", 0, 1.0, 3.0),
        ("F", 1, 3.0, 4.0),
        ("B", 1, 4.0, 6.0),
    ]
    assert steady_state(Work([1.0], [2.0], NONE, NONE)) == SteadyState(3.0, [1.0], 1, 1, "stage 1")


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_equal_stages_train_a_batch_in_the_time_of_one(num_stages: int) -> None:
    """The table of the design: f + b whatever K, where backprop takes K (f + b)."""
    work = Work([1.0] * num_stages, [2.0] * num_stages, [0.0] * (num_stages - 1), [0.0] * (num_stages - 1))
    assert steady_state(work).period == 3.0
    assert steady_state(work).busy == [1.0] * num_stages
    assert settled(work) == pytest.approx(3.0)


def test_the_slowest_stage_sets_the_period() -> None:
    got = steady_state(Work([1.0, 3.0, 1.0], [2.0, 4.0, 1.5], [0.5, 0.5], [0.5, 0.5]))
    assert (got.period, got.first, got.last, got.reason) == (7.0, 2, 2, "stage 2")
    assert got.busy == pytest.approx([3 / 7, 1.0, 2.5 / 7])
    assert sum(got.busy) == pytest.approx(12.5 / 7)


def test_a_message_that_does_not_hide() -> None:
    """K equal stages and messages of c: f + b + 2 c (K - 1) / K."""
    got = steady_state(Work([1.0] * 4, [2.0] * 4, [0.3] * 3, [0.3] * 3))
    assert got.period == pytest.approx(3 + 2 * 0.3 * 3 / 4)
    assert (got.first, got.last, got.reason) == (1, 4, "the messages between stages 1 to 4")


def test_a_link_that_is_slower_than_all_stages() -> None:
    for at, what in enumerate(("activations", "gradients")):
        links = [[0.0, 0.0], [0.0, 0.0]]
        links[at][1] = 9.0
        work = Work([1.0] * 3, [1.0] * 3, *links)
        got = steady_state(work)
        assert (got.period, got.reason) == (9.0, f"the {what} between stages 2 and 3")
        assert settled(work) == pytest.approx(9.0)


def draw(seed: int) -> Work:
    generator = random.Random(seed)
    num_stages = generator.randint(1, 6)
    longest = generator.choice([0.0, 0.2, 2.0, 10.0])
    work = [[generator.uniform(0.1, 2.0) for _ in range(num_stages)] for _ in range(2)]
    links = [[generator.uniform(0.0, longest) for _ in range(num_stages - 1)] for _ in range(2)]
    if seed % 2:
        return Work(*work, *links)
    return Work(*work, *links, latency=generator.uniform(0.0, 8.0), slack=generator.randint(0, 5))


@pytest.mark.parametrize("seed", range(80))
def test_the_closed_form_is_what_the_simulation_settles_into(seed: int) -> None:
    work = draw(seed)
    # Two circuits that are almost equally slow settle late: what is left of it falls with the number of batches.
    assert steady_state(work).period == pytest.approx(settled(work, batches=1000), rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_every_stage_follows_its_program_and_waits_for_its_messages_alone(seed: int) -> None:
    planned = draw(seed)
    forward, backward, send, send_grad, latency, slack = planned
    num_stages, batches = len(forward), 9
    events = simulate(planned, batches)
    ended = {(event.stage, event.kind, event.batch): event.end for event in events}
    for stage in range(1, num_stages + 1):
        lag = delay(stage, num_stages, slack)
        work = of(events, stage, "F", "B")
        program = [(kind, t if kind == "F" else t - lag) for t in range(batches + lag) for kind in "FB"]
        assert [(event.kind, event.batch) for event in work] == [(k, t) for k, t in program if 0 <= t < batches]
        free = 0.0
        for event in work:
            assert event.end - event.start == pytest.approx((forward if event.kind == "F" else backward)[stage - 1])
            if event.kind == "F" and stage > 1:
                arrived = ended[stage - 1, "F", event.batch] + send[stage - 2] + latency
            elif event.kind == "B" and stage < num_stages:
                arrived = ended[stage + 1, "B", event.batch] + send_grad[stage - 1] + latency
            else:
                arrived = 0.0
            assert event.start >= max(free, arrived) - 1e-9
            # Later only where the link was busy with the message before, which only a slow link is.
            if not max([0.0, *send, *send_grad]) > 0.2:
                assert event.start == pytest.approx(max(free, arrived))
            free = event.end
        row = of(events, stage)
        assert all(after.start == before.end for before, after in zip(row, row[1:], strict=False)), "no gap is unsaid"


def test_a_link_that_is_far_hides_behind_batches_in_flight() -> None:
    """Two equal stages of f + b = 30 and 50 one way: a round trip is 3.3 batches long."""
    far = Work([10.0, 10.0], [20.0, 20.0], [0.0], [0.0], latency=50.0)
    assert [steady_state(far._replace(slack=slack)).period for slack in range(6)] == pytest.approx(
        [80.0, 160 / 3, 40.0, 32.0, 30.0, 30.0]
    )
    assert slack_needed(far) == 4
    assert steady_state(far._replace(slack=4)).reason == "stage 1"
    assert settled(far._replace(slack=4)) == pytest.approx(30.0)
    # The way to all of eight stages and back is seven times as long, and as many times as many batches are on it.
    eight = Work([10.0] * 8, [20.0] * 8, [0.0] * 7, [0.0] * 7, latency=50.0)
    assert slack_needed(eight) == 4
    assert slack_needed(Work([10.0, 1.0], [20.0, 1.0], [0.0], [0.0], latency=10.0)) == 0, "hidden behind idle time"
    assert slack_needed(Work([1.0], [2.0], NONE, NONE, latency=9.0)) == 0


def test_what_a_link_carries_is_not_hidden() -> None:
    work = Work([1.0, 1.0], [1.0, 1.0], [5.0], [0.0], latency=1.0)
    needed = slack_needed(work)
    assert steady_state(work._replace(slack=needed)).period == 5.0
    assert steady_state(work._replace(slack=needed)).reason == "the activations between stages 1 and 2"


@pytest.mark.parametrize("seed", range(60))
def test_the_slack_that_is_needed_is_the_least_with_which_no_round_trip_is_seen(seed: int) -> None:
    work = draw(2 * seed)
    shortest = max([*work.busy, *work.send, *work.send_grad])
    least = slack_needed(work)
    assert steady_state(work._replace(slack=least)).period == pytest.approx(shortest, rel=1e-9)
    assert settled(work._replace(slack=least), 1000) == pytest.approx(shortest, rel=0.01)
    if least:
        assert steady_state(work._replace(slack=least - 1)).period > shortest * (1 + 1e-9)
        # As many batches as it takes until the simulation knows.
        fewer = work._replace(slack=least - 1)
        assert settled(fewer, 1000) == pytest.approx(steady_state(fewer).period, rel=0.01)


def test_micro_batches_that_are_flushed_fill_a_longer_pipeline_no_later() -> None:
    work = Work([1.0] * 3, [2.0] * 3, [0.0] * 2, [0.0] * 2)
    assert synchronous_period(work._replace(slack=1), 6) >= 3 * (6 + 2)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no stage": (
        lambda: simulate(Work([], [], [], []), 1),
        r"forward=\[\]: a schedule needs the seconds of 1 stage or more",
    ),
    "backward": (
        lambda: steady_state(Work([1.0, 1.0], [1.0], [0.0], [0.0])),
        "backward has 1 entries, but 2 stages need 2",
    ),
    "send": (
        lambda: steady_state(Work([1.0, 1.0], [1.0, 1.0], [], [0.0])),
        "send has 0 entries.*need 1: give one for each link",
    ),
    "negative": (lambda: simulate(Work([1.0, -1.0], [1.0, 1.0], [0.0], [0.0]), 1), "forward holds -1.0"),
    "nan": (
        lambda: steady_state(Work([1.0, 1.0], [1.0, 1.0], [float("nan")], [0.0])),
        "send holds nan: a time must be finite",
    ),
    "latency": (
        lambda: simulate(Work([1.0, 1.0], [1.0, 1.0], [0.0], [0.0], latency=-1.0), 1),
        "latency holds -1.0: a time must be finite and not negative",
    ),
    "no time, slack": (lambda: slack_needed(Work([0.0], [0.0], NONE, NONE)), "No stage takes any time"),
    "no batch": (
        lambda: simulate(Work([1.0], [1.0], NONE, NONE), 0),
        "num_batches=0: a schedule needs 1 batch or more",
    ),
    "no time": (
        lambda: steady_state(Work([0.0], [0.0], NONE, NONE)),
        "No stage takes any time.*measure the stages first",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_meaning_is_refused(case: str) -> None:
    function, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        function()


def test_it_needs_neither_torch_nor_lightning() -> None:
    """Loaded as a file, as its package imports Lightning."""
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('lightning_ddg'); package.__path__ = ['lightning_ddg']\n"
        "sys.modules['lightning_ddg'] = package\n"
        "import lightning_ddg.planning.simulate\n"
        "print(sorted({'torch', 'lightning', 'numpy', 'matplotlib'} & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == "[]", ended.stderr
