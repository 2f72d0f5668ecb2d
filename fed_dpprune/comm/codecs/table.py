"""The codecs by name, and what a codec is.

Everything a codec sees is already noised and released, so any of them is post-processing: no choice made here changes an
epsilon. Which coordinates the values belong to is known to both ends and is never part of a payload.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.comm.codecs.bfloat16 import Bfloat16
from fed_dpprune.comm.codecs.float16 import Float16
from fed_dpprune.comm.codecs.float32 import Float32
from fed_dpprune.comm.codecs.int4 import Int4
from fed_dpprune.comm.codecs.int8 import Int8
from fed_dpprune.comm.codecs.integers import Integers
from fed_dpprune.comm.codecs.level2 import Level2
from fed_dpprune.comm.codecs.level3 import Level3
from fed_dpprune.comm.codecs.levels import Levels
from fed_dpprune.comm.codecs.packing import Bits, Blob, Floats
from fed_dpprune.comm.codecs.sign import Sign
from fed_dpprune.errors import ConfigError


class Codec(Protocol):
    """k values to bytes and back; frozen and without state.

    `len(encode(values)) == size(k)` always; `decode(encode(values), k)` is the same float32 array on every machine.
    """

    @property
    def name(self) -> str:
        """The name in `wire.uplink` and `wire.downlink`."""

    @property
    def bits_per_value(self) -> int:
        """Bits of one value, the header left out."""

    @property
    def gaussian_gain(self) -> float:
        """What a small mean under Gaussian noise is multiplied by on average; 1 = unbiased. A server may divide by it."""

    @property
    def overshoot(self) -> float:
        """Upper bound of (largest decoded |value|) / (largest |value| given), when the codec takes its scale from the values."""

    def size(self, k: int) -> int:
        """Payload bytes of k values, header included; needs no data. 0 for k = 0."""

    def encode(self, values: Floats, *, scale: float | None = None, bits: Bits | None = None) -> bytes:
        """Values of shape (k,), float32 or float64, as `size(k)` bytes.

        Args:
            values: Finite.
            scale: A public scale; None takes it from the values. Codecs without a scale ignore it.
            bits: Source of raw words for stochastic rounding (int8, int4); None, and all other codecs, round to nearest.

        Raises:
            WireError: "non-finite".
            ValueError: No scale given to a codec made with `public_scale=True`.
        """

    def decode(self, blob: Blob, k: int, *, scale: float | None = None) -> NDArray[np.float32]:
        """Values of shape (k,). Allocates O(k), and nothing before the length is checked.

        Args:
            blob: What came.
            k: Values that the terms promise.
            scale: The public scale, when the terms fix one; a header that says otherwise is refused.

        Raises:
            WireError: With a code of `comm.validate.CODES`.
        """


PLAIN: dict[str, type[Codec]] = {"float32": Float32, "float16": Float16, "bfloat16": Bfloat16}
SCALED: dict[str, type[Integers] | type[Levels]] = {
    "int8": Int8,
    "int4": Int4,
    "level3": Level3,
    "level2": Level2,
    "sign": Sign,
}
NAMES = (*PLAIN, *SCALED)


def codec(name: str, *, public_scale: bool = False) -> Codec:
    """The codec of that name.

    Args:
        name: One of NAMES.
        public_scale: For the codecs of SCALED: send no scale; both ends are then given the public one in every call.

    Raises:
        ConfigError: No codec of that name.
        ValueError: `public_scale` for a codec that has no scale.
    """
    if name in SCALED:
        return SCALED[name](public_scale=public_scale)
    if name not in PLAIN:
        raise ConfigError("wire", f"no codec named {name!r}", "use one of " + ", ".join(NAMES))
    if public_scale:
        raise ValueError(f"codec {name!r} has no scale that could be public")
    return PLAIN[name]()
