"""The command lives here: what can be asked for, and in which order it is run.

python -m recipes.benchmarks --json results.json --pictures pictures
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recipes.benchmarks import machine
from recipes.benchmarks.contenders import KINDS
from recipes.benchmarks.cost import run_cost
from recipes.benchmarks.devices import SAMPLES, Times
from recipes.benchmarks.parts import (
    MICROBATCHES,
    ON_CPU,
    ON_DEVICES,
    Plan,
    backend_for,
    on_cuda,
    run_devices,
    run_work,
)
from recipes.benchmarks.pictures import draw
from recipes.benchmarks.report import tables
from recipes.benchmarks.workers import Crew
from recipes.benchmarks.works import WORKS

PARTS = ("work", "devices", "cost")
QUICK = Plan(rounds=1, timed=3, timed_devices=8, repeats=1)
FULL = Plan(rounds=3, timed=5, timed_devices=20, repeats=5)
QUICK_WORKS, QUICK_STAGES, QUICK_MICROBATCHES = ["lstm", "mlp"], [2, 4], (4,)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; exits with argparse's message if a value cannot be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmarks",
        description="Times this package beside what one would use instead, on this machine.",
    )
    parser.add_argument("--quick", action="store_true", help="a trial that everything runs, not a figure")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    parser.add_argument("--pictures", type=Path, help="folder to draw the charts into")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=[*PARTS, *WORKS, *KINDS],
        default=[],
        help=f"parts ({', '.join(PARTS)}), works ({', '.join(WORKS)}), which ask for the part work, or contenders"
        f" ({', '.join(KINDS)}), which restrict the parts that know them",
    )
    parser.add_argument("--rounds", type=int, help=f"rounds of each part; {FULL.rounds} if not --quick")
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu", help="what the works are trained on")
    parser.add_argument("--processes", type=int, default=2, help="that train a work; the cores are shared among them")
    parser.add_argument("--stages", type=int, nargs="+", help="numbers of emulated devices; 2 4 8 16 if not --quick")
    parser.add_argument("--forward-ms", type=float, default=20.0, help="F, of a whole batch on an emulated device")
    parser.add_argument("--backward-ms", type=float, default=40.0, help="B, likewise")
    parser.add_argument("--message-ms", type=float, default=0.0, help="what a message takes between two of them")
    options = parser.parse_args(arguments)
    if options.stages is None:
        options.stages = QUICK_STAGES if options.quick else [2, 4, 8, 16]
    problem = _problem(options)
    if problem:
        parser.error(problem)
    return options


def _problem(options: argparse.Namespace) -> str:
    if options.rounds is not None and options.rounds < 1:
        return f"--rounds {options.rounds}: nothing would be measured; give 1 or more."
    if options.processes < 2:
        return f"--processes {options.processes}: there is no pipeline in one process; give 2 or more."
    if min(options.stages) < 2:
        return f"--stages {min(options.stages)}: there is no schedule on one stage; give 2 or more."
    if max(options.stages) > SAMPLES:
        return (
            f"--stages {max(options.stages)}: torch's Schedule1F1B needs as many micro-batches as stages, and the batch"
            f" has {SAMPLES} samples; give {SAMPLES} or less."
        )
    if options.forward_ms <= 0 or options.backward_ms <= 0:
        return f"--forward-ms {options.forward_ms:g} --backward-ms {options.backward_ms:g}: both must be above 0."
    if options.message_ms < 0:
        return f"--message-ms {options.message_ms:g}: a message cannot arrive before it is sent; give 0 or more."
    if options.accelerator == "cuda" and not torch.cuda.is_available():
        return "--accelerator cuda: torch finds no GPU here; leave it out, or install torch with CUDA."
    try:
        chosen(options)
    except ValueError as error:
        return str(error)
    return ""


def chosen(options: argparse.Namespace) -> dict[str, list[str]]:
    """What ``--only`` asks for: ``"parts"``, ``"works"``, ``"contenders"`` of the works and of the ``"devices"``.

    A part asks for itself, a work for the part ``work`` with that work. A contender restricts the chosen parts that
    know it; where only contenders are named, the parts that know one of them are chosen.

    Raises:
        ValueError: A named contender is known to no chosen part.
    """
    named = dict.fromkeys(options.only)
    works = [name for name in named if name in WORKS]
    contenders = [name for name in named if name in KINDS]
    shared = options.accelerator == "cuda" and torch.cuda.device_count() < options.processes
    known: dict[str, list[str]] = {"work": on_cuda(shared), "devices": ON_DEVICES, "cost": []}
    parts = [part for part in PARTS if part in named or (part == "work" and works)]
    if not parts:
        parts = [part for part in PARTS if not contenders or {*contenders} & {*known[part]}]
    asked = {part: [name for name in contenders if name in known[part]] for part in parts}
    for name in contenders:
        if not any(name in names for names in asked.values()):
            others = [part for part in PARTS if name in known[part]]
            who = f"{', '.join(parts)} does not run it here" if parts else "no part runs it here"
            remedy = f"add {' or '.join(others)}, or leave it out" if others else "leave it out"
            raise ValueError(f"--only {name}: {who}; {remedy}.")
    everybody = known["work"] if options.accelerator == "cuda" else ON_CPU
    return {
        "parts": parts,
        "works": works or (QUICK_WORKS if options.quick else list(WORKS)),
        "contenders": asked.get("work") or everybody,
        "devices": [name for name in ON_DEVICES if name in asked.get("devices", [])] or ON_DEVICES,
    }


def measure(options: argparse.Namespace, report: dict[str, Any], console: Console) -> None:
    """Runs what was asked for, and adds it to the report piece by piece."""
    plan = QUICK if options.quick else FULL
    if options.rounds is not None:
        plan = Plan(options.rounds, plan.timed, plan.timed_devices, plan.repeats)
    ask, start = chosen(options), time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - start:6.0f} s  {text}", highlight=False)

    if "work" in ask["parts"]:
        with Crew(options.processes, backend_for(options.accelerator, options.processes)) as crew:
            counts = QUICK_MICROBATCHES if options.quick else MICROBATCHES
            for name in ask["works"]:
                work = run_work(WORKS[name], ask["contenders"], plan, crew, options.accelerator, say, counts)
                report["works"].append(work)
    if "devices" in ask["parts"]:
        times = Times(options.forward_ms, options.backward_ms, options.message_ms)
        for stages in options.stages:
            report["devices"].append(run_devices(stages, times, ask["devices"], plan, say))
    if "cost" in ask["parts"]:
        report["cost"] = run_cost(options.quick, say)
    report["machine"]["seconds"] = time.monotonic() - start


def others(report: dict[str, Any]) -> list[float]:
    """The cores that others kept busy, of each measurement for which they are known."""
    records = [record for part in (*report["works"], *report["devices"]) for record in part["contenders"]]
    figures = [figures for record in records for figures in record["rounds"]]
    return [one["others"] for one in figures if one["others"] is not None]


def main(arguments: Sequence[str]) -> None:
    """Runs the suite, writes the results, prints the tables."""
    options = parse(arguments)
    progress = Console(stderr=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report: dict[str, Any] = {"settings": settings, "works": [], "devices": [], "cost": None}
    report["machine"] = machine.describe(options.accelerator)
    if options.json:
        # Before anything is measured: a path that cannot be written to shall not cost a run.
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.touch()
    try:
        measure(options, report, progress)
    finally:
        report["machine"]["warnings"] = machine.warnings(report["machine"], others(report))
        # As it will be read again: numbers that name something become text.
        report = json.loads(json.dumps(report))
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(tables(report))
    where = "CPU {cpu}, {cores} cores, load {load:.1f}; Python {python}, torch {torch}, lightning {lightning}; {date}"
    console.print(where.format(**report["machine"]), highlight=False)
    for warning in report["machine"]["warnings"]:
        console.print(f"Doubtful: {warning}", style="red", highlight=False)
    if options.pictures:
        for path in draw(report, options.pictures):
            console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
