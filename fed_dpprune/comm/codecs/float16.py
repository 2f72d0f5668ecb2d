"""float16: IEEE half precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.comm.codecs.packing import Bits, Blob, Floats, finite_float32, read_exactly

LARGEST = np.float32(65504.0)


@dataclass(frozen=True)
class Float16:
    """Little-endian IEEE float16, 2k bytes, no header. k = 0 is 0 bytes.

    Rounds to nearest even and saturates at +-65504 (never an infinity). For Gaussian values well inside 6e-5..65504:
    no bias to speak of, squared error about 4e-8 of the variance.
    """

    name = "float16"
    bits_per_value = 16
    gaussian_gain = 1.0
    overshoot = 1.0 + 2.0**-11

    def size(self, k: int) -> int:
        """2k."""
        return 2 * k

    def encode(self, values: Floats, *, scale: float | None = None, bits: Bits | None = None) -> bytes:
        """Values of shape (k,) as 2k bytes; `scale` and `bits` have no use here."""
        return np.clip(finite_float32(values), -LARGEST, LARGEST).astype("<f2").tobytes()

    def decode(self, blob: Blob, k: int, *, scale: float | None = None) -> NDArray[np.float32]:
        """Shape (k,). Raises WireError ("wrong-length", "non-finite")."""
        return finite_float32(read_exactly(blob, self.size(k)).view("<f2").astype(np.float32))
