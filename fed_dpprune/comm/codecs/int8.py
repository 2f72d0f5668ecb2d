"""int8: 255 evenly spaced values per block."""

from __future__ import annotations

from dataclasses import dataclass

from fed_dpprune.comm.codecs.integers import Integers


@dataclass(frozen=True)
class Int8(Integers):
    """8-bit integers in two's complement, -127 to 127, with a scale per block: 2 to 16 + k bytes. k = 0 is 0 bytes.

    With step s = (largest |value| of the block) / 127: to nearest, no bias to speak of and squared error s^2/12 a value
    (about 6e-5 of the variance for 1,000 Gaussian values); stochastic, exactly unbiased and about s^2/6.
    """

    name = "int8"
    bits_per_value = 8
