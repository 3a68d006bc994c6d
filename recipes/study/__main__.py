"""The command lives here: what can be asked for, and in which order it is done.

python -m recipes.study --config recipes/study/cpu.yaml
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from recipes.study.cuts import Cut, measure
from recipes.study.figures import draw
from recipes.study.fit import Job, fit, make_data
from recipes.study.grid import OPTIMIZERS, Recipe, Run, Settings, find_recipe, read_recipe, runs
from recipes.study.methods import METHODS
from recipes.study.processes import RunError, share_out
from recipes.study.report import markdown, tables
from recipes.study.results import Results, write


def parse(arguments: Sequence[str]) -> Namespace:
    """Reads the command line; exits with a message if a value cannot be studied."""
    parser = ArgumentParser(
        prog="python -m recipes.study",
        description="Trains a recipe by several methods, in several numbers of stages, with several seeds."
        " Started again with the same settings, it goes on where it stopped.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--recipe", nargs="+", default=["resnet_cifar"], help="YAML files, or names in recipes/")
    parser.add_argument("--depth", type=int, nargs="+", default=[], help="of the network, in place of the recipe's")
    parser.add_argument("--optimizer", nargs="+", choices=list(OPTIMIZERS), default=["sgd"])
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=["backprop", "ddg"])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4], help="K; 1 is backpropagation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=300, help="the learning rate drops after 1/2 and 3/4 of them")
    parser.add_argument("--lr", type=float, help="in place of the optimizer's recipe's")
    parser.add_argument("--train_images", "--train-images", type=int, help="as many of each class; all if not given")
    parser.add_argument("--test_images", "--test-images", type=int, help="as many of each class; all if not given")
    parser.add_argument("--data", default="runs/data", help="torchvision's download, or a folder or archive of images")
    parser.add_argument("--precision", default="32-true", help="the Trainer's")
    parser.add_argument("--accelerator", default="cpu", help="the Trainer's")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, with one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for everything that is written")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="folder for the decoded images")
    options = parser.parse_args(list(arguments))
    problem = _problem(options)
    if problem:
        parser.error(problem)
    return options


def _problem(options: Namespace) -> str:
    for name in ("epochs", "jobs", "stages"):
        least = min(options[name]) if name == "stages" else options[name]
        if least < 1:
            return f"--{name} {least}: nothing would be trained; give 1 or more."
    names = [Path(name).stem for name in options.recipe]
    if len(set(names)) < len(names):
        return f"--recipe {' '.join(options.recipe)}: two have the same name, by which runs are told apart; rename one."
    if not _runs(options):
        return (
            f"--method {' '.join(options.method)} --stages {' '.join(map(str, options.stages))}: there is no such run;"
            " backprop has 1 stage, all other methods have 2 or more."
        )
    return ""


def _runs(options: Namespace) -> list[Run]:
    names = [Path(name).stem for name in options.recipe]
    found = runs(names, options.depth, options.optimizer, options.method, options.stages, options.seeds)
    return list(dict.fromkeys(found))


def read_recipes(options: Namespace) -> dict[tuple[str, str], Recipe]:
    """What each network is trained with, by :attr:`Run.network` and optimizer."""
    paths = {path.stem: path for path in map(find_recipe, options.recipe)}
    return {
        (run.network, run.optimizer): read_recipe(paths[run.recipe], run.depth, run.optimizer) for run in _runs(options)
    }


def measure_cuts(
    results: Results, settings: Settings, recipes: dict[tuple[str, str], Recipe], asked: Sequence[Run], cache: Path
) -> dict[str, dict[int, Cut]]:
    """The cuts of the study's networks; measures those that it does not have yet."""
    cuts = results.cuts()
    for (network, _), recipe in recipes.items():
        known = cuts.setdefault(network, {})
        wanted = {1, *(run.stages for run in asked if run.network == network and METHODS[run.method].kind == "ddg")}
        if wanted - known.keys():
            known |= measure(recipe, settings, sorted(wanted - known.keys()), cache)
            results.keep_cuts(cuts)
    return cuts


def count_batches(recipe: Recipe, settings: Settings, cache: Path) -> int:
    """How many batches an epoch has."""
    data = make_data(recipe, settings, cache, seed=0)
    data.setup("fit")
    return len(data.train_dataloader())


def study(options: Namespace, say: Console) -> Results:
    """Does the runs that have not been done."""
    names = {field.name for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in options.as_dict().items() if name in names})
    asked, recipes, results = _runs(options), read_recipes(options), Results(options.out)
    results.settle(settings, {" ".join(key): recipe for key, recipe in recipes.items()})
    cuts = measure_cuts(results, settings, recipes, asked, options.cache)
    batches = {network: count_batches(recipe, settings, options.cache) for (network, _), recipe in recipes.items()}

    left = [run for run in asked if not results.finished(run)]
    say.print(f"{len(asked)} runs, {len(asked) - len(left)} of them done before.", highlight=False)
    # A DNI run has parts of its own.
    cut_of = {run: cuts[run.network][run.stages] for run in left if METHODS[run.method].kind != "dni"}
    jobs = []
    for run in left:
        points = cut_of[run].split_points if run in cut_of else []
        jobs.append(Job(run, recipes[run.network, run.optimizer], settings, points, options.cache))

    # In proportion to backpropagation's time, to say how long the rest may take.
    work = {run: cuts[run.network][1].epoch_seconds(batches[run.network]) for run in left}
    start, done = time.monotonic(), 0.0
    for number, (job, rows) in enumerate(share_out(fit, jobs, options.jobs, options.out / "log.txt"), start=1):
        run = job.run
        seconds = None
        if run in cut_of:
            seconds = cut_of[run].epoch_seconds(batches[run.network], METHODS[run.method].recompute)
        results.keep(run, rows, seconds)
        results.collect()
        done += work[run]
        took = time.monotonic() - start
        minutes = took * (sum(work.values()) - done) / done / 60
        say.print(
            f"{took:6.0f} s  {number}/{len(jobs)}  {run.name}: test accuracy {rows[-1]['test_acc']:.2%};"
            f" {minutes:.0f} min left",
            highlight=False,
        )
    return results


def main(arguments: Sequence[str]) -> None:
    """Does the study, then writes and prints what all runs in its folder say."""
    options = parse(arguments)
    # It would introduce itself each time that stages are measured.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        results = study(options, Console(stderr=True, soft_wrap=True))
    except (ValueError, FileNotFoundError, RunError) as error:
        raise SystemExit(f"python -m recipes.study: {error}") from error
    rows = results.collect()
    write(results.folder / "results.md", markdown(rows))
    console.print(tables(rows))
    for path in (results.table, results.folder / "results.md", *draw(rows, results.folder)):
        console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main(sys.argv[1:])
