"""What lives: the support of a round, as sorted flat indices, and how a random one is drawn. numpy only.

A mask is True where a coordinate is KEPT (live). Random supports are drawn from raw counter bits by the code below and
recomputed at both ends of the wire; the golden digests in the tests hold them fixed for ever.
Source of the exact-count uniform draw: random freeze (arXiv 2112.00845, Algorithm 1), with frozen = floor(rate * n).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import randomness

CHUNK = 2**19
PROVENANCES = ("random", "data-free", "public", "private")


def weakest(*provenances: str) -> str:
    """The provenance of a support made from several: the one that claims least (order of PROVENANCES)."""
    return max(provenances, key=PROVENANCES.index, default="random")


def frozen_count(rate: float, count: int) -> int:
    """floor(rate * count): how many of `count` coordinates a rate freezes (2112.00845 code: int(rate * d)).

    The product is taken in float64, as in the authors' code, and nudged by one part in 2**50 so that a rate such as
    0.3 times 10 is 3, not 2.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate {rate} is outside [0, 1)")
    return min(count, math.floor(rate * count * (1 + 2.0**-50)))


@dataclass(frozen=True)
class Support:
    """The live coordinates of a parameter vector.

    Attributes:
        indices: Sorted flat positions, shape (k,), int64, each in 0..d-1, no duplicates.
        d: Length of the parameter vector.
        provenance: One of PROVENANCES; a support learnt from private data is `private` and may be refused.
    """

    indices: NDArray[np.int64]
    d: int
    provenance: str = "random"

    def __post_init__(self) -> None:
        """Check order and range once, so that nobody downstream has to."""
        if self.provenance not in PROVENANCES:
            raise ValueError(f"unknown provenance {self.provenance!r}")
        index = self.indices
        if index.dtype != np.int64 or index.ndim != 1:
            raise ValueError("indices must be one-dimensional int64")
        if index.size and (index[0] < 0 or index[-1] >= self.d or not bool(np.all(index[1:] > index[:-1]))):
            raise ValueError("indices must be ascending, unique and below d")
        index.flags.writeable = False

    @property
    def k(self) -> int:
        """Live count."""
        return int(self.indices.size)

    @property
    def live_fraction(self) -> float:
        """f = k / d."""
        return self.k / self.d if self.d else 0.0

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Shape (d,), True where kept."""
        mask = np.zeros(self.d, dtype=np.bool_)
        mask[self.indices] = True
        mask.flags.writeable = False
        return mask

    @cached_property
    def digest(self) -> str:
        """32 hex digits of BLAKE2b over d and the packed mask: equal if and only if the same coordinates live."""
        packed = np.packbits(self.mask, bitorder="little").tobytes()
        return hashlib.blake2b(self.d.to_bytes(8, "little") + packed, digest_size=16).hexdigest()

    def within(self, outer: Support) -> NDArray[np.int64]:
        """Positions of this support's coordinates inside `outer.indices`, shape (k,).

        Raises:
            ValueError: A coordinate does not live in `outer`.
        """
        place = np.searchsorted(outer.indices, self.indices)
        if place.size and (place[-1] >= outer.k or not np.array_equal(outer.indices[place], self.indices)):
            raise ValueError("a support is not inside the one it should nest in")
        return place


def dense(d: int) -> Support:
    """All coordinates live."""
    return Support(np.arange(d, dtype=np.int64), d)


def from_mask(mask: NDArray[np.bool_], provenance: str = "random") -> Support:
    """The support of a mask of shape (d,) (True = kept)."""
    return Support(np.flatnonzero(mask).astype(np.int64), int(mask.size), provenance)


def union(supports: Iterable[Support]) -> Support:
    """Coordinates that live in any of `supports` (at least one, all of one d), taken one by one: memory O(d)."""
    each = iter(supports)
    first = next(each)
    mask, provenance = first.mask.copy(), first.provenance
    for other in each:
        mask[other.indices] = True
        provenance = weakest(provenance, other.provenance)
    return from_mask(mask, provenance)


def _key_chunks(count: int, bits: np.random.Philox) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """The words of `randomness.raw_u32` in pieces that stay in the cache: (first position, keys)."""
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        words: NDArray[np.uint64] = bits.random_raw((size + 1) // 2)
        yield start, words.astype("<u8", copy=False).view("<u4")[:size]


def draw_positions(count: int, keep: int, seed: int, purpose: str, *ids: int | str | bytes) -> NDArray[np.int64]:
    """A uniform subset of exactly `keep` of the positions 0..count-1, sorted, shape (keep,).

    Each position gets a raw 32-bit key; the `keep` smallest (key, position) pairs win. Equal on every machine, and nested:
    of one stream, fewer are a subset of more. Keys far below the expected cut are in and far above are out, so that the
    exact selection sees only a narrow band around it.
    """
    if not 0 <= keep <= count:
        raise ValueError(f"cannot keep {keep} of {count}")
    if keep in (0, count):
        return np.arange(keep, dtype=np.int64)
    slack = 8.0 * math.sqrt(keep * (1 - keep / count)) + 64
    low = int(max(0.0, (keep - slack) / count) * 2.0**32)
    high = int(min(1.0, (keep + slack) / count) * (2.0**32 - 1))
    live = np.empty(count, dtype=np.bool_)
    places, band = [], []
    for start, keys in _key_chunks(count, randomness.bit_generator(seed, purpose, *ids)):
        np.less(keys, np.uint32(low), out=live[start : start + keys.size])
        near = np.flatnonzero(keys - np.uint32(low) < np.uint32(high - low))  # unsigned: below `low` wraps far above
        places.append(near + start)
        band.append(keys[near])
    missing = keep - int(np.count_nonzero(live))
    near = np.concatenate(places)
    if not 0 <= missing <= near.size:  # eight standard deviations away: correctness must not hang on luck
        return smallest(randomness.raw_u32(count, seed, purpose, *ids), keep)
    live[near[smallest(np.concatenate(band), missing)]] = True
    return np.flatnonzero(live).astype(np.int64, copy=False)


def smallest(keys: NDArray[np.generic], keep: int) -> NDArray[np.int64]:
    """Positions of the `keep` smallest keys, ties to the lower position, sorted, shape (keep,). Exact count always."""
    if keep == 0:
        return np.zeros(0, dtype=np.int64)
    cut = np.partition(keys, keep - 1)[keep - 1]
    below = np.flatnonzero(keys < cut)
    ties = np.flatnonzero(keys == cut)[: keep - below.size]
    return np.sort(np.concatenate([below, ties])).astype(np.int64)


def largest(scores: NDArray[np.floating], keep: int) -> NDArray[np.int64]:
    """Positions of the `keep` largest scores, ties to the lower position, sorted, shape (keep,).

    Raises:
        ValueError: A score is NaN, which has no order.
    """
    if np.isnan(scores).any():
        raise ValueError("a score is not a number")
    return smallest(-scores, keep)


def random_subset(outer: Support, keep: int, seed: int, purpose: str, *ids: int | str | bytes) -> Support:
    """A uniform subset of exactly `keep` coordinates of `outer`."""
    chosen = draw_positions(outer.k, keep, seed, purpose, *ids)
    return Support(chosen if outer.k == outer.d else outer.indices[chosen], outer.d, outer.provenance)
