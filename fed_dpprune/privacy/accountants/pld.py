"""Privacy loss distributions by dp-accounting: the default accountant, tight and pessimistic.

The loss is put on a grid. dp-accounting's default grid of 1e-4 costs 0.1 to 0.3 s for each figure, too much for an
epsilon per round and client; a coarser grid is still an upper bound. `grid` takes the coarsest one whose error, by the
estimate below, stays under 1e-4 of epsilon, and never one finer than dp-accounting's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fed_dpprune.privacy import renyi
from fed_dpprune.privacy.history import Entry

GRIDS = (1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4)
GRID_ERROR = 1e-4
# Standard deviations between the mean of the loss and the epsilon of any delta in use (1e-12 is at 7.0).
TAIL = 7.0
# What a figure may cost, so that no setting takes more than a few seconds or a few hundred megabytes: see `load`.
MOST_POINTS, MOST_STEPS = 300_000, 1_000_000
GROUP_GRID, MOST_GROUP_POINTS = 5e-3, 1_000_000


def grid_error(history: Sequence[Entry], grid: float) -> float:
    """About how far a grid lifts epsilon: rounding adds up to grid^2 / 6 to the variance of each step's loss.

    The loss of a step has a variance of at least about (rate / noise)^2; half of the added variance goes to the mean.
    """
    steps = sum(entry.steps for entry in history)
    variance = sum(entry.steps * (entry.sample_rate / entry.noise_multiplier) ** 2 for entry in history)
    added = steps * grid * grid / 6.0
    return added / 2.0 + TAIL * (math.sqrt(variance + added) - math.sqrt(variance))


def grid(history: Sequence[Entry]) -> float:
    """The coarsest grid that is good enough; the same for equal histories, so equal histories have equal figures."""
    return next((grid for grid in GRIDS if grid_error(history, grid) <= GRID_ERROR), GRIDS[-1])


@lru_cache(maxsize=8)
def _one_step(noise_multiplier: float, sample_rate: float, grid: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=grid
    )


def _steps(entry: Entry, grid: float) -> Any:
    # Without sampling n steps are one step with less noise, exactly; this is also what dp-accounting does.
    if entry.sample_rate == 1.0:
        return _one_step(entry.noise_multiplier / math.sqrt(entry.steps), 1.0, grid)
    one = _one_step(entry.noise_multiplier, entry.sample_rate, grid)
    return one if entry.steps == 1 else one.self_compose(entry.steps)


def load(history: Sequence[Entry], delta: float) -> float:
    """What the figure costs told from bounds in milliseconds: above 1 it is not computed at all.

    The points of the grid up to the epsilon that whole-order RDP bounds it by, and the steps, each by the most allowed.
    """
    points = renyi.epsilon(history, delta) / grid(history)
    return max(points / MOST_POINTS, sum(entry.steps for entry in history) / MOST_STEPS)


def _epsilon(history: Sequence[Entry], delta: float) -> float:
    spacing = grid(history)
    composed = _steps(history[0], spacing)
    for entry in history[1:]:
        composed = composed.compose(_steps(entry, spacing))
    return float(composed.get_epsilon_for_delta(delta))


def epsilons(histories: Sequence[tuple[Entry, ...]], delta: float) -> list[float]:
    """Epsilon of each canonical history; for those whose `load` is at most 1."""
    return [_epsilon(history, delta) for history in histories]


def _reach(entry: Entry, examples: int) -> float:
    """About the largest loss of one step when all examples of a group are drawn."""
    shift = examples / entry.noise_multiplier
    return shift * (shift / 2.0 + 10.0)


def group_epsilon(history: Sequence[Entry], examples: int, delta: float) -> float:
    """Epsilon for adding or removing `examples` examples of one person together.

    The number of them in a batch is binomial, and each moves the sum by one clip norm at most: exact, but for the grid,
    which is coarser here (an upper bound within 0.01).

    Raises:
        OverflowError: A loss so large that its grid would not fit into memory.
    """
    from dp_accounting.pld import privacy_loss_distribution
    from scipy.stats import binom

    spacing = min(GROUP_GRID, 10 * grid(history))
    if any(_reach(entry, examples) / spacing > MOST_GROUP_POINTS for entry in history):
        raise OverflowError("the loss is too large for a grid")
    composed = None
    for entry in history:
        one = privacy_loss_distribution.from_mixture_gaussian_mechanism(
            entry.noise_multiplier,
            sensitivities=[float(drawn) for drawn in range(examples + 1)],
            sampling_probs=[float(chance) for chance in binom.pmf(range(examples + 1), examples, entry.sample_rate)],
            value_discretization_interval=spacing,
        ).self_compose(entry.steps)
        composed = one if composed is None else composed.compose(one)
    if composed is None:
        return 0.0
    return float(composed.get_epsilon_for_delta(delta))
