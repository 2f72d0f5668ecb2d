"""Supports that make a study honest: what would chance have done with the same size, or the same size per layer?

A criterion earns its name only by beating these two. A study runs them through `sparsity.prune.method = "file"`.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.support import Support, draw_positions, from_mask


def _split(support: Support, movable: NDArray[np.bool_] | None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Positions that may be shuffled, and the mask of what lives outside them and stays."""
    free = np.ones(support.d, dtype=np.bool_) if movable is None else movable
    if free.shape != (support.d,):
        raise ValueError(f"movable must have shape ({support.d},)")
    return np.flatnonzero(free), support.mask & ~free


def size_matched(support: Support, seed: int, movable: NDArray[np.bool_] | None = None) -> Support:
    """A uniform support of the same size.

    Args:
        support: The one to imitate.
        seed: The run's public seed.
        movable: Shape (d,), True where it may differ (`prune.prunable`); what lives elsewhere stays. None: everywhere.
    """
    positions, mask = _split(support, movable)
    chosen = draw_positions(positions.size, int(support.mask[positions].sum()), seed, "control", "size-matched")
    mask[positions[chosen]] = True
    return from_mask(mask, "random")


def layer_shuffled(support: Support, layout: Layout, seed: int, movable: NDArray[np.bool_] | None = None) -> Support:
    """A support with the same count in every tensor, at uniform places inside it; arguments as `size_matched`.

    Its provenance stays that of the support: the counts were learnt from whatever chose it.
    """
    positions, mask = _split(support, movable)
    edges = np.searchsorted(positions, np.asarray(layout.offsets))
    for tensor, (start, end) in enumerate(pairwise(edges)):
        places = positions[start:end]
        keep = int(support.mask[places].sum())
        mask[places[draw_positions(places.size, keep, seed, "control", "layer-shuffled", tensor)]] = True
    return from_mask(mask, support.provenance)
