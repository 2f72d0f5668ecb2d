"""bfloat16: the upper half of a float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.comm.codecs.packing import Bits, Blob, Floats, finite_float32, read_exactly

LARGEST = np.uint32(0x7F7F0000).view(np.float32)


def upper_half(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bfloat16 patterns of finite float32 values, rounded to nearest even, shape (k,)."""
    word = np.clip(values, -LARGEST, LARGEST).view(np.uint32)
    odd = (word >> np.uint32(16)) & np.uint32(1)
    half: NDArray[np.uint16] = ((word + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return half


def from_upper_half(half: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 patterns; exact, shape (k,)."""
    return (half.astype(np.uint32) << np.uint32(16)).view(np.float32)


@dataclass(frozen=True)
class Bfloat16:
    """Little-endian bfloat16, 2k bytes, no header. k = 0 is 0 bytes.

    Rounds to nearest even and saturates at the largest finite value. For Gaussian values: no bias to speak of, squared
    error about 2e-6 of the variance.
    """

    name = "bfloat16"
    bits_per_value = 16
    gaussian_gain = 1.0
    overshoot = 1.0 + 2.0**-8

    def size(self, k: int) -> int:
        """2k."""
        return 2 * k

    def encode(self, values: Floats, *, scale: float | None = None, bits: Bits | None = None) -> bytes:
        """Values of shape (k,) as 2k bytes; `scale` and `bits` have no use here."""
        return upper_half(finite_float32(values)).astype("<u2", copy=False).tobytes()

    def decode(self, blob: Blob, k: int, *, scale: float | None = None) -> NDArray[np.float32]:
        """Shape (k,). Raises WireError ("wrong-length", "non-finite")."""
        return finite_float32(from_upper_half(read_exactly(blob, self.size(k)).view("<u2").astype(np.uint16)))
