"""Who runs when lives here: a trial that chooses the best of each family, then rounds in which everybody takes a turn.

A disturbance of the machine falls on all contenders of a round alike, so that ratios are taken within a round. Whoever
fails is out, with the error on record, and the rest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from recipes.benchmarks.contenders import KINDS, Job, run
from recipes.benchmarks.machine import busy_s
from recipes.benchmarks.workers import Crew, WorkerError

#: The longest a contender may take for its batches of one round, in seconds.
LIMIT_S = 300.0

_TRIAL = 2

Record = dict[str, Any]
Say = Callable[[str], None]


def entries(names: Sequence[str], microbatches: Sequence[int], processes: int) -> list[Record]:
    """Lists who takes part: those of a family once with each number of micro-batches.

    Args:
        names: Of ``KINDS``.
        microbatches: The numbers to try. Torch's 1F1B takes none below the number of stages.
        processes: How many train together.
    """
    found: list[Record] = []
    for name in names:
        kind = KINDS[name]
        for count in microbatches if kind.family else [1]:
            if name != "1f1b" or count >= processes:
                named = {"name": name, "label": kind.label, "family": kind.family, "microbatches": count}
                found.append({**named, "trial": None, "rounds": [], "chosen": not kind.family, "error": None})
    return found


def measure(crew: Crew, record: Record, job: Job) -> dict[str, Any] | None:
    """Lets one contender train once.

    Returns:
        Its figures; ``None`` if it failed, which is then on record.
    """
    before, start = busy_s(), time.perf_counter()
    try:
        outcomes = crew.ask(LIMIT_S, run, record["name"], replace(job, microbatches=record["microbatches"]))
    except WorkerError as error:
        record["error"] = str(error)
        return None
    after, took = busy_s(), time.perf_counter() - start
    took_part = [outcome for outcome in outcomes if outcome is not None]
    others = None
    if before is not None and after is not None:
        others = max(0.0, after - before - sum(outcome.spent_s for outcome in took_part)) / took
    return {
        "period_s": took_part[0].period_s,
        "median_s": took_part[0].median_s,
        "cpu_s": [outcome.cpu_s for outcome in took_part],
        "others": others,
    }


def compete(crew: Crew, records: list[Record], job: Callable[[Record], Job], rounds: int, say: Say) -> None:
    """Fills in the records: first a trial of each family's members, then the rounds of those that are left.

    Args:
        crew: Who runs it.
        records: Who takes part, from :func:`entries`.
        job: What each of them is to do.
        rounds: How often each is measured.
        say: Told what is going on.
    """
    for family in dict.fromkeys(record["family"] for record in records if record["family"]):
        members = [record for record in records if record["family"] == family]
        if len(members) == 1:
            members[0]["chosen"] = True
            continue
        say(f"trial of {family}")
        for record in members:
            asked = job(record)
            record["trial"] = measure(crew, record, replace(asked, timed=min(_TRIAL, asked.timed)))
        tried = [record for record in members if record["trial"] is not None]
        if tried:
            min(tried, key=lambda record: record["trial"]["period_s"])["chosen"] = True
    for number in range(rounds):
        for record in records:
            if record["chosen"] and record["error"] is None:
                say(f"round {number + 1}, {record['label']}")
                figures = measure(crew, record, job(record))
                if figures is not None:
                    record["rounds"].append(figures)


# ---- what the figures say


def period_s(record: Record) -> float:
    """A contender's seconds a batch: the median of its rounds."""
    return median(figures["period_s"] for figures in record["rounds"])


def times_as_fast(record: Record, other: Record) -> float:
    """How many times as fast a contender is as another: the median of the ratios within the rounds of both."""
    pairs = zip(record["rounds"], other["rounds"], strict=False)
    return median(theirs["period_s"] / ours["period_s"] for ours, theirs in pairs)


def measured(records: Sequence[Record]) -> dict[str, Record]:
    """Those with figures, by their family, or by their name if they have none."""
    return {record["family"] or record["name"]: record for record in records if record["rounds"]}


def best_of_families(records: Sequence[Record]) -> Record | None:
    """The fastest of those that belong to a family: the best of torch's synchronous schedules."""
    flushing = [record for record in measured(records).values() if record["family"]]
    return min(flushing, key=period_s, default=None)
