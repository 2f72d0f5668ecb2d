"""A support seen tensor by tensor: which positions of each tensor live. numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.support import Support


@dataclass(frozen=True, eq=False)
class LiveTensor:
    """The live part of one parameter tensor.

    Attributes:
        name: As in `named_parameters()`.
        shape: Of the whole tensor.
        positions: Sorted flat positions inside the tensor, shape (m,), int64, m >= 1.
        start: Where its m values begin in a vector on the support.
        cache: What a backend derived from it (masks, index tensors), kept as long as the support.
    """

    name: str
    shape: tuple[int, ...]
    positions: NDArray[np.int64]
    start: int
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def count(self) -> int:
        """Live coordinates, m."""
        return int(self.positions.size)

    @cached_property
    def size(self) -> int:
        """All coordinates of the tensor."""
        return math.prod(self.shape)

    @cached_property
    def stop(self) -> int:
        """Where its values end in a vector on the support."""
        return self.start + self.count

    @cached_property
    def full(self) -> bool:
        """Whether every coordinate lives."""
        return self.count == self.size

    @cached_property
    def columns(self) -> int:
        """Length of a row: the product of all dimensions but the first."""
        return self.size // self.shape[0] if self.shape else 1

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Rows (first dimension) with at least one live coordinate, sorted."""
        return np.unique(self.positions // self.columns)

    @cached_property
    def whole_rows(self) -> bool:
        """Whether each live row lives entirely: a structured support, whose frozen rows cost nothing."""
        return self.count == self.rows.size * self.columns

    @cached_property
    def row_starts(self) -> NDArray[np.int64]:
        """Compressed rows: live positions of row r are positions[row_starts[r]:row_starts[r + 1]]; shape (rows + 1,)."""
        edges = np.arange((self.shape[0] if self.shape else 1) + 1, dtype=np.int64) * self.columns
        return np.searchsorted(self.positions, edges)

    @cached_property
    def within_row(self) -> NDArray[np.int32]:
        """Place of each live position inside its row, shape (m,), int32."""
        return (self.positions % self.columns).astype(np.int32)

    @cached_property
    def row_addresses(self) -> tuple[int, int]:
        """Where `row_starts` and `within_row` lie in memory, for the compiled kernel."""
        return self.row_starts.ctypes.data, self.within_row.ctypes.data

    @cached_property
    def product(self) -> bool:
        """Whether all live rows have the same live columns: dense once rows and columns are picked."""
        per_row, left_over = divmod(self.count, self.rows.size)
        return not left_over and bool((self.within_row.reshape(-1, per_row) == self.within_row[:per_row]).all())


def live_tensors(layout: Layout, support: Support) -> tuple[LiveTensor, ...]:
    """The tensors with at least one live coordinate, in coordinate order.

    Raises:
        ValueError: The support is of another length, or touches a tensor that is frozen as a whole.
    """
    if support.d != layout.d:
        raise ValueError(f"the support is over {support.d} coordinates, the model has {layout.d}")
    edges = np.searchsorted(support.indices, np.asarray(layout.offsets))
    found = []
    for (tensor, span), start, stop in zip(layout.spans(), edges, edges[1:], strict=False):
        if start == stop:
            continue
        if tensor.frozen:
            raise ValueError(f"the support has live coordinates in {tensor.name}, which is frozen as a whole")
        found.append(LiveTensor(tensor.name, tensor.shape, support.indices[start:stop] - span.start, int(start)))
    return tuple(found)
