"""What an epsilon means, in words: printed with every one, because a number without its conditions claims nothing."""

from __future__ import annotations

from collections.abc import Sequence

from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.cache import Figures
from fed_dpprune.privacy.history import Entry, as_one

NEIGHBOURING, SAMPLER = "add-or-remove-one", "poisson"
SIMULATED = "a simulation: server and clients are one user's processes, so nothing is protected from whoever ran it"
ADVERSARY = "the server, the other clients and everyone who sees any message or the model"


def statement(
    epsilon: float,
    delta: float,
    *,
    accountant: str,
    noise_source: str,
    unit: str = "example",
    adversary: str = ADVERSARY,
    second: tuple[str, float] | None = None,
    side_releases: Sequence[str] = (),
    simulated: bool = False,
) -> str:
    """Two lines: the claim with all its conditions, and what it does not cover.

    Args:
        epsilon: Cumulative, of one client or the largest of all.
        delta: The claim's.
        accountant: That gave the figure.
        noise_source: "os-entropy" or "seeded-simulation".
        unit: Of privacy.
        adversary: Against whom the claim holds.
        second: An independent figure beside it: (accountant, epsilon).
        side_releases: What left unprotected beside the updates.
        simulated: Whether server and clients were processes of one user's simulation.
    """
    beside = f"; {second[0]} says {second[1]:.3f}" if second else ""
    claim = (
        f"epsilon {epsilon:.3f} at delta {delta:g} for adding or removing one {unit} of one client ({SAMPLER} sampling, "
        f"{table.version(accountant)}{beside}), against {adversary}"
    )
    limits = (
        f"all rounds and local steps together; a person with several {unit}s pays more, other runs on the same data add to it"
    )
    if noise_source == "seeded-simulation":
        limits += "; a simulation: its noise can be repeated by whoever knows the seed, so nothing is protected"
    elif simulated:
        limits += f"; {SIMULATED}"
    if side_releases:
        limits += f"; not covered, because released without noise: {', '.join(side_releases)}"
    return f"{claim}\n{limits}"


def heading(delta: float, accountant: str, *, unit: str = "example", adversary: str = ADVERSARY) -> str:
    """The conditions of all the epsilons that a run shows as it goes, said once before the first."""
    return (
        f"epsilon here: so far, largest client, at delta {delta:g} for adding or removing one {unit} of one client "
        f"({SAMPLER} sampling, {table.version(accountant)}), against {adversary}"
    )


def naive_sum(entries: Sequence[Entry], rounds: int, delta: float, accountant: str, cache: Figures | None = None) -> float:
    """What adding up one round at a time would have said: epsilon of one round, at delta / rounds, times the rounds.

    The delta of the sum is then the claim's own, so both figures speak of the same delta.
    """
    return rounds * table.epsilon(entries, delta / rounds, accountant, cache)


def naive_line(epsilon: float, entries: Sequence[Entry], rounds: int, delta: float, accountant: str) -> str:
    """The closing summary's comparison with adding up one round at a time."""
    naive = naive_sum(entries, rounds, delta, accountant)
    times = f", {naive / epsilon:.1f} times as much" if epsilon > 0 else ""
    return f"adding up one round at a time would have said {naive:.3f}{times}"


def group_price(
    history: Sequence[Entry], people_examples: int, delta: float, accountant: str = "pld", cache: Figures | None = None
) -> float:
    """Epsilon for a person with `people_examples` examples in one client, at the same delta.

    For pld it is exact: the number of the person's examples in a batch is binomial, and each moves the sum by at most one
    clip norm. For the others, and where that fails, it is a bound: at least one of the examples is drawn with probability
    1 - (1 - q)^k, and then the sum moves by at most k clip norms.

    Args:
        history: What one example is charged.
        people_examples: k, at least 1.
        delta: Of the group's claim.
        accountant: For the figures.
        cache: Where figures are kept.

    Raises:
        ValueError: k below 1.
    """
    if people_examples < 1:
        raise ValueError(f"a group has at least one example, not {people_examples!r}")
    if people_examples == 1 or not history:
        return table.epsilon(history, delta, accountant, cache)
    if accountant == "pld":
        return table.group_epsilon(history, people_examples, delta, cache)
    return table.epsilon(as_one(history, people_examples), delta, accountant, cache)
