"""From the clipped sum to new weights: the noise on every value, and the same bits with the kernel and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fed_dpprune import randomness
from fed_dpprune.dpsgd import compiled
from fed_dpprune.dpsgd.descent import Descent
from fed_dpprune.dpsgd.noise import SEEDED, SeededNoise

needs_kernel = pytest.mark.skipif(compiled.load() is None, reason="no C++ compiler")
SIZES = (5, 1, 3000, 1024, 0, 2049)
COUNT = sum(SIZES)


class Given:
    """Noise as the test says."""

    label = SEEDED

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.values = values

    def normal(self, count: int) -> NDArray[np.float64]:
        assert count == self.values.size
        return self.values


def weights() -> NDArray[np.float32]:
    """Ordinary ones, and what breaks shortcuts: both zeros, infinities, not a number, the smallest and the largest."""
    found = np.random.default_rng(0).normal(size=COUNT).astype(np.float32)
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38]
    found[7 : 7 + len(odd)] = odd
    return found


def clipped_sum() -> NDArray[np.float32]:
    found = np.random.default_rng(1).normal(size=COUNT).astype(np.float32)
    found[::5] = 0.0
    found[1::5] = -0.0
    return found


def run(descent: Descent, source: Any, steps: int, total: NDArray[Any]) -> tuple[bytes, bytes]:
    parts = [part.copy() for part in np.split(weights(), np.cumsum(SIZES)[:-1])]
    velocity = np.zeros(COUNT) if descent.momentum else None
    with np.errstate(invalid="ignore", over="ignore"):
        for _ in range(steps):
            descent.step(parts, total, source, velocity)
    return np.concatenate(parts).tobytes(), b"" if velocity is None else velocity.tobytes()


def in_one_line(descent: Descent, generator: np.random.Generator, steps: int, total: NDArray[Any]) -> tuple[bytes, bytes]:
    """Algorithm 1 of 1607.00133 and SGD as they are written down, with a velocity whatever the momentum."""
    now, velocity = weights().astype(np.float64), np.zeros(COUNT)
    with np.errstate(invalid="ignore", over="ignore"):
        for _ in range(steps):
            mean = (total.astype(np.float64) + descent.noise_scale * generator.standard_normal(COUNT)) / descent.divisor
            mean *= descent.rescale
            velocity = descent.momentum * velocity + mean + descent.decay * now
            now = (now - descent.rate * velocity).astype(np.float32).astype(np.float64)
    return now.astype(np.float32).tobytes(), velocity.tobytes() if descent.momentum else b""


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False], ids=["kernel", "numpy"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("rescale", [1.0, 10 / 3])
def test_a_step_is_the_formula_to_the_bit(monkeypatch, kernel, momentum, decay, rescale):
    """Passes that have nothing to add are left out; no bit tells, not on zeros of either sign nor on what is not finite."""
    if not kernel:
        monkeypatch.setattr(compiled, "load", lambda: None)
    descent = Descent(1.7, 30.5, 0.3, rescale, decay, momentum)
    got = run(descent, SeededNoise(4, "step"), 3, clipped_sum())
    assert got == in_one_line(descent, randomness.generator(4, "noise", "step"), 3, clipped_sum())


@needs_kernel
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_noise_that_the_kernel_draws_and_noise_that_is_given_to_it_do_the_same(monkeypatch, momentum):
    descent = Descent(1.7, 30.5, 0.3, 1.0, 0.01, momentum)
    drawn = run(descent, SeededNoise(4, "step"), 1, clipped_sum())
    given = Given(randomness.generator(4, "noise", "step").standard_normal(COUNT))
    assert run(descent, given, 1, clipped_sum()) == drawn
    exact = run(descent, given, 1, clipped_sum().astype(np.float64))  # a float64 sum: numpy's work
    monkeypatch.setattr(compiled, "load", lambda: None)
    assert run(descent, given, 1, clipped_sum()) == drawn == exact


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_value_gets_noise_of_its_own_of_the_scale_that_was_asked_for(momentum):
    descent = Descent(noise_scale=2.5, divisor=10.0, rate=1.0, momentum=momentum)
    parts = [np.zeros(size, dtype=np.float32) for size in (5000, 3, 5000)]
    velocity = np.zeros(10_003) if momentum else None
    descent.step(parts, np.zeros(10_003, dtype=np.float32), SeededNoise(5), velocity)
    moved = np.concatenate(parts)
    assert len(set(moved.tolist())) > 9990
    assert abs(moved.std() - 0.25) < 5 * 0.25 / np.sqrt(2 * 10_003)


def test_lengths_that_do_not_fit_are_refused_before_anything_moves():
    parts, descent = [np.ones(4, dtype=np.float32)], Descent(1.0, 1.0, 1.0, momentum=0.5)
    for total, velocity in ((np.zeros(5, np.float32), None), (np.zeros(4, np.float32), np.zeros(3))):
        with pytest.raises(ValueError, match="does not fit 4 live values"):
            descent.step(parts, total, SeededNoise(1), velocity)
    assert parts[0].tolist() == [1.0] * 4
