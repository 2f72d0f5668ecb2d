"""An update as bytes, and back: the values on the support, or the largest of them with their positions.

Both work on what the noise has already covered. Choosing the largest noised values is post-processing and costs no epsilon;
what it costs are the positions. It is the baseline that a shared random support is compared with, not a way to save bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune import randomness
from fed_dpprune.comm.codecs.packing import Bits
from fed_dpprune.comm.codecs.table import codec
from fed_dpprune.comm.downlink import decode_join, encode_join
from fed_dpprune.sparsity.support import frozen_count, largest


def selected_count(wire: cfg.Wire, live: int) -> int:
    """How many of `live` values leave."""
    return live - frozen_count(wire.select_rate, live) if wire.select == "top-k" else live


def dither(wire: cfg.Wire, seed: int, *ids: int | str) -> Bits | None:
    """Raw words for `wire.rounding`, from the public stream "codec": what they round is secret enough by its noise.

    Args:
        wire: The config's `wire`.
        seed: Root of the public streams.
        ids: What tells a message from all others: direction, round and, on the way up, the client. Equal words in two
            clients' messages would add up their rounding errors instead of averaging them.
    """
    if wire.rounding != "stochastic":
        return None
    return lambda count: randomness.raw_u32(count, seed, "codec", *ids)


def saturated(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """The nearest finite float32 values, shape (k,); what is not a number is 0.

    Values are noised when they come here, so this is post-processing; an error instead would tell how large they were.
    """
    largest_float32 = float(np.finfo(np.float32).max)
    return np.clip(np.nan_to_num(values, nan=0.0), -largest_float32, largest_float32).astype(np.float32)


def encode(wire: cfg.Wire, values: NDArray[np.float64], bits: Bits | None = None) -> bytes:
    """The noised values on the round's support, shape (k,), as `wire.uplink` and `wire.select` say.

    Never fails for what the values are. The length follows from k alone, but for `top-k`, where it follows from the
    noised values' positions too.

    Args:
        wire: The config's `wire`.
        values: Shape (k,); those that no codec can carry saturate.
        bits: From `dither`.
    """
    sent = saturated(values)
    keep = selected_count(wire, sent.size)
    if wire.select == "none" or keep == sent.size:
        return codec(wire.uplink).encode(sent, bits=bits)
    chosen = largest(np.abs(sent), keep)
    return encode_join(chosen, sent.size, sent[chosen], codec(wire.uplink), bits=bits)


def decode(wire: cfg.Wire, blob: bytes, live: int) -> NDArray[np.float32]:
    """The values on the support, shape (live,); those that were not chosen are 0.

    Raises:
        WireError: With a code of `comm.validate.CODES`.
    """
    keep = selected_count(wire, live)
    if wire.select == "none" or keep == live:
        return codec(wire.uplink).decode(blob, live)
    positions, found = decode_join(blob, live, keep, codec(wire.uplink), with_mask=True, with_values=True)
    values = np.zeros(live, dtype=np.float32)
    values[positions] = found
    return values
