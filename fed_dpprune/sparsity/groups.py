"""Granularity: which coordinates live or die together. numpy only.

`element`: each alone. `row`: a tensor's slice along its first axis (all incoming weights of one output unit or one
convolution filter; an entry of a bias alone). `channel`: one output unit of a layer over all its tensors (the row of the
weight together with its entry of the bias). `layer`: a whole tensor. Counts are exact in groups, then reported in
coordinates; a group that pruning thinned out is drawn whole with what is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.sparsity.support import Support


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.shape else 1


@lru_cache(maxsize=8)
def group_ids(layout: Layout, granularity: str) -> NDArray[np.int64]:
    """The group of every coordinate, shape (d,), numbered in order of first appearance.

    Raises:
        ValueError: Unknown granularity.
    """
    if granularity not in ("row", "channel", "layer"):
        raise ValueError(f"granularity {granularity!r} has no groups")
    parts: list[NDArray[np.int64]] = []
    started: dict[tuple[str, int], int] = {}
    groups = 0
    for tensor in layout.tensors:
        rows = 1 if granularity == "layer" else _rows(tensor)
        owner = tensor.name.rpartition(".")[0]
        first = started.get((owner, rows)) if granularity == "channel" else None
        if first is None:
            first, groups = groups, groups + rows
            started[owner, rows] = first
        parts.append(np.repeat(np.arange(first, first + rows), tensor.size // rows if rows else 0))
    ids = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
    ids.flags.writeable = False
    return ids


@dataclass(frozen=True)
class Items:
    """The coordinates of a support as the items that a choice is made among.

    Attributes:
        outer: The coordinates to choose from.
        labels: Item of each coordinate of `outer`, shape (outer.k,); None where each coordinate is its own item.
        count: Number of items.
    """

    outer: Support
    labels: NDArray[np.int64] | None
    count: int

    def by_tensor(self, layout: Layout) -> list[NDArray[np.int64]]:
        """The items of each tensor, ascending; an item that spans several belongs to that of its first coordinate."""
        if self.labels is None:
            edges = np.searchsorted(self.outer.indices, np.asarray(layout.offsets))
            return [np.arange(start, end) for start, end in pairwise(edges)]
        first = np.full(self.count, self.outer.d, dtype=np.int64)
        np.minimum.at(first, self.labels, self.outer.indices)
        owner = np.searchsorted(np.asarray(layout.offsets[1:]), first, side="right")
        return [np.flatnonzero(owner == tensor) for tensor in range(len(layout.tensors))]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Coordinates in each item, shape (count,)."""
        if self.labels is None:
            return np.ones(self.count, dtype=np.int64)
        return np.bincount(self.labels, minlength=self.count).astype(np.int64)

    def sums(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        """Sum of `values`, shape (outer.k,), over each item, shape (count,); in coordinate order, so equal everywhere."""
        if self.labels is None:
            return values
        return np.asarray(np.bincount(self.labels, weights=values, minlength=self.count), dtype=np.float64)

    def take(self, chosen: NDArray[np.int64], provenance: str) -> Support:
        """The coordinates of the chosen items."""
        if self.labels is None:
            everything = self.outer.k == self.outer.d
            return Support(chosen if everything else self.outer.indices[chosen], self.outer.d, provenance)
        wanted = np.zeros(self.count, dtype=np.bool_)
        wanted[chosen] = True
        return Support(self.outer.indices[wanted[self.labels]], self.outer.d, provenance)


def items(outer: Support, layout: Layout, granularity: str) -> Items:
    """The items of `outer` at a granularity; only groups with a coordinate in `outer` count."""
    if granularity == "element":
        return Items(outer, None, outer.k)
    ids = group_ids(layout, granularity)
    inside = ids if outer.k == outer.d else ids[outer.indices]
    present = np.bincount(inside) > 0
    number = np.cumsum(present) - 1  # groups without a coordinate here are skipped
    return Items(outer, number[inside], int(present.sum()))
