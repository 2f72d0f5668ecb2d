"""Where a client's Gaussian noise comes from: the operating system's entropy, or a seed in simulation.

Values are float64, drawn for live coordinates only; scaling by noise multiplier and clip norm is the caller's.
Deployments use `OsNoise` and there is no fallback to a plain generator. `SeededNoise` exists for runs that built the
client in their own process; it is labelled, and whoever knows the seed can subtract it.
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from fed_dpprune import randomness
from fed_dpprune.dpsgd import compiled

OS_ENTROPY = "os-entropy"
SEEDED = "seeded-simulation"
# Normals added up for each value (over the root of their number). One Box-Muller value in floating point can only lie on
# a lattice that depends on what it is added to (Mironov 2012); sums of four hide it as Opacus' secure mode does
# (Holohan and Braghin 2107.10138).
HARDENING = 4
_BLOCK = 1 << 13  # four times this many words of the stream stay in a core's own cache


class NoiseSource(Protocol):
    """What a private step draws its noise from. `label` is OS_ENTROPY or SEEDED and goes into the summary."""

    label: str

    def normal(self, count: int) -> NDArray[np.float64]:
        """`count` fresh standard normal values, shape (count,), float64; never the same values twice. The caller's to change."""
        ...


def _box_muller(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard normals from 64-bit words, shape (n,) for even n.

    The radius uses all of (0, 1] in steps of 2^-53, so values reach 8.57: the tail is not cut where a sum with clipped
    gradients could be told apart (float32 normals stop at 5.77).
    """
    half = len(words) // 2
    uniform = ((words[:half] >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
    angle = (words[half:] >> np.uint64(11)).astype(np.float64) * (2.0 * math.pi * 2.0**-53)
    radius = np.sqrt(-2.0 * np.log(uniform))
    values = np.empty(2 * half)
    np.multiply(radius, np.cos(angle), out=values[:half])
    np.multiply(radius, np.sin(angle), out=values[half:])
    return values


class OsNoise:
    """Noise from a ChaCha20 stream under a fresh 256-bit key of the operating system for every call.

    A key lives inside one call: nothing is kept that a fork, a pickle, a checkpoint or a seeded library could repeat.
    """

    label = OS_ENTROPY

    def normal(self, count: int) -> NDArray[np.float64]:
        """`count` fresh standard normal values, shape (count,), float64."""
        process = os.getpid()
        stream = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
        values = np.empty(count)
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            words = np.frombuffer(stream.update(bytes(8 * HARDENING * (size + size % 2))), dtype="<u8")
            drawn = _box_muller(words.astype(np.uint64, copy=False)).reshape(HARDENING, -1)
            values[start : start + size] = drawn.sum(axis=0)[:size] / math.sqrt(HARDENING)
        # A fork in the middle of a call (another thread's) would hand the same key to two processes.
        if os.getpid() != process:
            raise RuntimeError("the process was forked while its noise was drawn; the values are not released")
        return values


class SeededNoise:
    """Repeatable noise for simulations: a stream of its own from (seed, "noise", ids), float64.

    The values are numpy's to the bit; the kernel draws them where there is one, five times as fast.

    Args:
        seed: The run's root seed.
        ids: Run, round, client and the digest of the request, so that a changed request gets other noise.

    Attributes:
        stream: The kernel's side of it, for passes that draw and use values together; None where numpy draws.
    """

    label = SEEDED

    def __init__(self, seed: int, *ids: int | str | bytes) -> None:
        self._generator = randomness.generator(seed, "noise", *ids)
        kernel = compiled.load()
        self.stream: compiled.NormalStream | None = None
        if kernel is not None and kernel.draws_like_numpy:
            self.stream = compiled.NormalStream(kernel, self._generator.bit_generator.state["state"]["key"])

    def normal(self, count: int) -> NDArray[np.float64]:
        """The next `count` standard normal values of the stream, shape (count,), float64."""
        if self.stream is None:
            return self._generator.standard_normal(count)
        values = np.empty(count)
        self.stream.fill(values)
        return values
