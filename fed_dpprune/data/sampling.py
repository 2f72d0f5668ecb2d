"""Poisson sampling: each example is in a step's batch by its own coin, so batch sizes vary and may be zero.

This, and nothing else, is what the accountants assume: no shuffling, no fixed size, no cap, no dropped batches.
The coins are secret; in deployments they come from the operating system and no seed of theirs exists. Neither numpy's nor
torch's generators are asked for them: `PoissonBatches` serves a torch DataLoader as its `batch_sampler` with the same coins.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fed_dpprune import randomness

_RESOLUTION = 2**64


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
    """Coins of a ChaCha20 stream under a fresh 256-bit key of the operating system for every call.

    A key lives inside one call: nothing is kept that a fork, a pickle, a checkpoint or a seeded library could repeat.
    """

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` fresh words."""
        process = os.getpid()
        stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
        words = np.frombuffer(stream.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)
        # A fork in the middle of a call (another thread's) would hand the same key to two processes.
        if os.getpid() != process:
            raise RuntimeError("the process was forked while its coins were drawn; the batch is not used")
        return words


def poisson(count: int, rate: float, uniforms: Uniforms) -> NDArray[np.int64]:
    """The rows of one step's batch: each of `count` rows is in it with probability `rate`, independently.

    Args:
        count: How many rows the client holds; may be 0.
        rate: The sample rate that is charged, above 0 and at most 1. A random 64-bit integer is compared with
            rate x 2^64 rounded down: from 2^-12 on that is a whole number for every float, and the chance is the rate
            itself; below, it is smaller than the rate by less than 2^-64, never larger.
        uniforms: The secret source of coins.

    Returns:
        Sorted rows, int64, shape (batch,), where the batch may be empty.

    Raises:
        ValueError: A rate outside (0, 1] or a negative count.
    """
    _check(count, rate)
    coins = uniforms.words(count)
    # A power of two moves the exponent of a float and nothing else: the product is exact. 2^64 itself fits no word.
    whole = int(rate * _RESOLUTION)
    if whole == _RESOLUTION:
        return np.arange(count, dtype=np.int64)
    threshold = np.uint64(whole)
    return np.flatnonzero(coins < threshold).astype(np.int64, copy=False)


def _check(count: int, rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"sample rate must be above 0 and at most 1, not {rate!r}")
    if count < 0:
        raise ValueError(f"count must not be negative, not {count!r}")


class PoissonBatches:
    """Poisson batches one after the other, each a list of rows: the `batch_sampler` of a torch DataLoader.

    Coins of the operating system unless other ones are given. No generator of torch's or numpy's is asked, so a seed of
    theirs changes nothing; what a DataLoader itself draws (its workers' seeds) picks no rows. Batches may be empty.

    Args:
        count: How many rows there are.
        rate: The sample rate that is charged; see `poisson`.
        steps: How many batches one pass has; a budget counts these, never epochs.
        uniforms: Where the coins come from; `SeededUniforms` is for tests and simulations, and to be labelled as such.

    Raises:
        ValueError: An impossible rate, count or number of steps.
    """

    def __init__(self, count: int, rate: float, steps: int, uniforms: Uniforms | None = None) -> None:
        _check(count, rate)
        if steps < 0:
            raise ValueError(f"steps must not be negative, not {steps!r}")
        self.count, self.rate, self.steps = count, rate, steps
        self._uniforms: Uniforms = OsUniforms() if uniforms is None else uniforms

    @property
    def seeded(self) -> bool:
        """Whether the coins are other ones than the operating system's."""
        return type(self._uniforms) is not OsUniforms

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            yield poisson(self.count, self.rate, self._uniforms).tolist()
