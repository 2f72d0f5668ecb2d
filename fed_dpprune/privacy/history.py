"""What a client has spent, as entries (noise multiplier, sample rate, steps) of the Poisson-sampled Gaussian mechanism."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """`steps` private steps with one setting; the unit of all accounting.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, divided by the clip norm; above 0.
        sample_rate: Chance of each example to be in a step's batch, independently; above 0, at most 1.
        steps: Number of steps, at least 1.

    Raises:
        ValueError: A number outside its range, or not a number at all.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(f"noise multiplier must be above 0, not {self.noise_multiplier!r}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample rate must be above 0 and at most 1, not {self.sample_rate!r}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, not {self.steps!r}")


def merge(history: Iterable[Entry]) -> tuple[Entry, ...]:
    """The one canonical form of a history: equal settings added up, sorted by (sample rate, noise multiplier).

    Composition does not depend on order, so histories of one canonical form have one epsilon, to the last bit.
    """
    steps: dict[tuple[float, float], int] = {}
    for entry in history:
        setting = (float(entry.sample_rate), float(entry.noise_multiplier))
        steps[setting] = steps.get(setting, 0) + entry.steps
    return tuple(Entry(noise, rate, steps[(rate, noise)]) for rate, noise in sorted(steps))


def as_one(history: Iterable[Entry], examples: int) -> tuple[Entry, ...]:
    """A history that is no better for one example than the given one is for a person with `examples` of them.

    At least one of them is drawn with probability 1 - (1 - q)^k; the sum then moves by at most k clip norms.
    """
    return tuple(
        Entry(
            entry.noise_multiplier / examples,
            -math.expm1(examples * math.log1p(-entry.sample_rate)) if entry.sample_rate < 1 else 1.0,
            entry.steps,
        )
        for entry in history
    )
