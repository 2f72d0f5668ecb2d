"""Poisson sampling: each example is in a step's batch by its own coin, so batch sizes vary and may be zero.

This, and nothing else, is what the accountants assume: no shuffling, no fixed size, no cap, no dropped batches.
The coins are secret; in deployments they come from the operating system and no seed of theirs exists.
"""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fed_dpprune import randomness

_RESOLUTION = 2**53


class Uniforms(Protocol):
    """Where the coins come from."""

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` fresh uniform 64-bit words, shape (count,)."""
        ...


class SeededUniforms:
    """Repeatable coins for simulations, from (seed, "batches", ids).

    Args:
        seed: The run's root seed.
        ids: Run, round, client; the steps of a round follow one another in the stream.
    """

    def __init__(self, seed: int, *ids: int | str | bytes) -> None:
        self._bits = randomness.bit_generator(seed, "batches", *ids)

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` words of the stream."""
        drawn: NDArray[np.uint64] = self._bits.random_raw(count)
        return drawn


class OsUniforms:
    """Coins of a ChaCha20 stream under a fresh key of the operating system for every call."""

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` fresh words."""
        stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
        return np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)


def poisson(count: int, rate: float, uniforms: Uniforms) -> NDArray[np.int64]:
    """The rows of one step's batch: each of `count` rows is in it with probability `rate`, independently.

    Args:
        count: How many rows the client holds; may be 0.
        rate: The sample rate that is charged, above 0 and at most 1. It is used to the full precision of a float:
            53 random bits are compared with rate x 2^53 rounded down, so the chance is never above what is charged
            and below it by less than 2^-53.
        uniforms: The secret source of coins.

    Returns:
        Sorted rows, int64, shape (batch,), where the batch may be empty.

    Raises:
        ValueError: A rate outside (0, 1] or a negative count.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"sample rate must be above 0 and at most 1, not {rate!r}")
    if count < 0:
        raise ValueError(f"count must not be negative, not {count!r}")
    threshold = np.uint64(int(rate * _RESOLUTION))
    coins = uniforms.words(count) >> np.uint64(11)
    return np.flatnonzero(coins < threshold).astype(np.int64, copy=False)
