"""The free-running schedule on paper: what each stage does when, given how long its work and its messages take.

A stage waits for its activation before a forward and for its gradient before a backward, and for nothing else. Here are
numbers alone, without torch. Times are in seconds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Literal, NamedTuple

from lightning_ddg.core.schedule import delay

#: Seconds per byte between two processes of one machine over gloo, where nothing has been measured:
#: ``python -m recipes.benchmarks.link`` measures it.
SECONDS_PER_BYTE = 0.6e-9

_NO_TIME = "No stage takes any time, so that there is no period: measure the stages first."


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
    """How long the work of K stages takes, and the messages on the links between them; and how far apart they may run.

    Attributes:
        forward: Seconds of each stage's forward.
        backward: Seconds of each stage's backward and update.
        send: Seconds of each link's activations; entry i belongs to the link between stages i + 1 and i + 2.
        send_grad: Seconds of each link's gradients.
        latency: Seconds that any message is under way besides, while its link carries the next.
        slack: ``s`` of the stages' delays.
    """

    forward: list[float]
    backward: list[float]
    send: list[float]
    send_grad: list[float]
    latency: float = 0.0
    slack: int = 0

    @property
    def busy(self) -> list[float]:
        """Seconds per batch in which each stage computes."""
        return [there + back for there, back in zip(self.forward, self.backward, strict=True)]

    def recomputed(self) -> Work:
        """Return the work with forwards done again, as a part of the backward: in all stages but the last."""
        again = [*self.forward[:-1], 0.0]
        return self._replace(backward=[back + there for back, there in zip(self.backward, again, strict=True)])


@dataclass(frozen=True)
class SteadyState:
    """What a simulated schedule settles into.

    Attributes:
        period: Seconds from one batch to the next.
        busy: Of each stage, the part of the period in which it computes, in 0..1.
        first: First of the stages that set the period.
        last: Last of them; equal to ``first`` where one stage alone sets it.
        reason: What sets the period, in words.
    """

    period: float
    busy: list[float]
    first: int
    last: int
    reason: str


def simulate(work: Work, num_batches: int) -> list[Event]:
    """Run the schedule from an empty pipeline until every batch's backward has reached every stage.

    Stage ``k`` of ``K`` does the forward of batch t, then the backward of batch ``t - d(k)`` if there is one, then goes
    on to t + 1; after the last forward it does the backwards that are left. Sending takes no time of the stage's:
    a message is under way for the given seconds while its sender goes on. A link carries one message at a time in each
    direction, for the seconds of that message; the latency comes after that.

    Returns:
        The events, stage by stage, each stage's in the order of time; a wait is an event where it is longer than zero.

    Raises:
        ValueError: The lists' lengths do not fit, a time is negative or not finite, or there is no batch.
    """
    _check(work)
    if num_batches < 1:
        raise ValueError(f"num_batches={num_batches}: a schedule needs 1 batch or more.")
    num_stages = len(work.forward)
    seconds, messages = {"F": work.forward, "B": work.backward}, {"F": work.send, "B": work.send_grad}
    programs = [_program(delay(stage, num_stages, work.slack), num_batches) for stage in range(1, num_stages + 1)]
    clock = [0.0] * num_stages
    busy = {kind: [0.0] * num_stages for kind in "FB"}
    # The first stage reads its batches, and the last one's gradient is its own: neither waits for a message.
    arrival = {(kind, at, batch): 0.0 for kind, at in (("F", 0), ("B", num_stages - 1)) for batch in range(num_batches)}
    events: list[list[Event]] = [[] for _ in range(num_stages)]
    while any(programs):
        for at, program in enumerate(programs):
            while program and (program[0][0], at, program[0][1]) in arrival:
                kind, batch = program.popleft()
                start = max(clock[at], arrival.pop((kind, at, batch)))
                if start > clock[at]:
                    events[at].append(Event(at + 1, "idle", batch, clock[at], start))
                clock[at] = start + seconds[kind][at]
                events[at].append(Event(at + 1, kind, batch, start, clock[at]))
                to = at + 1 if kind == "F" else at - 1
                if 0 <= to < num_stages:
                    link = min(at, to)
                    # The link may still carry the message before.
                    busy[kind][link] = max(clock[at], busy[kind][link]) + messages[kind][link]
                    arrival[kind, to, batch] = busy[kind][link] + work.latency
    return [event for row in events for event in row]


def synchronous_period(work: Work, micro_batches: int = 1) -> float:
    """Return the seconds of a batch whose micro-batches go into an empty pipeline, and all come back before its step.

    Of a batch that is not split that is the work of all stages and all messages, one after the other.

    Args:
        work: What one micro-batch takes.
        micro_batches: How many there are, counted as alike.
    """
    return max(event.end for event in simulate(work, micro_batches))


def steady_state(work: Work) -> SteadyState:
    """Return what :func:`simulate` settles into, in closed form.

    The schedule is a marked graph, whose period is the greatest mean weight of its circuits (Reiter, Journal of the ACM
    1968). A circuit goes forward from stage l to stage m and back. A gradient is used 1 + s iterations after the next
    stage has made it, and the forward that follows it is of the next iteration, so that the circuit ends
    (m - l)(1 + s) + 1 iterations later::

        period = max over l <= m of
            (sum_{k=l..m} (f_k + b_k) + sum_{k=l..m-1} (send_k + send_grad_k + 2 latency)) / ((m - l)(1 + s) + 1)

    and a link needs the time of its message. With l = m that is ``max_k (f_k + b_k)``, which is the period wherever
    messages are short enough to hide behind work.

    Raises:
        ValueError: The lists' lengths do not fit, a time is negative or not finite, or no stage takes any time.
    """
    _check(work)
    if not any(work.busy):
        raise ValueError(_NO_TIME)
    num_stages = len(work.forward)

    def mean(first: int, last: int) -> float:
        return _round_trip(work, first, last) / ((last - first) * (1 + work.slack) + 1)

    # A single stage first: where a longer circuit is no slower, the stage is what sets the period.
    period, first = max((seconds, -stage) for stage, seconds in enumerate(work.busy, start=1))
    first, last, reason = -first, -first, f"stage {-first}"
    for low in range(1, num_stages + 1):
        for high in range(low + 1, num_stages + 1):
            # Not by rounding alone.
            if mean(low, high) > period * (1 + 1e-9):
                period, first, last = mean(low, high), low, high
                reason = f"the messages between stages {low} {'and' if high == low + 1 else 'to'} {high}"
    for what, links in (("activations", work.send), ("gradients", work.send_grad)):
        for low, longest in enumerate(links, start=1):
            if longest > period:
                period, first, last = longest, low, low + 1
                reason = f"the {what} between stages {low} and {low + 1}"
    return SteadyState(period, [seconds / period for seconds in work.busy], first, last, reason)


def slack_needed(work: Work) -> int:
    """Return the least slack with which the slowest stage, or the message that takes longest, sets the period ``P``.

    With fewer batches in flight some circuit of :func:`steady_state` is slower than that::

        s = max over l < m of  ceil(((round trip from stage l to m and back) / P - 1) / (m - l)) - 1

    For equal stages with ``f + b = P`` and short messages it is ``ceil(2 latency / P)``: a message there and one back
    are as many batches under way.

    Raises:
        ValueError: As :func:`steady_state`.
    """
    period, stages = _shortest_period(work), range(1, len(work.forward) + 1)
    # Not by rounding alone.
    apart = (
        ceil((_round_trip(work, low, high) / period - 1) / (high - low) - 1e-9)
        for low in stages
        for high in stages[low:]
    )
    return max(1, *apart, 1) - 1


def _shortest_period(work: Work) -> float:
    _check(work)
    if not any(work.busy):
        raise ValueError(_NO_TIME)
    return max(*work.busy, *work.send, *work.send_grad, 0.0)


def _round_trip(work: Work, first: int, last: int) -> float:
    """Seconds of a batch's way from a stage to another and back, if nobody is busy with other batches."""
    there_and_back = (sum(times[first - 1 : last - 1]) for times in (work.send, work.send_grad))
    return sum(work.busy[first - 1 : last]) + sum(there_and_back) + 2 * work.latency * (last - first)


def _program(lag: int, num_batches: int) -> deque[tuple[Literal["F", "B"], int]]:
    program: deque[tuple[Literal["F", "B"], int]] = deque()
    for batch in range(num_batches + lag):
        if batch < num_batches:
            program.append(("F", batch))
        if batch >= lag:
            program.append(("B", batch - lag))
    return program


def _check(work: Work) -> None:
    num_stages = len(work.forward)
    if not num_stages:
        raise ValueError("forward=[]: a schedule needs the seconds of 1 stage or more.")
    lists = {"forward": work.forward, "backward": work.backward, "send": work.send, "send_grad": work.send_grad}
    for name, values in lists.items():
        needed, what = (num_stages - 1, "link between two stages") if "send" in name else (num_stages, "stage")
        if len(values) != needed:
            raise ValueError(
                f"{name} has {len(values)} entries, but {num_stages} stages need {needed}: give one for each {what}."
            )
    for name, values in {**lists, "latency": [work.latency]}.items():
        for value in values:
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} holds {value}: a time must be finite and not negative.")
