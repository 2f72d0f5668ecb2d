"""Magnitude pruning: the largest absolute weights stay, of an initial or a pretrained net (2303.04612). numpy only.

On initial weights the ranking is that of the initialisation's scale: with fan-in scaling a global budget empties the
widest layers first. Use `scope = "layer"` there, or pretrained weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.sparsity.criteria.table import CriterionContext

NAME = "magnitude"
NEEDS = "weights"
PROVENANCE = "data-free"


def scores(context: CriterionContext) -> NDArray[np.float64]:
    """|w|, shape (d,)."""
    return np.abs(context.weights.astype(np.float64))
