"""What the runs of a study say together is computed here: means over seeds, differences from backpropagation.

Rows in, numbers out; nothing is drawn or printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

Row = Mapping[str, Any]

#: 97.5 % quantiles of Student's t by degrees of freedom; from ten on the last is a little too cautious.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Setup(NamedTuple):
    """What is trained: methods are compared within one of them."""

    recipe: str
    depth: int
    optimizer: str

    @property
    def title(self) -> str:
        """For people."""
        network = f"{self.recipe}, depth {self.depth}" if self.depth else self.recipe
        return f"{network}, {'SGD' if self.optimizer == 'sgd' else self.optimizer.capitalize()}"


class Contender(NamedTuple):
    """How it is trained."""

    method: str
    stages: int


Runs = dict[int, list[Row]]  # a contender's epochs by seed


def by_setup(rows: Iterable[Row]) -> dict[Setup, dict[Contender, Runs]]:
    """Sorts rows by what is trained, how, and with which seed; backpropagation comes first, then fewer stages first."""
    found: dict[Setup, dict[Contender, Runs]] = {}
    for row in sorted(rows, key=lambda row: (row["method"], row["stages"], row["seed"], row["epoch"])):
        setup = Setup(row["recipe"], row["depth"], row["optimizer"])
        contender = Contender(row["method"], row["stages"])
        found.setdefault(setup, {}).setdefault(contender, {}).setdefault(row["seed"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0].recipe, item[0].depth, item[0].optimizer != "sgd")))


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the standard deviation of a sample; of one value there is no deviation."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def curve(runs: Runs, column: str) -> list[tuple[int, float, float | None]]:
    """A column's mean and standard deviation over the seeds, epoch by epoch: ``(epoch, mean, deviation)``."""
    epochs = zip(*runs.values(), strict=True)
    return [(same[0]["epoch"], *mean_sd([row[column] for row in same])) for same in epochs]


def best(runs: Runs) -> dict[int, float]:
    """The best test accuracy of each seed, in 0..1."""
    return {seed: max(row["test_acc"] for row in rows) for seed, rows in runs.items()}


class Difference(NamedTuple):
    """How much better one contender is than another with the same seeds.

    Attributes:
        mean: Of the differences of single seeds.
        half: Half the width of the mean's 95 % confidence interval, by Student's t; ``None`` for a single seed.
    """

    mean: float
    half: float | None

    @property
    def within_noise(self) -> bool | None:
        """Whether seeds alone may explain it; ``None`` if nobody can say, with a single seed."""
        return None if self.half is None else abs(self.mean) <= self.half


def paired(
    ours: Mapping[Any, float], theirs: Mapping[Any, float], student: Sequence[float]
) -> tuple[float, float | None, int] | None:
    """Compares values with the same key, such as a seed.

    Args:
        ours: Values by key.
        theirs: The same.
        student: Quantiles of Student's t by degrees of freedom, from one on; the last stands for all after it.

    Returns:
        The mean difference, half the width of its confidence interval (``None`` for a single pair), and the number of
        pairs; ``None`` where no key is common to both.
    """
    values = [ours[key] - theirs[key] for key in ours if key in theirs]
    if not values:
        return None
    mean, deviation = mean_sd(values)
    if deviation is None:
        return mean, None, 1
    return mean, student[min(len(values) - 1, len(student)) - 1] * deviation / sqrt(len(values)), len(values)


def difference(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Difference | None:
    """Compares values with the same key, such as a seed; ``None`` where no key is common to both."""
    found = paired(ours, theirs, _STUDENT)
    return None if found is None else Difference(*found[:2])


def difference_over_all(
    setups: Mapping[Setup, Mapping[Contender, Runs]], ours: Contender, theirs: Contender
) -> Difference | None:
    """Compares two contenders over all setups: a seed counts once, by the mean of its differences in all setups.

    Runs of one seed have their images and augmentation in common, and are not independent of each other. ``None`` where
    there is no seed with which both have been run in every setup that has both.
    """
    pairs = [(best(all_[ours]), best(all_[theirs])) for all_ in setups.values() if ours in all_ and theirs in all_]
    seeds = set.intersection(*({*mine} & {*other} for mine, other in pairs)) if pairs else set()
    means = {seed: fmean(mine[seed] - other[seed] for mine, other in pairs) for seed in seeds}
    return difference(means, dict.fromkeys(means, 0.0))
