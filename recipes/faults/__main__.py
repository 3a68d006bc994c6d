"""Faults on purpose, and a soak: whether every failure ends all processes with the first error, and leaves nothing.

python -m recipes.faults --seed 7 --cases 100
python -m recipes.faults --soak 20000
"""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.faults import hosts
from recipes.faults.campaign import Outcome, run
from recipes.faults.cases import FAULTS, draw


def summary(outcomes: Sequence[Outcome]) -> Table:
    """One row for each kind of fault."""
    table = Table(title=f"{len(outcomes)} cases")
    for column in (
        "the process",
        "cases",
        "all ended",
        "longest",
        "first error seen",
        "nothing left",
        "as they should",
    ):
        table.add_column(column)
    kinds: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        kinds[outcome.case.fault].append(outcome)
    for fault, says in FAULTS.items():
        of = kinds[fault]
        seconds = [outcome.seconds for outcome in of if outcome.seconds is not None]
        counts = (
            len(of),
            len(seconds),
            f"{max(seconds, default=0):.1f} s",
            sum(outcome.told for outcome in of),
            sum(not outcome.left for outcome in of),
            sum(not outcome.misses for outcome in of),
        )
        table.add_row(says, *map(str, counts))
    return table


def main(arguments: Sequence[str]) -> int:
    """Runs what is asked for; returns how many cases were not as they should be."""
    parser = ArgumentParser(prog="python -m recipes.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=7, help="of the draw of the cases")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--only", type=int, nargs="+", metavar="CASE", help="numbers of cases of this draw")
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side")
    parser.add_argument("--soak", type=int, metavar="BATCHES", help="train for so many batches instead")
    parser.add_argument("--out", type=Path, help="folder for outputs; by default those of misses are printed")
    asked = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    if asked.soak is not None:
        from recipes.faults.soak import soak

        return soak(asked.soak, console)
    cases = list(draw(asked.seed, asked.cases))
    reason = hosts.why_not()
    if reason is None:
        cases += hosts.cases(asked.cases + 1)
    else:
        console.print(f"Two hosts: skipped, as this machine does not let one make network namespaces ({reason}).")
    cases = [case for case in cases if asked.only is None or case.number in asked.only]
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(asked.jobs) as pool:
        running = [pool.submit(run, case, Path(scratch) / str(case.number)) for case in cases]
        for done in as_completed(running):
            outcome = done.result()
            outcomes.append(outcome)
            seconds = "not ended" if outcome.seconds is None else f"{outcome.seconds:5.1f} s"
            verdict = "; ".join(outcome.misses) or "as it should"
            console.print(escape(f"{outcome.case.number:4d}  {outcome.case}: {seconds}, {verdict}"), highlight=False)
            if asked.out:
                asked.out.mkdir(parents=True, exist_ok=True)
                (asked.out / f"{outcome.case.number}.txt").write_text(outcome.output)
            elif outcome.misses:
                print(outcome.output, flush=True)
    console.print(summary(outcomes))
    return sum(bool(outcome.misses) for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 125))
