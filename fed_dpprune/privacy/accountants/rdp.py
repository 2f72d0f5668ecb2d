"""Renyi differential privacy by dp-accounting at its default orders: looser than pld, sound under adaptive choices too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fed_dpprune.privacy.history import Entry


def load(history: Sequence[Entry], delta: float) -> float:
    """What the figure costs, of the most allowed: next to nothing, whatever the setting."""
    return 0.0


@lru_cache(maxsize=64)
def _one_step(noise_multiplier: float, sample_rate: float) -> Any:
    """(orders, divergence of one step at each order)."""
    import dp_accounting
    from absl import logging

    # Orders whose series does not converge are left out of the minimum, which is sound; a warning for each is noise.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        accountant = dp_accounting.rdp.RdpAccountant()
        accountant.compose(dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier)))
    finally:
        logging.set_verbosity(verbosity)
    return accountant.orders, accountant.rdp


def _epsilon(history: Sequence[Entry], delta: float) -> float:
    from dp_accounting.rdp import rdp_privacy_accountant

    total: Any = 0.0
    for entry in history:
        orders, one = _one_step(entry.noise_multiplier, entry.sample_rate)
        total = total + entry.steps * one
    epsilon, _ = rdp_privacy_accountant.compute_epsilon(orders, total, delta)
    return float(epsilon)


def epsilons(histories: Sequence[tuple[Entry, ...]], delta: float) -> list[float]:
    """Epsilon of each canonical history."""
    return [_epsilon(history, delta) for history in histories]
