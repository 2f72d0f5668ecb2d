"""A private step after its clipped sum: noise on every live value, the public divisor, the step down. numpy, or the kernel.

The kernel draws and uses the noise while it is close, so that nothing of the length of the support is written but the weights.
With the kernel or without, each value goes through the same operations in the same order, rounded in float64 one by one:
the results are equal to the bit. No value is looked at but the one that is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.dpsgd import compiled
from fed_dpprune.dpsgd.noise import NoiseSource, SeededNoise


@dataclass(frozen=True)
class Descent:
    """How a clipped sum becomes new weights.

    Attributes:
        noise_scale: Standard deviation of the noise on the sum: noise multiplier times the sensitivity that clipping declares.
        divisor: Public: sample rate times nominal size.
        rate: Learning rate.
        rescale: Factor on what is released (d / k, or 1).
        decay: Weight decay.
        momentum: Of the optimiser; needs a velocity when it is not 0.
    """

    noise_scale: float
    divisor: float
    rate: float
    rescale: float = 1.0
    decay: float = 0.0
    momentum: float = 0.0

    def step(
        self,
        parts: list[NDArray[np.float32]],
        total: NDArray[Any],
        source: NoiseSource,
        velocity: NDArray[np.float64] | None = None,
    ) -> None:
        """Move live weights in place by what one step releases.

        Args:
            parts: The weights, contiguous float32 vectors that have k values together (those of `PrivateGradient.live_values`).
            total: The clipped sum, shape (k,), float64. A sum of no examples gets its noise like any other.
            source: Gives every value a normal of its own, float64.
            velocity: Shape (k,), moved in place; None without momentum.

        Raises:
            ValueError: Parts, sum and velocity are not of one length.
        """
        edges = np.cumsum([0, *(part.size for part in parts)])
        if total.shape != (edges[-1],) or (velocity is not None and velocity.shape != total.shape):
            raise ValueError(f"a sum of shape {total.shape} or a velocity does not fit {edges[-1]} live values")
        total = np.ascontiguousarray(total, dtype=np.float64)
        kernel = compiled.load()
        stream = source.stream if kernel is not None and isinstance(source, SeededNoise) else None
        noise = source.normal(total.size) if stream is None else np.zeros(0)
        for values, start, stop in zip(parts, edges, edges[1:], strict=False):
            live = slice(start, stop)
            moving = None if velocity is None else velocity[live]
            if kernel is None:
                self._move(values, self._release(total[live], noise[live]), moving)
            else:
                drawn = (None, None, _address(noise[live])) if stream is None else (*stream.pointers, None)
                self._call(kernel, values, drawn, total[live], moving)

    def _release(self, total: NDArray[Any], noise: NDArray[np.float64]) -> NDArray[np.float64]:
        """What leaves the private side: (sum + scale * noise) / divisor, and its scale. `noised_descent` does the same."""
        mean: NDArray[np.float64] = (total + self.noise_scale * noise) / self.divisor
        return mean * self.rescale

    def _move(self, values: NDArray[np.float32], mean: NDArray[np.float64], velocity: NDArray[np.float64] | None) -> None:
        """SGD on released values. Without momentum the velocity is not kept.

        That is the same to the bit as a velocity times zero, but for the sign of a zero weight whose mean is -0.0.
        """
        now = values.astype(np.float64)
        if velocity is None:
            velocity = mean + self.decay * now
        else:
            velocity[:] = self.momentum * velocity + mean + self.decay * now
        values[:] = (now - self.rate * velocity).astype(np.float32)

    def _call(
        self,
        kernel: compiled.Kernel,
        values: NDArray[np.float32],
        noise: tuple[int | None, ...],
        total: NDArray[np.float64],
        velocity: NDArray[np.float64] | None,
    ) -> None:
        numbers = np.array([self.noise_scale, self.divisor, self.rescale, self.rate, self.decay, self.momentum])
        arrays = (total, numbers, velocity, values)
        kernel.library.noised_descent(*noise, values.size, *map(_address, arrays))


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data
