"""Payloads of the downlink: the pruned model for who joins, and later changes. Each is one run of bytes.

What both ends can derive (a support from public streams, initial weights from our own streams) is not sent. Lengths are
fixed by the terms and by the mask's own end, so nothing here has a header of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.comm.codecs.packing import Bits, Blob, Floats
from fed_dpprune.comm.codecs.table import Codec
from fed_dpprune.comm.masks import pack_positions, unpack_positions
from fed_dpprune.errors import WireError

MOST_KEPT = 4  # values of past rounds that a server keeps for each survivor; who missed more is sent the newest model


def encode_join(
    mask_positions: NDArray[np.int64] | None,
    n: int,
    values: Floats | None,
    codec: Codec,
    *,
    scale: float | None = None,
    bits: Bits | None = None,
) -> bytes:
    """The pruned model as one payload: the packed mask, then the surviving values.

    Args:
        mask_positions: Surviving coordinates, ascending, shape (k,); None when both ends derive them.
        n: Length of the parameter vector.
        values: Values at the survivors, shape (k,); None when both ends derive them.
        codec: Of the values.
        scale: A public scale, when the terms fix one.
        bits: Raw words for stochastic rounding.

    Raises:
        ValueError: Mask and values of different length.
        WireError: "non-finite".
    """
    if mask_positions is not None and values is not None and mask_positions.size != values.size:
        raise ValueError(f"{mask_positions.size} positions for {values.size} values")
    mask = b"" if mask_positions is None else pack_positions(mask_positions, n)
    return mask + (b"" if values is None else codec.encode(values, scale=scale, bits=bits))


def decode_join(
    blob: Blob, n: int, k: int, codec: Codec, *, with_mask: bool, with_values: bool, scale: float | None = None
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32] | None]:
    """(positions, values) of `encode_join`, each shape (k,), None for the part that was not sent.

    Raises:
        WireError: With a code of `comm.validate.CODES`.
    """
    view = memoryview(blob)
    tail = codec.size(k) if with_values else 0
    split = view.nbytes - tail
    if split < 0 or (not with_mask and split):
        raise WireError("payload", "wrong-length", f"{tail} bytes of values were expected, {view.nbytes} came")
    positions = unpack_positions(view[:split], n, k) if with_mask else None
    values = codec.decode(view[split:], k, scale=scale) if with_values else None
    return positions, values


def encode_sync(values: Floats, codec: Codec, *, scale: float | None = None) -> bytes:
    """Values on the union of the supports that a client missed, in coordinate order; exactly `codec.size(k)` bytes."""
    return codec.encode(values, scale=scale)


def decode_sync(blob: Blob, k: int, codec: Codec, *, scale: float | None = None) -> NDArray[np.float32]:
    """Values on the union of the missed supports, shape (k,), the union being recomputed by the receiver.

    Raises:
        WireError: With a code of `comm.validate.CODES`.
    """
    return codec.decode(blob, k, scale=scale)


def join_replay(blobs: Sequence[bytes]) -> bytes:
    """The releases of several missed rounds, oldest first, one after the other.

    A quantised release can only be repeated, not merged: a client that plays all missed ones in order holds, to the bit,
    the model that the server holds.
    """
    return b"".join(blobs)


def split_replay(blob: Blob, sizes: Sequence[int]) -> list[memoryview]:
    """The releases put together by `join_replay`; `sizes` follow from the terms of each missed round.

    Raises:
        WireError: "wrong-length".
    """
    view = memoryview(blob)
    if view.nbytes != sum(sizes):
        raise WireError("payload", "wrong-length", f"{sum(sizes)} bytes were expected, {view.nbytes} came")
    ends = np.cumsum([0, *sizes]).tolist()
    return [view[start:end] for start, end in pairwise(ends)]
