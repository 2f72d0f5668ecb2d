"""float32: the values themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.comm.codecs.packing import Bits, Blob, Floats, finite_float32, read_exactly


@dataclass(frozen=True)
class Float32:
    """Little-endian float32, 4k bytes, no header. Exact: no bias, no error. k = 0 is 0 bytes."""

    name = "float32"
    bits_per_value = 32
    gaussian_gain = 1.0
    overshoot = 1.0

    def size(self, k: int) -> int:
        """4k."""
        return 4 * k

    def encode(self, values: Floats, *, scale: float | None = None, bits: Bits | None = None) -> bytes:
        """Values of shape (k,) as 4k bytes; `scale` and `bits` have no use here."""
        return finite_float32(values).astype("<f4", copy=False).tobytes()

    def decode(self, blob: Blob, k: int, *, scale: float | None = None) -> NDArray[np.float32]:
        """Shape (k,). Raises WireError ("wrong-length", "non-finite")."""
        return finite_float32(read_exactly(blob, self.size(k)).view("<f4").astype(np.float32))
