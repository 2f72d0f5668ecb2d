"""What a quantised downlink really releases: the sender applies its own decoded bytes, and may carry the error over.

Only values that are released anyway (aggregates of noised updates) go through here; the residual is a function of them
and costs no privacy. Clients keep no state: they add what they decode.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.comm.codecs.packing import Bits, Floats
from fed_dpprune.comm.codecs.table import Codec


class Downlink:
    """The server's end of a lossy downlink.

    Attributes:
        codec: Of the values.
        residual: What was meant to be sent and was not, shape (d,), float32; None without error feedback.
    """

    def __init__(self, codec: Codec, d: int, *, error_feedback: bool) -> None:
        self.codec = codec
        self.residual: NDArray[np.float32] | None = np.zeros(d, dtype=np.float32) if error_feedback else None

    def release(
        self, indices: NDArray[np.int64], change: Floats, *, bits: Bits | None = None
    ) -> tuple[bytes, NDArray[np.float32]]:
        """Encode a change on a support.

        Args:
            indices: Flat coordinates, ascending, shape (k,).
            change: The change that the server would like to make there, shape (k,).
            bits: Public raw words for stochastic rounding.

        Returns:
            (payload, applied): the bytes, and the change of shape (k,) that every receiver decodes from them. The
            server must add `applied`, never `change`.

        Raises:
            WireError: "non-finite"; the residual is then unchanged.
        """
        wanted = change.astype(np.float32, copy=False)
        if self.residual is not None:
            wanted = wanted + self.residual[indices]
        blob = self.codec.encode(wanted, bits=bits)
        applied = self.codec.decode(blob, int(indices.size))
        if self.residual is not None:
            self.residual[indices] = wanted - applied
        return blob, applied
