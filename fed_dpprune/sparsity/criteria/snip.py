"""SNIP: connection sensitivity |g * w| (Lee et al. 2019, arXiv 1810.02340), on PUBLIC labelled data only.

One shot, before training, with g summed over all public examples; their normalisation does not change the ranking.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.sparsity.criteria.gradient import gradient
from fed_dpprune.sparsity.criteria.table import CriterionContext

NAME = "snip"
NEEDS = "public-data"
PROVENANCE = "public"


def scores(context: CriterionContext) -> NDArray[np.float64]:
    """|g * w|, shape (d,).

    Raises:
        ConfigError: There is no public data.
    """
    return np.abs(gradient(context) * context.weights.astype(np.float64))
