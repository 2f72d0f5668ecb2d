"""Levels made for a Gaussian (Lloyd 1982, Max 1960) times one scale; level3.py and level2.py hold the constants.

Layout: the scale (float32, little-endian; left out when public), then the codes: bit b-1 is the sign (1 = negative),
the lower bits number the level from the one nearest zero. The scale is the root mean square of the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.comm.codecs.packing import (
    LARGEST_SCALE,
    Bits,
    Blob,
    Floats,
    as_scale,
    finite_float32,
    missing_scale,
    pack_codes,
    packed_bytes,
    read_exactly,
    read_scale,
    unpack_codes,
    write_scale,
)

SCALE_BYTES = 4


@dataclass(frozen=True)
class Levels:
    """The common part of level3, level2.

    Attributes:
        public_scale: True when no scale is sent and both ends are given the public one (the standard deviation that
            the terms imply).
    """

    public_scale: bool = False

    name: ClassVar[str] = "levels"
    bits_per_value: ClassVar[int] = 1
    gaussian_gain: ClassVar[float] = 1.0
    overshoot: ClassVar[float] = 1.0
    levels: ClassVar[tuple[float, ...]] = ()
    thresholds: ClassVar[tuple[float, ...]] = ()

    def header(self, k: int) -> int:
        """Bytes of the scale."""
        return SCALE_BYTES if k and not self.public_scale else 0

    def size(self, k: int) -> int:
        """Header and ceil(k * bits / 8); 0 for k = 0."""
        return self.header(k) + packed_bytes(k, self.bits_per_value)

    def encode(self, values: Floats, *, scale: float | None = None, bits: Bits | None = None) -> bytes:
        """Values of shape (k,) as `size(k)` bytes; `bits` has no use here.

        Args:
            values: Finite.
            scale: The public scale; needed with `public_scale`, else it replaces the one taken from the values.
            bits: Not used.

        Raises:
            WireError: "non-finite".
            ValueError: No scale although none is sent.
        """
        data = finite_float32(values)
        if self.public_scale and scale is None:
            raise missing_scale(self.name)
        if not data.size:
            return b""
        unit = as_scale(min(self.own_scale(data), LARGEST_SCALE) if scale is None else scale)
        codes = (data < 0).astype(np.uint8) << np.uint8(self.bits_per_value - 1)
        if self.thresholds:
            size = np.abs(data)
            for threshold in self.thresholds:
                codes += size > np.float32(threshold) * unit
        header = b"" if self.public_scale else write_scale(unit)
        return header + pack_codes(codes, self.bits_per_value)

    def decode(self, blob: Blob, k: int, *, scale: float | None = None) -> NDArray[np.float32]:
        """Shape (k,). Raises WireError ("wrong-length", "header", "padding")."""
        if self.public_scale and scale is None:
            raise missing_scale(self.name)
        raw = read_exactly(blob, self.size(k))
        if not k:
            return np.zeros(0, dtype=np.float32)
        start = self.header(k)
        unit = as_scale(scale or 0.0) if self.public_scale else read_scale(raw[:start], scale)
        positive = np.array(self.levels, dtype=np.float32) * unit
        table = np.concatenate([positive, -positive])
        return table[unpack_codes(raw[start:], k, self.bits_per_value)]

    def own_scale(self, data: NDArray[np.float32]) -> float:
        """Root mean square, summed in float64."""
        return float(np.sqrt(np.square(data, dtype=np.float64).mean()))
