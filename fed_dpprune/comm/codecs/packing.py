"""The byte layout shared by the codecs: exact-length reading, scales, and codes of a few bits each.

Codes of b bits are stored as b bit planes, lowest bit first, one after the other without padding between them, in
little bit order; the unused bits of the last byte are zero. A reader refuses anything else, so that one array of
codes has one encoding. Errors are `WireError(what, code, detail)` whose `why` is a code of `comm.validate.CODES`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.errors import WireError

Floats = NDArray[np.float32] | NDArray[np.float64]
Blob = bytes | bytearray | memoryview
Bits = Callable[[int], NDArray[np.uint32]]  # count -> that many raw 32-bit words, e.g. of a "codec" stream of `randomness`

LARGEST_SCALE = 1.5e38  # leaves room for the outermost level (2.152) below the largest float32


def packed_bytes(count: int, bits: int) -> int:
    """ceil(count * bits / 8): bytes of `count` codes of `bits` bits."""
    return (count * bits + 7) // 8


def read_exactly(blob: Blob, size: int, what: str = "payload") -> NDArray[np.uint8]:
    """The bytes of `blob`, shape (size,), without copying; checked before anything is allocated.

    Raises:
        WireError: "wrong-length".
    """
    view = memoryview(blob)
    if view.nbytes != size:
        raise WireError(what, "wrong-length", f"{size} bytes were expected, {view.nbytes} came")
    return np.frombuffer(view, dtype=np.uint8) if size else np.zeros(0, dtype=np.uint8)


def finite_float32(values: Floats, what: str = "payload") -> NDArray[np.float32]:
    """`values` as float32, shape (k,).

    Raises:
        ValueError: Not one-dimensional.
        WireError: "non-finite": a NaN or infinity, or a float64 beyond float32.
    """
    if values.ndim != 1:
        raise ValueError(f"values must be one-dimensional, not of shape {values.shape}")
    with np.errstate(over="ignore"):
        out = values.astype(np.float32, copy=False)
    if not bool(np.isfinite(out).all()):
        raise WireError(what, "non-finite", "a value is not a finite float32")
    return out


def pack_codes(codes: NDArray[np.uint8], bits: int) -> bytes:
    """Codes 0..2**bits-1, shape (k,), as `packed_bytes(k, bits)` bytes."""
    planes = np.empty((bits, codes.size), dtype=np.uint8)
    for place in range(bits):
        np.bitwise_and(codes, np.uint8(1 << place), out=planes[place])  # packbits takes any non-zero byte for a one
    return np.packbits(planes.reshape(-1), bitorder="little").tobytes()


def unpack_codes(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint8]:
    """The codes written by `pack_codes`, shape (count,); `packed` has `packed_bytes(count, bits)` entries.

    Raises:
        WireError: "padding": an unused bit of the last byte is set.
    """
    used = count * bits
    if used % 8 and packed[-1] >> (used % 8):
        raise WireError("payload", "padding", "an unused bit is set")
    planes = np.unpackbits(packed, count=used, bitorder="little").reshape(bits, count)
    codes: NDArray[np.uint8] = planes[0].copy()
    for place in range(1, bits):
        codes |= planes[place] << np.uint8(place)
    return codes


def as_scale(scale: float) -> np.float32:
    """A scale given by the sender or by the terms, as float32.

    Raises:
        ValueError: Negative, not finite or beyond LARGEST_SCALE.
    """
    if not 0 <= scale <= LARGEST_SCALE:
        raise ValueError(f"scale {scale!r} must lie in 0..{LARGEST_SCALE:g}")
    return np.float32(abs(scale))


def write_scale(scale: np.float32) -> bytes:
    """Little-endian float32, 4 bytes."""
    return np.asarray(scale, dtype="<f4").tobytes()


def read_scale(raw: NDArray[np.uint8], expected: float | None) -> np.float32:
    """The scale in 4 header bytes.

    Args:
        raw: Shape (4,).
        expected: The scale that the terms fixed; None when the sender was free to choose.

    Raises:
        WireError: "header": negative, not finite, too large, or not the expected one.
    """
    scale = np.float32(raw.view("<f4")[0])
    if np.signbit(scale) or not scale <= np.float32(LARGEST_SCALE):
        raise WireError("payload", "header", "the scale is negative, too large or not a number")
    if expected is not None and scale != as_scale(expected):
        raise WireError("payload", "header", "the scale is not the one that the terms fixed")
    return scale


def missing_scale(name: str) -> ValueError:
    """The error of a codec made with `public_scale=True` that was called without the scale."""
    return ValueError(f"codec {name!r} sends no scale, so both ends must be given the public one")
