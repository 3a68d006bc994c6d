"""Whether two ways of training are equal is decided here: by two one-sided tests, not by a difference not being shown.

"Equal" means that the 90 % confidence interval of the mean paired difference lies inside the margin (Schuirmann, *A
comparison of the two one-sided tests procedure and the power approach*, 1987, at 5 %). The margin is fixed before the
runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.study.summary import paired

#: 95 % quantiles of Student's t by degrees of freedom; from ten on the last is a little too cautious.
_STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)


@dataclass(frozen=True)
class Pairs:
    """A mean of paired differences.

    Attributes:
        mean: Of the differences.
        half: Half the width of its 90 % confidence interval, by Student's t; ``None`` for a single pair.
        count: Pairs.
    """

    mean: float
    half: float | None
    count: int

    def verdict(self, margin: float) -> str:
        """What the interval says, in a word or two.

        Returns:
            ``"equal"`` where it lies inside the margin, ``"different"`` where it lies outside, ``"undecided"`` where it
            does both; nothing for a single pair.
        """
        if self.half is None:
            return ""
        if abs(self.mean) + self.half < margin:
            return "equal"
        return "different" if abs(self.mean) - self.half > margin else "undecided"


def compare(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Pairs | None:
    """Compares values with the same key, such as a seed; ``None`` where no key is common to both."""
    found = paired(ours, theirs, _STUDENT)
    return None if found is None else Pairs(*found)
