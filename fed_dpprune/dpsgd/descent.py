"""The two passes of a private step over its live values: the noised mean, and the step down. numpy, or the kernel.

Both work in place on one block of values at a time, so that a block stays in the cache between drawing its noise and
moving its weights. Each value is computed by the same operations in the same order, rounded in float64 one by one, with
the kernel or without: results are equal to the bit. Neither looks at another value than the one it writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.dpsgd import compiled

BLOCK = 1 << 15  # values; noise, sum, weights and velocity of a block fit a core's own cache


def blocks(count: int) -> Iterator[slice]:
    """0..count-1 in pieces of BLOCK."""
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def noised_mean(total: NDArray[Any], noise: NDArray[np.float64], scale: float, divisor: float) -> NDArray[np.float64]:
    """(total + scale * noise) / divisor, shape (n,), written over `noise`.

    Args:
        total: Clipped sum, shape (n,), float32 or float64.
        noise: Standard normals, shape (n,).
        scale: Standard deviation of the noise on the sum: noise multiplier times clip norm.
        divisor: Public: sample rate times nominal size.
    """
    kernel = compiled.load()
    if kernel is not None and _fit(noise.size, (total, np.float32), (noise, np.float64)):
        kernel.library.noised_mean(noise.size, total.ctypes.data, scale, divisor, noise.ctypes.data)
        return noise
    noise *= scale
    noise += total
    noise /= divisor
    return noise


def descend(
    values: NDArray[np.float32],
    mean: NDArray[np.float64],
    rate: float,
    decay: float = 0.0,
    momentum: float = 0.0,
    velocity: NDArray[np.float64] | None = None,
) -> None:
    """One step of SGD in place: velocity = momentum * velocity + mean + decay * values; values -= rate * velocity.

    Args:
        values: Weights, shape (n,).
        mean: What was released, shape (n,).
        rate: Learning rate.
        decay: Weight decay.
        momentum: Of the optimiser.
        velocity: Shape (n,); None when there is no momentum, which leaves out its pass: the same to the bit as a velocity times
            zero, but for the sign of a zero weight whose mean is -0.0.
    """
    kernel = compiled.load()
    given = [(values, np.float32), (mean, np.float64), *([] if velocity is None else [(velocity, np.float64)])]
    if kernel is not None and _fit(values.size, *given):
        place = None if velocity is None else velocity.ctypes.data
        kernel.library.descend(values.size, mean.ctypes.data, rate, momentum, decay, place, values.ctypes.data)
        return
    now = values.astype(np.float64)
    if velocity is None:
        velocity = mean + decay * now
    else:
        velocity[:] = momentum * velocity + mean + decay * now
    values[:] = (now - rate * velocity).astype(np.float32)


def _fit(count: int, *arrays: tuple[NDArray[Any], type]) -> bool:
    """Whether the kernel may walk over them: `count` values each, of the given type, one after the other."""
    return all(array.shape == (count,) and array.dtype == kind and array.flags.c_contiguous for array, kind in arrays)
