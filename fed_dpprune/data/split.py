"""The test split of data sets that come without one: stratified, exact, drawn once from a public stream."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import randomness


def test_counts(sizes: NDArray[np.int64], fraction: float) -> NDArray[np.int64]:
    """How many rows of each group go to the test split, shape (groups,).

    The total is `fraction` of all rows, rounded; groups get their share rounded down and the rest goes to the largest
    remainders (ties to the lower group), so no count is off by one or more.
    """
    shares = sizes * fraction
    counts: NDArray[np.int64] = np.floor(shares).astype(np.int64)
    missing = round(float(sizes.sum()) * fraction) - int(counts.sum())
    by_remainder = np.argsort(-(shares - counts), kind="stable")
    counts[by_remainder[: max(0, missing)]] += 1
    return counts


def stratified(groups: NDArray[np.int64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of the training and of the test part, each sorted; equal on every machine.

    Args:
        groups: What to keep in proportion (labels, or label and client), shape (N,), 0..groups-1.
        fraction: Share of the rows that is held out.
        seed: The run's root seed; the stream is "test-split".
    """
    order = randomness.permutation(groups.size, seed, "test-split")
    counts = test_counts(np.bincount(groups), fraction)
    held_out = np.concatenate([order[groups[order] == group][:count] for group, count in enumerate(counts)])
    is_test = np.zeros(groups.size, dtype=np.bool_)
    is_test[held_out] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)
