"""Privacy random variables by Opacus: an independent second figure; an upper bound that includes its own error of 0.01.

Importing any part of opacus imports torch, so this module loads it only when a figure is asked for. Opacus' code fails on
some histories ("discrete mean differs", "cannot compute epsilon"); the table then falls back to RDP.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from fed_dpprune.privacy.history import Entry


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
