"""sign: one bit a value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.comm.codecs.levels import Levels


@dataclass(frozen=True)
class Sign(Levels):
    """The sign of each value (zero counts as positive) times one scale: 4 + ceil(k/8) bytes. k = 0 is 0 bytes.

    The scale is the mean of |value|. For Gaussian values of mean zero: squared error 1 - 2/pi = 0.363 of the variance; a
    small mean under the noise comes out times 2/pi = 0.637 (`gaussian_gain`), and an average of many such messages is as
    good as 2/pi times as many unquantised ones. The noise is the dither: where a mean exceeds its noise, the sign saturates.
    """

    name = "sign"
    bits_per_value = 1
    gaussian_gain = 2 / math.pi
    levels = (1.0,)
    thresholds = ()
    overshoot = 1.0 + 2.0**-22  # the mean of equal values may round up

    def own_scale(self, data: NDArray[np.float32]) -> float:
        """Mean of |value|, summed in float64."""
        return float(np.abs(data).mean(dtype=np.float64))
