"""The free-running schedule on paper: what each stage does when, given how long its work and its messages take.

Numbers in, numbers out: no torch, no Lightning. A change here needs its reason in the rule that a stage waits for its
activation before a forward and for its gradient before a backward, and for nothing else.

Times are in seconds. With K stages the lists of stages have K entries and those of messages K - 1: entry i of a list of
messages belongs to the link between the stages i + 1 and i + 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from typing import Literal, NamedTuple

from lightning_ddg.core.schedule import delay

#: Seconds per byte between two processes of one machine over gloo, where nothing has been measured:
#: ``python -m recipes.benchmarks.link`` measures it.
SECONDS_PER_BYTE = 0.6e-9


class Event(NamedTuple):
    """What a stage did, or waited for, from ``start`` to ``end``.

    Attributes:
        stage: ``1..K``, input side first.
        kind: ``"F"`` for a forward, ``"B"`` for a backward, ``"idle"`` for a wait.
        batch: Whose forward or backward; of a wait, the batch that is waited for.
        start: When it began, in seconds.
        end: When it ended, in seconds.
    """

    stage: int
    kind: Literal["F", "B", "idle"]
    batch: int
    start: float
    end: float


class Work(NamedTuple):
    """How long the work of each stage and its messages take: the arguments of :func:`simulate` and :func:`predict`.

    Attributes:
        forward: Seconds of each stage's forward.
        backward: Seconds of each stage's backward and update.
        send: Seconds of each link's activations.
        send_grad: Seconds of each link's gradients.
    """

    forward: list[float]
    backward: list[float]
    send: list[float]
    send_grad: list[float]


@dataclass(frozen=True)
class Prediction:
    """The steady state of the schedule.

    Attributes:
        period: Seconds from one batch to the next.
        busy: Of each stage, the part of the period in which it computes, in 0..1.
        first: First of the stages that set the period.
        last: Last of them; equal to ``first`` where one stage alone sets it.
        reason: What sets the period, for people.
    """

    period: float
    busy: list[float]
    first: int
    last: int
    reason: str


def simulate(
    forward: Sequence[float],
    backward: Sequence[float],
    send: Sequence[float],
    send_grad: Sequence[float],
    num_batches: int,
) -> list[Event]:
    """Runs the schedule from an empty pipeline until every batch's backward has reached every stage.

    Stage ``k`` of ``K`` does the forward of batch t, then the backward of batch ``t - (K - k)`` if there is one, then
    goes on to t + 1; after the last forward it does the backwards that are left. Sending takes no time of the stage's:
    a message is under way for the given seconds while its sender goes on. A link carries one message at a time in each
    direction.

    Args:
        forward: Seconds of each stage's forward.
        backward: Seconds of each stage's backward and update.
        send: Seconds of each link's activations.
        send_grad: Seconds of each link's gradients.
        num_batches: How many batches there are.

    Returns:
        The events, stage by stage, each stage's in the order of time; a wait is an event where it is longer than zero.

    Raises:
        ValueError: If the lists' lengths do not fit, a time is negative or not finite, or there is no batch.
    """
    _check(forward, backward, send, send_grad)
    if num_batches < 1:
        raise ValueError(f"num_batches={num_batches}: a schedule needs 1 batch or more.")
    num_stages = len(forward)
    programs = [_program(delay(stage, num_stages), num_batches) for stage in range(1, num_stages + 1)]
    clock = [0.0] * num_stages
    busy = {"F": [0.0] * num_stages, "B": [0.0] * num_stages}
    arrival = {("F", 0, batch): 0.0 for batch in range(num_batches)}
    events: list[list[Event]] = [[] for _ in range(num_stages)]
    while any(programs):
        for at, program in enumerate(programs):
            while program:
                kind, batch = program[0]
                needs_message = kind == "F" or at < num_stages - 1
                if needs_message and (kind, at, batch) not in arrival:
                    break
                program.popleft()
                ready = arrival.pop((kind, at, batch)) if needs_message else clock[at]
                start = max(clock[at], ready)
                if start > clock[at]:
                    events[at].append(Event(at + 1, "idle", batch, clock[at], start))
                clock[at] = start + (forward if kind == "F" else backward)[at]
                events[at].append(Event(at + 1, kind, batch, start, clock[at]))
                to = at + 1 if kind == "F" else at - 1
                if 0 <= to < num_stages:
                    link = min(at, to)
                    # The link may still carry the message before.
                    left = max(clock[at], busy[kind][link])
                    busy[kind][link] = left + (send if kind == "F" else send_grad)[link]
                    arrival[kind, to, batch] = busy[kind][link]
    return [event for row in events for event in row]


def predict(
    forward: Sequence[float], backward: Sequence[float], send: Sequence[float], send_grad: Sequence[float]
) -> Prediction:
    """The steady state that :func:`simulate` settles into.

    The schedule is a marked graph, whose period is the greatest mean weight of its circuits (Reiter, Journal of the ACM
    1968). A circuit goes forward from stage l to stage m and back, and meets the batch m - l + 1 iterations later::

        period = max over l <= m of  (sum_{k=l..m} (f_k + b_k) + sum_{k=l..m-1} (send_k + send_grad_k)) / (m - l + 1)

    and a link needs the time of its message. With l = m that is ``max_k (f_k + b_k)``, which is the period wherever
    messages are short enough to hide behind work.

    Args:
        forward: Seconds of each stage's forward.
        backward: Seconds of each stage's backward and update.
        send: Seconds of each link's activations.
        send_grad: Seconds of each link's gradients.

    Raises:
        ValueError: If the lists' lengths do not fit, a time is negative or not finite, or no stage takes any time.
    """
    _check(forward, backward, send, send_grad)
    work = [f + b for f, b in zip(forward, backward, strict=True)]
    if not any(work):
        raise ValueError("No stage takes any time, so that there is no period: measure the stages first.")
    num_stages = len(work)
    works = [*accumulate(work, initial=0.0)]
    messages = [*accumulate((a + b for a, b in zip(send, send_grad, strict=True)), initial=0.0)]

    def mean(first: int, last: int) -> float:
        return (works[last] - works[first - 1] + messages[last - 1] - messages[first - 1]) / (last - first + 1)

    # A single stage first: where a longer circuit is no slower, the stage is what sets the period.
    period, first = max((seconds, -stage) for stage, seconds in enumerate(work, start=1))
    first, last, reason = -first, -first, f"stage {-first}"
    for low in range(1, num_stages + 1):
        for high in range(low + 1, num_stages + 1):
            # Not by rounding alone.
            if mean(low, high) > period * (1 + 1e-9):
                period, first, last = mean(low, high), low, high
                reason = f"the messages between stages {low} {'and' if high == low + 1 else 'to'} {high}"
    for what, seconds in (("activations", send), ("gradients", send_grad)):
        for low, longest in enumerate(seconds, start=1):
            if longest > period:
                period, first, last = longest, low, low + 1
                reason = f"the {what} between stages {low} and {low + 1}"
    return Prediction(period, [seconds / period for seconds in work], first, last, reason)


def _program(lag: int, num_batches: int) -> deque[tuple[Literal["F", "B"], int]]:
    program: deque[tuple[Literal["F", "B"], int]] = deque()
    for batch in range(num_batches + lag):
        if batch < num_batches:
            program.append(("F", batch))
        if batch >= lag:
            program.append(("B", batch - lag))
    return program


def _check(
    forward: Sequence[float], backward: Sequence[float], send: Sequence[float], send_grad: Sequence[float]
) -> None:
    num_stages = len(forward)
    if not num_stages:
        raise ValueError("forward=[]: a schedule needs the seconds of 1 stage or more.")
    wanted = {"backward": (backward, num_stages), "send": (send, num_stages - 1)}
    wanted["send_grad"] = (send_grad, num_stages - 1)
    for name, (values, length) in wanted.items():
        if len(values) != length:
            raise ValueError(
                f"{name} has {len(values)} entries, but {num_stages} stages need {length}: give one for each"
                f" {'stage' if name == 'backward' else 'link between two stages'}."
            )
    for name, values in (("forward", forward), *((name, values) for name, (values, _) in wanted.items())):
        for value in values:
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} holds {value}: a time must be finite and not negative.")
