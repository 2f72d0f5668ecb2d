"""Random streams by purpose: one root seed, many independent counter-based generators.

Each stream is Philox4x64 (Salmon et al. 2011) keyed by a keyed hash of (root seed, purpose, ids), so that streams of
two purposes, rounds or clients never overlap, and any process can make any stream without running through the others.
What must be equal on two machines is made from the raw 64-bit words alone (`raw_u32`, `raw_u64`), never from a
library's distributions. Lives here: streams. Does not live here: noise of deployments (`dpsgd.noise`), which has no seed.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

PUBLIC_PURPOSES = (
    "partition", "init", "support", "client-support", "cohort", "synthetic", "test-split", "control", "codec", "pretrain",
)  # fmt: skip
SECRET_PURPOSES = ("batches", "noise")


def _key(seed: int, purpose: str, ids: tuple[int | str | bytes, ...]) -> tuple[int, int]:
    """128-bit Philox key: BLAKE2b over an unambiguous encoding of the purpose and the ids, keyed by the seed."""
    if purpose not in PUBLIC_PURPOSES and purpose not in SECRET_PURPOSES:
        raise ValueError(f"unknown random purpose {purpose!r}")
    digest = hashlib.blake2b(digest_size=16, key=int(seed).to_bytes(16, "little", signed=True))
    for part in (purpose, *ids):
        if isinstance(part, bytes):
            kind, blob = b"b", part
        elif isinstance(part, str):
            kind, blob = b"s", part.encode()
        else:
            kind, blob = b"i", int(part).to_bytes(16, "little", signed=True)
        digest.update(kind + len(blob).to_bytes(8, "little") + blob)
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def bit_generator(seed: int, purpose: str, *ids: int | str | bytes) -> np.random.Philox:
    """The raw counter-based generator of one purpose.

    Args:
        seed: The run's root seed.
        purpose: One of PUBLIC_PURPOSES or SECRET_PURPOSES.
        ids: What tells this stream from its siblings: run, round, step, partition, a request's digest.

    Returns:
        A Philox bit generator at counter 0.
    """
    low, high = _key(seed, purpose, ids)
    return np.random.Philox(key=np.array([low, high], dtype=np.uint64), counter=0)


def generator(seed: int, purpose: str, *ids: int | str | bytes) -> np.random.Generator:
    """A numpy Generator on `bit_generator`; for draws that need not be equal across numpy versions or CPUs."""
    return np.random.Generator(bit_generator(seed, purpose, *ids))


def raw_u64(count: int, seed: int, purpose: str, *ids: int | str | bytes) -> NDArray[np.uint64]:
    """`count` raw 64-bit words, shape (count,); equal on every machine."""
    words: NDArray[np.uint64] = bit_generator(seed, purpose, *ids).random_raw(count)
    return words


def raw_u32(count: int, seed: int, purpose: str, *ids: int | str | bytes) -> NDArray[np.uint32]:
    """`count` raw 32-bit words, shape (count,): each 64-bit word gives its low half, then its high half."""
    words = raw_u64((count + 1) // 2, seed, purpose, *ids)
    return words.astype("<u8", copy=False).view("<u4")[:count]


def uniform_f32(count: int, seed: int, purpose: str, *ids: int | str | bytes) -> NDArray[np.float32]:
    """`count` float32 values in [-1, 1), shape (count,), by exact arithmetic on 24 raw bits: equal on every machine."""
    bits = raw_u32(count, seed, purpose, *ids) >> np.uint32(8)
    return (bits.astype(np.float32) - np.float32(2**23)) * np.float32(2.0**-23)


def permutation(count: int, seed: int, purpose: str, *ids: int | str | bytes) -> NDArray[np.int64]:
    """A uniform permutation of 0..count-1, shape (count,), by a stable sort of raw 64-bit keys: equal on every machine."""
    return np.argsort(raw_u64(count, seed, purpose, *ids), kind="stable")
