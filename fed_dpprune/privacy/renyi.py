"""Renyi divergences of the Poisson-sampled Gaussian at whole orders, in plain numpy.

Lives here: the closed form at integer orders, the conversion to epsilon, and the filter of one fixed order that the
ledger uses when a schedule may depend on earlier outputs. Does not live here: the accountants that figures are reported
with (`accountants/`); those know more orders and are tighter. This module costs a millisecond and loads nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.privacy.history import Entry

ORDERS: tuple[int, ...] = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)


@lru_cache(maxsize=64)
def _log_binomials(order: int) -> NDArray[np.float64]:
    """log C(order, i) for i = 0..order."""
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, order + 1, dtype=np.float64)))])
    logs: NDArray[np.float64] = log_factorials[-1] - log_factorials - log_factorials[::-1]
    return logs


@lru_cache(maxsize=65536)
def divergence(noise_multiplier: float, sample_rate: float, order: int) -> float:
    """Renyi divergence of one step, of whole order >= 2, for adding or removing one example.

    Mironov, Talwar and Zhang (1908.10530), section 3.3; for sample rate 1 it is order / (2 sigma^2).
    """
    if sample_rate == 1.0:
        return order / 2.0 / noise_multiplier / noise_multiplier
    index = np.arange(order + 1, dtype=np.float64)
    with np.errstate(over="ignore"):
        growth = (index * index - index) / 2.0 / noise_multiplier / noise_multiplier
    terms = _log_binomials(order) + index * math.log(sample_rate) + (order - index) * math.log1p(-sample_rate) + growth
    peak = float(terms.max())
    if not math.isfinite(peak):
        return math.inf
    return max(0.0, (peak + math.log(float(np.exp(terms - peak).sum()))) / (order - 1))


def spent(history: Iterable[Entry], order: int) -> float:
    """Sum of the divergences of all steps at one order; adds exactly, also when settings are chosen adaptively."""
    return math.fsum(entry.steps * divergence(entry.noise_multiplier, entry.sample_rate, order) for entry in history)


def conversion(order: int, delta: float) -> float:
    """What order and delta add to the divergence to make an epsilon (Canonne, Kamath and Steinke 2004.00010, prop. 12)."""
    return math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1)


def epsilon(history: Sequence[Entry], delta: float, orders: Sequence[int] = ORDERS) -> float:
    """An upper bound on epsilon by the best of whole orders; infinity when none is finite."""
    if not history:
        return 0.0
    return max(0.0, min(spent(history, order) + conversion(order, delta) for order in orders))
