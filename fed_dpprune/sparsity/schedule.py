"""When sparsity changes: the freeze rate of each round, and how many coordinates live. Counts only, no draws.

Random freeze raises its rate over the run (arXiv 2112.00845, Algorithm 1: rate * s / (E - 1) in slot s of E); an early
plateau is the `freeze_end` of the same authors' code. One slot is one federated round here.
"""

from __future__ import annotations

import builtins
import math

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.sparsity.support import frozen_count

STEP_LEVELS = 4


def freeze_rate(freeze: config.Freeze, round: int, rounds: int) -> float:
    """The share of the survivors that is frozen in a round.

    With x = (round - 1) / (R - 1), where R = max(1, ramp-end * rounds rounded) is the round that reaches the final rate:
    `constant` rate in every round; `linear` rate * x; `cosine` rate * (1 - cos(pi x)) / 2, flat at both ends; `step` four
    equal stretches at 0, 1/3, 2/3 and 1 of the rate. From round R on all of them stay at the rate, and R = 1 (a run of
    one round, or a ramp that ends in the first) gives the rate at once: the published formula divides by zero there.

    Args:
        freeze: The config's `sparsity.freeze`.
        round: 1..rounds.
        rounds: Rounds of the whole run.

    Raises:
        ValueError: `round` is outside 1..rounds.
    """
    if not 1 <= round <= rounds:
        raise ValueError(f"round {round} is outside 1..{rounds}")
    if freeze.method == "none":
        return 0.0
    last = max(1, builtins.round(freeze.ramp_end * rounds))
    done = round - 1
    if freeze.ramp == "constant" or done >= last - 1:
        return freeze.rate
    if freeze.ramp == "linear":
        return min(freeze.rate, freeze.rate * done / (last - 1))
    if freeze.ramp == "cosine":
        # Rounded, so that a last bit of some machine's cosine cannot shift a count between the two ends.
        return min(freeze.rate, builtins.round(freeze.rate * (1 - math.cos(math.pi * done / (last - 1))) / 2, 12))
    level = min(STEP_LEVELS - 1, STEP_LEVELS * done // (last - 1))
    return min(freeze.rate, freeze.rate * level / (STEP_LEVELS - 1))


def live_count(freeze: config.Freeze, survivors: int, round: int, rounds: int) -> int:
    """How many of `survivors` (coordinates, or groups of them) the freeze leaves alive in a round: exact."""
    return survivors - frozen_count(freeze_rate(freeze, round, rounds), survivors)


def step_live_count(sparsity: config.Sparsity, survivors: int, round: int, rounds: int) -> int:
    """How many of `survivors` live in one local step of a round, after freeze and drop: exact."""
    live = live_count(sparsity.freeze, survivors, round, rounds)
    return live if sparsity.drop.method == "none" else live - frozen_count(sparsity.drop.rate, live)


def steps_differ(sparsity: config.Sparsity) -> bool:
    """Whether the local steps of one round have different supports."""
    return sparsity.drop.method == "random" or (sparsity.freeze.method == "random" and sparsity.freeze.refresh == "step")


def live_by_round(
    sparsity: config.Sparsity,
    survivors: int,
    rounds: int,
    *,
    local_steps: int | None = None,
    group_sizes: NDArray[np.int64] | None = None,
) -> list[int]:
    """The live count k of every round's support, or the least upper bound that counting can give.

    Exact when all steps of a round share one support and the granularity is `element`. Otherwise a bound: the round's
    support is the union of its steps' supports, whose size only drawing tells (`recipe.drawn_live_by_round` draws).

    Args:
        sparsity: The config's `sparsity`.
        survivors: Coordinates that survive pre-pruning.
        rounds: Rounds of the run.
        local_steps: Steps of a round; None bounds any number of them.
        group_sizes: Survivors in each group, for a granularity other than `element`.

    Raises:
        ValueError: A granularity other than `element` without `group_sizes`.
    """
    if sparsity.granularity != "element" and group_sizes is None:
        raise ValueError(f"the counts of granularity {sparsity.granularity!r} need the sizes of its groups")
    sizes = None if group_sizes is None else np.sort(group_sizes)[::-1]
    items = survivors if sizes is None else int(sizes.size)
    counts = []
    for round in range(1, rounds + 1):
        each = step_live_count(sparsity, items, round, rounds)
        per_step_freeze = sparsity.freeze.method == "random" and sparsity.freeze.refresh == "step"
        most = items if per_step_freeze else live_count(sparsity.freeze, items, round, rounds)
        if not steps_differ(sparsity):
            most = each
        elif local_steps is not None:
            most = min(most, local_steps * each)
        counts.append(most if sizes is None else int(sizes[:most].sum()))
    return counts
