"""Uniform integer grids with a scale per block; int8.py and int4.py say how many bits.

Layout: the block scales (bfloat16 rounded up, little-endian; left out when public), then the codes. k values form
b = min(8, max(1, k // 512)) blocks of ceil(k / b) values (the last may be shorter), so the header is 2 to 16 bytes. A
block's scale is its largest |value|, so that one layer with large values does not coarsen the others. Code c stands for
c * scale / top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.comm.codecs.bfloat16 import from_upper_half
from fed_dpprune.comm.codecs.packing import (
    Bits,
    Blob,
    Floats,
    as_scale,
    finite_float32,
    missing_scale,
    pack_codes,
    packed_bytes,
    read_exactly,
    unpack_codes,
)
from fed_dpprune.errors import WireError

MOST_BLOCKS, SMALLEST_BLOCK = 8, 512
LARGEST_HALF = 0x7F7F  # the largest finite bfloat16


def block_count(k: int) -> int:
    """How many blocks k values form: 0 for none, else 1 to 8."""
    return min(MOST_BLOCKS, max(1, k // SMALLEST_BLOCK)) if k else 0


def blocks(k: int) -> Iterator[slice]:
    """The blocks of k values, in order."""
    if k:
        length = -(-k // block_count(k))
        for start in range(0, k, length):
            yield slice(start, min(start + length, k))


def half_above(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The smallest bfloat16 patterns not below the given values >= 0 (saturating at the largest finite one)."""
    word = np.ascontiguousarray(values).view(np.uint32)
    half: NDArray[np.uint16] = np.minimum((word + np.uint32(0xFFFF)) >> np.uint32(16), LARGEST_HALF).astype(np.uint16)
    return half


@dataclass(frozen=True)
class Integers:
    """The common part of int8 and int4.

    Attributes:
        public_scale: True when no scale is sent and both ends are given the public one, which then is the range of all
            blocks; values beyond it saturate.
    """

    public_scale: bool = False

    name: ClassVar[str] = "integers"
    bits_per_value: ClassVar[int] = 8
    gaussian_gain: ClassVar[float] = 1.0
    overshoot: ClassVar[float] = 1.0 + 2.0**-7  # the scale is rounded up to 8 significant bits

    @property
    def top(self) -> int:
        """The largest code: 127 or 7. Codes run from -top to top; the one pattern left over is refused."""
        return int(2 ** (self.bits_per_value - 1)) - 1

    def header(self, k: int) -> int:
        """Bytes of the block scales."""
        return 0 if self.public_scale else 2 * block_count(k)

    def size(self, k: int) -> int:
        """Header and ceil(k * bits / 8); 0 for k = 0."""
        return self.header(k) + packed_bytes(k, self.bits_per_value)

    def encode(self, values: Floats, *, scale: float | None = None, bits: Bits | None = None) -> bytes:
        """Values of shape (k,) as `size(k)` bytes.

        Args:
            values: Finite.
            scale: The public range; needed with `public_scale`, else it replaces every block's own largest |value|.
            bits: Raw words for stochastic rounding (unbiased inside the range); None rounds to nearest even.

        Raises:
            WireError: "non-finite".
            ValueError: No scale although none is sent.
        """
        data = finite_float32(values)
        if self.public_scale and scale is None:
            raise missing_scale(self.name)
        if scale is None:
            ranges = np.array([np.abs(data[block]).max() for block in blocks(data.size)], dtype=np.float32)
        else:
            ranges = np.full(block_count(data.size), as_scale(scale))
        halves = half_above(ranges)
        scales = ranges if self.public_scale else from_upper_half(halves)
        codes = np.empty(data.size, dtype=np.uint8)
        dither = None if bits is None else (bits(data.size) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
        for block, step in zip(blocks(data.size), self._steps(scales), strict=True):
            codes[block] = self._round(data[block], step, None if dither is None else dither[block])
        header = b"" if self.public_scale else halves.astype("<u2").tobytes()
        return header + (codes.tobytes() if self.bits_per_value == 8 else pack_codes(codes, self.bits_per_value))

    def decode(self, blob: Blob, k: int, *, scale: float | None = None) -> NDArray[np.float32]:
        """Shape (k,).

        Raises:
            WireError: "wrong-length", "header" (a scale that is negative, not finite, or not the given one), "code",
                "padding".
        """
        if self.public_scale and scale is None:
            raise missing_scale(self.name)
        raw = read_exactly(blob, self.size(k))
        start = self.header(k)
        scales = np.full(block_count(k), as_scale(scale or 0.0)) if self.public_scale else self._read_scales(raw[:start], scale)
        codes = raw[start:] if self.bits_per_value == 8 else unpack_codes(raw[start:], k, self.bits_per_value)
        whole = codes.astype(np.int16) - np.int16(self.top) if self.bits_per_value < 8 else codes.view(np.int8).astype(np.int16)
        if bool((np.abs(whole) > self.top).any()):
            raise WireError("payload", "code", "a code that no encoder writes")
        values = whole.astype(np.float32)
        for block, step in zip(blocks(k), self._steps(scales), strict=True):
            values[block] *= step
        return values

    def _steps(self, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """The value of code 1 in each block; float32 division, equal on every machine."""
        return scales / np.float32(self.top)

    def _round(self, data: NDArray[np.float32], step: np.float32, dither: NDArray[np.float32] | None) -> NDArray[np.uint8]:
        """One block's codes as stored bytes: two's complement for 8 bits, code + top for 4."""
        scaled = data / step if step > 0 else np.zeros_like(data)
        whole = np.rint(scaled) if dither is None else np.floor(scaled + dither)
        np.clip(whole, -self.top, self.top, out=whole)
        if self.bits_per_value == 8:
            return whole.astype(np.int8).view(np.uint8)
        return (whole + np.float32(self.top)).astype(np.uint8)

    def _read_scales(self, raw: NDArray[np.uint8], expected: float | None) -> NDArray[np.float32]:
        halves = raw.view("<u2").astype(np.uint16)
        if bool((halves > LARGEST_HALF).any()):
            raise WireError("payload", "header", "a scale is negative or not finite")
        if expected is not None and bool((halves != half_above(np.array([as_scale(expected)], dtype=np.float32))[0]).any()):
            raise WireError("payload", "header", "a scale is not the one that the terms fixed")
        return from_upper_half(halves)
