"""How much one example may add to the sum: clip factors and the sensitivity they declare. numpy only.

Sources: flat clipping, Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1; per-layer bounds C / sqrt(L), McMahan et al. 2018
(arXiv 1710.06963), section 3.1; automatic clipping, Bu et al. 2023 (arXiv 2206.07136), AUTO-S with stability 0.01.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.models.flat import Layout

MODES = ("flat", "per-layer", "automatic")
STABILITY = 0.01
UNIT = 2.0**-53  # the largest relative error of one float64 operation
# Examples of one batch for which `slack` is counted (it grows with their square), and how many terms of a level are added
# up before their sum joins the next.
MOST_EXAMPLES, GROUP = 1 << 20, 1 << 10


def slack(coordinates: int, tensors: int) -> float:
    """By how much of itself the clip norm may be passed, counting every rounding from stored gradients to the sum.

    Norm: squares of float32 are exact in float64, a product form rounds three times more per term; adding up m terms of one
    sign errs by (m - 1) units at most, in any order. Root, division and scaling round once each. Sum: every term carries an
    error of one unit for each addition it goes through, fewer than GROUP inside a group, than GROUP among the groups of a
    level and than MOST_EXAMPLES / GROUP among levels (groups may be as small as one example), relative to the sum of all
    clipped norms, in each of the two sums compared. See docs/privacy.md, "The bound on one example".

    Args:
        coordinates: Most live coordinates, k <= d.
        tensors: Parameter tensors.
    """
    norm = coordinates + 3 * tensors + 16
    total = 2 * MOST_EXAMPLES * (2 * GROUP + MOST_EXAMPLES // GROUP + 8)
    return (norm + total) * UNIT


@dataclass(frozen=True)
class Clipping:
    """The rule that bounds one example's contribution.

    Every mode declares the same sensitivity, so the noise on the sum has std noise_multiplier * sensitivity always.

    Attributes:
        clip_norm: C, the L2 bound on what one example adds to the sum, in gradient units, > 0.
        mode: `flat` scales the whole live gradient g by min(1, C / |g|); `per-layer` does so tensor by tensor with C / sqrt(L),
            L the number of live tensors; `automatic` scales every example by C / (|g| + 0.01), small ones up as well.

    Raises:
        ValueError: clip_norm is not a positive finite number, or the mode is unknown.
    """

    clip_norm: float
    mode: str = "flat"

    def __post_init__(self) -> None:
        """Refuse a bound that bounds nothing."""
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise ValueError(f"clip_norm {self.clip_norm} is not a positive finite number")
        if self.mode not in MODES:
            raise ValueError(f"clipping mode {self.mode!r} is not one of {MODES}")

    def sensitivity(self, layout: Layout) -> float:
        """L2 distance by which adding or removing one example moves the computed sum, at most: C (1 + slack) in every mode."""
        return self.clip_norm * (1.0 + slack(layout.d, len(layout.tensors)))

    def factors(self, squared_norms: NDArray[np.float64]) -> NDArray[np.float64]:
        """What to multiply each example's live gradient with, tensor by tensor.

        Args:
            squared_norms: Shape (L, n), float64: squared norm of example i on live tensor l.

        Returns:
            Shape (L, n), float64, finite and >= 0, rounded toward zero. An example with any squared norm that is not finite
            gets 0 everywhere: it counts as absent, because an error or a NaN would tell that it was there.
        """
        total = squared_norms.sum(axis=0)
        usable = np.isfinite(total)  # squares do not cancel: one that is not finite shows in the sum
        squared = squared_norms if usable.all() else np.where(usable, squared_norms, 0.0)
        if self.mode == "per-layer":
            bound, norm = self.clip_norm / math.sqrt(max(1, squared.shape[0])), np.sqrt(squared)
        else:
            bound, norm = self.clip_norm, np.broadcast_to(np.sqrt(squared.sum(axis=0)), squared.shape)
        inside = norm <= bound if self.mode != "automatic" else np.zeros(squared.shape, dtype=bool)
        divisor = norm + STABILITY if self.mode == "automatic" else np.maximum(norm, bound)
        factors = np.where(inside, 1.0, np.nextafter(bound / divisor, 0.0))
        return np.where(usable & (factors >= np.finfo(np.float64).tiny), factors, 0.0)
