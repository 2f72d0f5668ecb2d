"""level3: eight Lloyd-Max levels, 3 bits a value."""

from __future__ import annotations

from dataclasses import dataclass

from fed_dpprune.comm.codecs.levels import Levels


@dataclass(frozen=True)
class Level3(Levels):
    """3-bit Lloyd-Max levels of N(0, 1) times one scale: 4 + ceil(3k/8) bytes. k = 0 is 0 bytes.

    For Gaussian values of mean zero: squared error 0.0345 of the variance; a small mean under the noise comes out times
    0.9655 (`gaussian_gain`), and an average of many such messages is as good as 0.9655 times as many unquantised ones.
    """

    name = "level3"
    bits_per_value = 3
    gaussian_gain = 0.96545224
    levels = (0.24509418, 0.75600528, 1.34390928, 2.15194570)
    thresholds = (0.50054973, 1.04995728, 1.74792749)
    overshoot = 2.1520
