"""Random pruning: a uniform subset (the control of every other criterion; 2303.04612, 2306.11754). numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import randomness
from fed_dpprune.sparsity.criteria.table import CriterionContext

NAME = "random"
NEEDS = "nothing"
PROVENANCE = "random"


def scores(context: CriterionContext) -> NDArray[np.float64]:
    """Uniform scores on 53 raw bits, shape (d,); equal on every machine, so this support need not travel."""
    words = randomness.raw_u64(context.layout.d, context.seed, "support", "prune")
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
