"""What has been measured of a stage over some batches of a fit: sums, and the means that follow from them."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Tally:
    """Sums over some batches of one stage; tallies can be added up.

    Attributes:
        batches: The batches whose time was measured.
        seconds: Their time.
        activations: The seconds of it that passed in waiting for activations, or for the batch itself.
        gradients: The seconds of it that passed in waiting for gradients.
        due: The batches in which a gradient was applied.
        delay: Their delays, in batches.
        updates: Their delays, in updates of the stage's weights.
        norms: How often the staleness was measured.
        staleness: The ``||w_t - w_{t-d}|| / ||w_t||``.
        angles: How often gradients were compared.
        cosine: The cosines between the gradient that was applied and the batch's own.
    """

    batches: float = 0.0
    seconds: float = 0.0
    activations: float = 0.0
    gradients: float = 0.0
    due: float = 0.0
    delay: float = 0.0
    updates: float = 0.0
    norms: float = 0.0
    staleness: float = 0.0
    angles: float = 0.0
    cosine: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def waiting(self) -> float:
        """The share of the time that passed in waiting, in 0..1."""
        return (self.activations + self.gradients) / self.seconds if self.seconds else 0.0

    @property
    def busy(self) -> float:
        """Seconds per batch in which the stage did not wait."""
        return (self.seconds - self.activations - self.gradients) / self.batches if self.batches else 0.0

    def figures(self, waits: bool) -> dict[str, float]:
        """Return the means, by name; what was not measured is missing, and without ``waits`` the waiting too."""
        time = self.seconds if waits else 0.0
        sums = {
            "waits_activations": (self.activations, time),
            "waits_gradients": (self.gradients, time),
            "delay": (self.delay, self.due),
            "delay_updates": (self.updates, self.due),
            "staleness": (self.staleness, self.norms),
            "cosine": (self.cosine, self.angles),
        }
        return {name: value / count for name, (value, count) in sums.items() if count}
