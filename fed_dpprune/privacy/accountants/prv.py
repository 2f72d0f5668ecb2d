"""Privacy random variables by Opacus: an independent second figure; an upper bound that includes its own error of 0.01.

Importing any part of opacus imports torch, so this module loads it only when a figure is asked for. Opacus' code fails on
some histories ("discrete mean differs", "cannot compute epsilon"); the table then falls back to RDP. It does so at a tiny
delta too, where rounding in Opacus' Fourier transforms is as large as the tail that delta measures: see `LEAST_DELTA`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from fed_dpprune.privacy import renyi
from fed_dpprune.privacy.history import Entry

# Opacus' grid grows with epsilon and with the root of the steps; at these it takes a few seconds and 400 MB.
MOST_SPREAD, MOST_STEPS = 2_000.0, 100_000
# Below, Opacus' figure is no upper bound: at 1e-14 it was 1.88 where at least 1.95 is spent. At 1e-12 it still held.
LEAST_DELTA = 1e-10


def load(history: Sequence[Entry], delta: float) -> float:
    """What the figure costs, told from bounds in milliseconds: above 1 it is not computed, nor where it would not hold."""
    if delta < LEAST_DELTA:
        return math.inf
    steps = sum(entry.steps for entry in history)
    return max(renyi.epsilon(history, delta) * math.sqrt(steps) / MOST_SPREAD, steps / MOST_STEPS)


def epsilons(histories: Sequence[tuple[Entry, ...]], delta: float) -> list[float]:
    """Epsilon of each canonical history; raises whatever Opacus raises."""
    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        figures = []
        with np.errstate(all="ignore"):
            for history in histories:
                accountant = PRVAccountant()
                accountant.history = [(entry.noise_multiplier, entry.sample_rate, entry.steps) for entry in history]
                figures.append(float(accountant.get_epsilon(delta)))
    return figures
