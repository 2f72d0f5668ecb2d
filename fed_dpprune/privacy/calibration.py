"""Which noise, or how many steps, meet a target epsilon: counted in steps, never in epochs.

The search brackets with whole-order RDP (a millisecond a call), then narrows with the accountant that will check the
budget, so that what was calibrated is what is enforced. Results are kept between processes by `cache.Figures`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fed_dpprune.errors import ConfigError
from fed_dpprune.privacy import renyi
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.cache import Figures
from fed_dpprune.privacy.history import Entry

TOLERANCE = 1e-4
LEAST_NOISE, MOST_NOISE = 1e-2, 1e6
MOST_STEPS = 10**9


def _check(epsilon: float, delta: float, accountant: str) -> None:
    table.lookup(accountant)
    table.check_delta(delta)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError("privacy.epsilon", f"{epsilon!r} is not above 0", "use for example 2.0")


def _bracket(cost: Callable[[float], float], target: float) -> float:
    """The least noise, within one part in a thousand, at which a cheap bound meets the target."""
    low, high = LEAST_NOISE, LEAST_NOISE
    while cost(high) > target and high < MOST_NOISE:
        low, high = high, high * 2.0
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high


def _search(cost: Callable[[float], float], target: float, start: float) -> float:
    """The least noise with cost <= target, from a start near it: secant on logarithms, then a step to close the bracket.

    Returns:
        A noise that meets the target while (1 - TOLERANCE) times it does not.
    """
    high, cost_high = start, cost(start)
    while cost_high > target:
        if high > MOST_NOISE:
            return math.inf
        high *= 1.05
        cost_high = cost(high)
    low, cost_low = high / 1.1, cost(high / 1.1)
    while cost_low <= target:
        if low < LEAST_NOISE:
            return low
        high, cost_high = low, cost_low
        low /= 1.3
        cost_low = cost(low)
    while high / low > 1.0 + TOLERANCE:
        guess = math.sqrt(low * high)
        if cost_high > 0 and math.isfinite(cost_low) and cost_low > cost_high:
            share = math.log(cost_low / target) / math.log(cost_low / cost_high)
            guess = low * (high / low) ** min(max(share, 0.0), 1.0)
        # Aim a little to each side in turn: a guess that is right to 4e-5 then closes the bracket in two calls.
        for aim in (1.0 + 0.4 * TOLERANCE, 1.0 - 0.4 * TOLERANCE):
            trial = min(max(guess * aim, low * (1.0 + 0.1 * TOLERANCE)), high * (1.0 - 0.1 * TOLERANCE))
            if not low < trial < high:
                trial = math.sqrt(low * high)
            paid = cost(trial)
            if paid <= target:
                high, cost_high = trial, paid
            else:
                low, cost_low = trial, paid
            if high / low <= 1.0 + TOLERANCE:
                break
    return high


def noise_multiplier(
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "pld",
    cache: Figures | None = None,
) -> float:
    """The least noise multiplier, within 1e-4 of itself and on the safe side, that keeps `steps` steps within epsilon.

    Args:
        epsilon: The budget of all steps together.
        delta: The claim's delta.
        sample_rate: Of every step.
        steps: All private steps of the schedule, local steps included.
        accountant: The one that will also check the budget.
        cache: Where figures are kept between processes.

    Raises:
        ConfigError: A target that cannot be met by any noise (an accountant with a floor), or impossible arguments.
    """
    _check(epsilon, delta, accountant)
    Entry(1.0, sample_rate, steps)
    cache = cache or Figures()
    family = f"noise {table.version(accountant)} revision {table.REVISION}"
    key = f"epsilon {epsilon!r} delta {delta!r} rate {sample_rate!r} steps {steps}"
    known = cache.read(family).get(key)
    if known is not None:
        return known

    start = _bracket(lambda noise: renyi.epsilon((Entry(noise, sample_rate, steps),), delta), epsilon)
    found = _search(lambda noise: table.compute((Entry(noise, sample_rate, steps),), delta, accountant)[0], epsilon, start)
    if not math.isfinite(found):
        raise ConfigError(
            "privacy.epsilon",
            f"no noise reaches {epsilon} at delta {delta} in {steps} steps by {accountant}",
            "ask for a larger epsilon or fewer rounds, or use another privacy.accountant",
        )
    cache.add(family, {key: found})
    return found


def max_steps(
    epsilon: float,
    delta: float,
    sample_rate: float,
    noise_multiplier: float,
    accountant: str = "pld",
    multiple: int = 1,
    spent: tuple[Entry, ...] = (),
    cache: Figures | None = None,
) -> int:
    """The most steps of one setting that keep the total within epsilon.

    Args:
        epsilon: The budget.
        delta: The claim's delta.
        sample_rate: Of every further step.
        noise_multiplier: Of every further step.
        accountant: The one that checks the budget.
        multiple: Steps of one round; the answer is a multiple of it.
        spent: What is already in the ledger.
        cache: Where figures are kept between processes.

    Returns:
        A count with epsilon(spent + count) <= epsilon < epsilon(spent + count + multiple); 0 when not even one fits.
    """
    _check(epsilon, delta, accountant)
    Entry(noise_multiplier, sample_rate, multiple)

    def fits(rounds: int) -> bool:
        further = Entry(noise_multiplier, sample_rate, rounds * multiple)
        return table.epsilon((*spent, further), delta, accountant, cache) <= epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
        if high * multiple > MOST_STEPS:
            return low * multiple
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * multiple
