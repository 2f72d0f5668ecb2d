"""A support inside 0..n-1 as bytes, for the ends that cannot derive it: the smallest of several encodings.

n and k are known to both ends; where they leave no choice (k = 0, k = n) nothing is sent. Else the first byte is a tag:
its two low bits name the kind, its six high bits hold the Rice parameter r of the kinds that have one.

| kind | rest of the bytes |
|---|---|
| 0 bitmask | n bits in little bit order, 1 = kept, padded with zeros |
| 1 kept gaps | gaps between kept positions, Rice-coded: low r bits of all gaps (as in `packing`), then a unary stream |
| 2 dropped gaps | the same for the dropped positions |
| 3 seed | 8 bytes, little-endian: both ends draw the support from the public stream "client-support" |

A gap is the number of positions skipped since the last one. Its high part q = gap >> r is written as q zeros and a one.
Rice codes are optimal for uniformly drawn supports to within a few percent (Rice 1979; Golomb 1966).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.comm.codecs.packing import Blob, packed_bytes
from fed_dpprune.errors import WireError
from fed_dpprune.sparsity.support import draw_positions

BITMASK, KEPT_GAPS, DROPPED_GAPS, SEED = 0, 1, 2, 3
SEED_PURPOSE = "client-support"


def pack_positions(positions: NDArray[np.int64], n: int, *, seed: int | None = None) -> bytes:
    """A support as bytes; at most `packed_size_bound(n, k)` of them.

    Gap codes are tried only where that bound is below a bitmask: then the length of a bitmask, which `plan` states as
    exact, follows from n and k alone.

    Args:
        positions: Ascending, unique, in 0..n-1, shape (k,).
        n: Length of what they point into.
        seed: When the positions are `draw_positions(n, k, seed, "client-support")`, that seed (0..2**64-1): 9 bytes.

    Raises:
        ValueError: Positions out of order or range, or not those of the seed.
    """
    k = int(positions.size)
    if k and (positions[0] < 0 or positions[-1] >= n or not bool(np.all(positions[1:] > positions[:-1]))):
        raise ValueError("positions must be ascending, unique and below n")
    if k in (0, n):
        return b""
    candidates = [bytes([BITMASK]) + _pack_bitmask(positions, n)]
    if packed_size_bound(n, k) == len(candidates[0]):
        pass
    elif k <= n - k:
        candidates.append(_pack_gaps(KEPT_GAPS, positions, n))
    else:
        candidates.append(_pack_gaps(DROPPED_GAPS, _others(positions, n), n))
    if seed is not None:
        if not np.array_equal(draw_positions(n, k, seed, SEED_PURPOSE), positions):
            raise ValueError("the positions are not those that the seed draws")
        candidates.append(bytes([SEED]) + seed.to_bytes(8, "little"))
    return min(candidates, key=len)


def unpack_positions(blob: Blob, n: int, k: int) -> NDArray[np.int64]:
    """The positions packed by `pack_positions`, shape (k,), int64.

    Allocates O(n) at most, and nothing before the length is checked.

    Raises:
        WireError: "wrong-length", "header" (unknown tag), "padding", "positions" (not k positions below n).
    """
    view = memoryview(blob)
    if not 0 <= k <= n:
        raise WireError("mask", "positions", f"{k} of {n} positions")
    if view.nbytes > max_size(n, k) or (view.nbytes < 2) != (k in (0, n)) or (k in (0, n) and view.nbytes):
        raise WireError("mask", "wrong-length", f"{view.nbytes} bytes cannot hold {k} positions of {n}")
    if not view.nbytes:
        return np.arange(k, dtype=np.int64)
    raw = np.frombuffer(view, dtype=np.uint8)
    kind, parameter, body = int(raw[0]) & 3, int(raw[0]) >> 2, raw[1:]
    if kind in (BITMASK, SEED) and parameter:
        raise WireError("mask", "header", "an unknown tag")
    if kind == BITMASK:
        return _unpack_bitmask(body, n, k)
    if kind == SEED:
        if body.size != 8:
            raise WireError("mask", "wrong-length", "a seed has 8 bytes")
        return draw_positions(n, k, int.from_bytes(body.tobytes(), "little"), SEED_PURPOSE)
    if kind == KEPT_GAPS:
        return _unpack_gaps(body, parameter, n, k)
    return _others(_unpack_gaps(body, parameter, n, n - k), n)


def packed_size_bound(n: int, k: int) -> int:
    """The most bytes that any k of n positions can need: what `plan` counts for a mask it cannot know."""
    if k in (0, n):
        return 0
    count = min(k, n - k)
    rice = min(_rice_bytes(count, r, (n - count) >> r) for r in rice_parameters(n, count))
    return 1 + min(packed_bytes(n, 1), rice)


def max_size(n: int, k: int) -> int:
    """The longest blob that a reader accepts: a seed may be longer than the best encoding of a tiny support."""
    return max(packed_size_bound(n, k), 9) if 0 < k < n else 0


def entropy_bound_bytes(n: int, k: int) -> int:
    """ceil(log2 C(n, k) / 8): no code can beat this on average over all supports of k in n; printed beside what was used."""
    nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.ceil(max(0.0, nats / math.log(2) - 1e-6) / 8)


def rice_parameters(n: int, count: int) -> range:
    """The parameters tried for `count` gaps that sum to at most n - count: around log2(ln 2 * mean gap)."""
    best = max(0, round(math.log2(max(1.0, math.log(2) * n / count))))
    return range(max(0, best - 1), best + 2)


def _rice_bytes(count: int, r: int, high_sum: int) -> int:
    """Bytes of `count` gaps whose high parts sum to `high_sum`, the tag left out."""
    return packed_bytes(count, r) + packed_bytes(count + high_sum, 1)


def _others(positions: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """What of 0..n-1 is not in `positions`, ascending."""
    absent = np.ones(n, dtype=np.bool_)
    absent[positions] = False
    return np.flatnonzero(absent).astype(np.int64, copy=False)


def _pack_bitmask(positions: NDArray[np.int64], n: int) -> bytes:
    mask = np.zeros(n, dtype=np.uint8)
    mask[positions] = 1
    return np.packbits(mask, bitorder="little").tobytes()


def _unpack_bitmask(body: NDArray[np.uint8], n: int, k: int) -> NDArray[np.int64]:
    if body.size != packed_bytes(n, 1):
        raise WireError("mask", "wrong-length", "a bitmask of another length")
    bits = np.unpackbits(body, bitorder="little")
    if bits[n:].any():
        raise WireError("mask", "padding", "an unused bit is set")
    return _ones(bits, k)


def _ones(bits: NDArray[np.uint8], k: int) -> NDArray[np.int64]:
    """Where the bits are one, shape (k,); counted before the positions are made, which take 64 times the room."""
    found = int(np.count_nonzero(bits))
    if found != k:
        raise WireError("mask", "positions", f"{found} positions came, {k} were expected")
    return np.flatnonzero(bits).astype(np.int64, copy=False)


def _pack_gaps(kind: int, positions: NDArray[np.int64], n: int) -> bytes:
    gaps = np.diff(positions, prepend=np.int64(-1)) - 1
    sums = {r: int((gaps >> r).sum()) for r in rice_parameters(n, gaps.size)}
    r = min(sums, key=lambda tried: _rice_bytes(gaps.size, tried, sums[tried]))
    low = np.empty((r, gaps.size), dtype=np.uint8)
    for place in range(r):
        low[place] = (gaps >> place) & 1
    unary = np.zeros(gaps.size + sums[r], dtype=np.uint8)
    unary[np.cumsum((gaps >> r) + 1) - 1] = 1
    streams = (np.packbits(bits.reshape(-1), bitorder="little").tobytes() for bits in (low, unary))
    return bytes([kind | r << 2]) + b"".join(streams)


def _unpack_gaps(body: NDArray[np.uint8], r: int, n: int, count: int) -> NDArray[np.int64]:
    """`count` ascending positions below n from Rice-coded gaps."""
    split = packed_bytes(count, r)
    if r not in rice_parameters(n, count) or body.size <= split:
        raise WireError("mask", "header", "a Rice parameter that no encoder writes")
    low_bits = np.unpackbits(body[:split], bitorder="little")
    ends = _ones(np.unpackbits(body[split:], bitorder="little"), count)
    if low_bits[count * r :].any() or packed_bytes(int(ends[-1]) + 1, 1) != body.size - split:
        raise WireError("mask", "padding", "an unused bit or byte is set")
    gaps = (np.diff(ends, prepend=np.int64(-1)) - 1) << r
    planes = low_bits[: count * r].reshape(r, count)
    for place in range(r):
        gaps |= planes[place].astype(np.int64) << place
    positions = np.cumsum(gaps + 1) - 1
    if positions[-1] >= n:
        raise WireError("mask", "positions", "a position beyond the end")
    return positions
