"""The rule that is enforced: what a client has spent, as epsilon, and whether one more charge fits below a limit.

Two rules, both checked on the state after the charge, never before it (reference: Rogers et al. 1605.08294):

- `schedule`: as long as all charges belong to the schedule that the first one declared (its run, its setting, at most its
  rounds), nothing about noise, rate and length depends on what was released, and any accountant is sound.
- `filter`: anything else (a second run on the same ledger, a changed setting, more rounds) may have been chosen after
  outputs were seen. Then the divergences of all charges are added at one Renyi order, fixed with the first charge, which
  is sound under full adaptivity (Feldman and Zrnic 2008.11193). A schedule that was declared so long that it does not fit
  the filter itself closes the ledger for any other, also when it stopped early: else the choice between going on and
  starting anew would depend on outputs and be covered by neither rule.

Lives here: the rule, pure. Does not live here: how it is made to last (`ledger.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from fed_dpprune.privacy import renyi
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.cache import Figures
from fed_dpprune.privacy.history import Entry, merge

SCHEDULE, FILTER = "schedule", "filter"
MOST_ROUNDS = 1 << 24
# What one client's account may hold: every further charge reads it all again, and a server chooses how many there are.
MOST_CHARGES, MOST_SETTINGS = 100_000, 1_024


def entries_text(entries: Sequence[Entry]) -> str:
    """Entries as canonical JSON: [[noise multiplier, sample rate, steps], ...]; floats to the last bit."""
    return json.dumps([[entry.noise_multiplier, entry.sample_rate, entry.steps] for entry in merge(entries)])


def entries_from(text: str) -> tuple[Entry, ...]:
    """Read what `entries_text` wrote; raises ValueError or TypeError when it is something else."""
    return tuple(Entry(float(noise), float(rate), steps) for noise, rate, steps in json.loads(text))


def repeated(entries: Sequence[Entry], times: int) -> tuple[Entry, ...]:
    """The entries of one round as those of many."""
    return tuple(Entry(entry.noise_multiplier, entry.sample_rate, entry.steps * times) for entry in entries)


@dataclass(frozen=True)
class Declaration:
    """What the first charge of a client fixed for good: the schedule, and the order of the filter.

    `entries` are those of one round. All four are public and known before any data was touched.
    """

    run: str
    rounds: int
    entries: tuple[Entry, ...]
    order: int

    def text(self) -> str:
        """As canonical JSON."""
        return json.dumps([self.run, self.rounds, json.loads(entries_text(self.entries)), self.order])

    @classmethod
    def from_text(cls, text: str) -> Declaration:
        """Read what `text` wrote."""
        run, rounds, entries, order = json.loads(text)
        return cls(str(run), int(rounds), entries_from(json.dumps(entries)), int(order))


@lru_cache(maxsize=4096)
def choose_order(entries: tuple[Entry, ...], rounds: int, delta: float, max_epsilon: float | None) -> int:
    """The filter's order: the one that lets the declared setting go on longest within the limit.

    Without a limit, the one that makes two of the declared schedules cheapest.
    """

    def room(order: int) -> float:
        left = (max_epsilon or 0.0) - renyi.conversion(order, delta)
        return left / max(renyi.spent(entries, order), 1e-300)

    if max_epsilon is not None and any(room(order) > 0 for order in renyi.ORDERS):
        return max(renyi.ORDERS, key=room)
    twice = repeated(entries, 2 * rounds)
    return min(renyi.ORDERS, key=lambda order: renyi.spent(twice, order) + renyi.conversion(order, delta))


@dataclass(frozen=True)
class Verdict:
    """What a proposed charge would bring the client to: its epsilon, by which rule, and that of its run alone."""

    epsilon: float
    run_epsilon: float
    rule: str
    declaration: Declaration | None


@dataclass
class Account:
    """The running state of one client, rebuilt from the ledger's rows.

    Attributes:
        delta: At which everything is counted.
        declaration: Of the first charge; None while there is none.
        scheduled: Whether all charges so far belong to the declared schedule.
        by_run: Merged entries of each run.
        rounds: Number of charges of each run.
        last_round: Largest round charged of each run.
    """

    delta: float
    declaration: Declaration | None = None
    scheduled: bool = True
    by_run: dict[str, tuple[Entry, ...]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    last_round: dict[str, int] = field(default_factory=dict)

    @property
    def history(self) -> tuple[Entry, ...]:
        """All that was spent, in canonical form."""
        return merge(entry for entries in self.by_run.values() for entry in entries)

    def _belongs(self, run: str, entries: tuple[Entry, ...]) -> bool:
        declared = self.declaration
        return (
            self.scheduled
            and declared is not None
            and run == declared.run
            and entries == declared.entries
            and self.rounds.get(run, 0) < declared.rounds
        )

    def full(self, entries: Sequence[Entry]) -> bool:
        """Whether one more charge would make the account too long to be counted in bounded time."""
        settings = {(entry.noise_multiplier, entry.sample_rate) for spent in self.by_run.values() for entry in spent}
        settings |= {(entry.noise_multiplier, entry.sample_rate) for entry in entries}
        return sum(self.rounds.values()) >= MOST_CHARGES or len(settings) > MOST_SETTINGS

    def add(self, run: str, round: int, entries: Sequence[Entry], declaration: Declaration | None) -> None:
        """Take one charge into the state."""
        merged = merge(entries)
        if self.declaration is None:
            self.declaration = declaration
        self.scheduled = self._belongs(run, merged)
        self.by_run[run] = merge((*self.by_run.get(run, ()), *merged))
        self.rounds[run] = self.rounds.get(run, 0) + 1
        self.last_round[run] = max(self.last_round.get(run, 0), round)

    def filtered(self, history: Sequence[Entry], max_epsilon: float | None) -> float:
        """Epsilon of a history by the filter; infinity when the declared schedule leaves no room for it."""
        declared = self.declaration
        if declared is None:
            return renyi.epsilon(history, self.delta)
        lift = renyi.conversion(declared.order, self.delta)
        whole = renyi.spent(repeated(declared.entries, declared.rounds), declared.order) + lift
        if max_epsilon is not None and whole > max_epsilon:
            return math.inf
        return max(0.0, renyi.spent(history, declared.order) + lift)

    def after(
        self,
        run: str,
        entries: Sequence[Entry],
        *,
        rounds: int,
        accountant: str,
        max_epsilon: float | None,
        ahead: int = 1,
        cache: Figures | None = None,
    ) -> Verdict:
        """What one more charge would lead to; changes nothing.

        Args:
            run: The run that asks.
            entries: The charge.
            rounds: How many rounds the run declares; counts for a client's first charge.
            accountant: For charges within the declared schedule.
            max_epsilon: The client's limit, None for none.
            ahead: How many rounds to compute at once, at most, where a figure is not known yet; a client that is a new
                process every round loads the accountant's libraries once in `ahead` rounds then. Fewer where one costs much.
            cache: Where figures are kept.
        """
        merged = merge(entries)
        if self.declaration is None:
            order = choose_order(merged, rounds, self.delta, max_epsilon)
            fresh = Declaration(run, rounds, merged, order)
            figure = self._by_accountant((), merged, min(rounds, ahead), accountant, max_epsilon, cache)
            return Verdict(figure, figure, SCHEDULE, fresh)
        run_before = self.by_run.get(run, ())
        if self._belongs(run, merged):
            left = self.declaration.rounds - self.rounds.get(run, 0)
            figure = self._by_accountant(run_before, merged, min(left, ahead), accountant, max_epsilon, cache)
            return Verdict(figure, figure, SCHEDULE, None)
        total = self.filtered(merge((*self.history, *merged)), max_epsilon)
        return Verdict(total, renyi.epsilon(merge((*run_before, *merged)), self.delta), FILTER, None)

    def _by_accountant(
        self,
        before: Sequence[Entry],
        entries: tuple[Entry, ...],
        ahead: int,
        accountant: str,
        max_epsilon: float | None,
        cache: Figures | None,
    ) -> float:
        """Epsilon after the charge; when it is not known yet and fits, the rounds that follow are computed with it.

        A charge that is refused costs one figure and leaves none: its setting is the server's, who may send many.
        """

        def fits(figure: float) -> bool:
            return max_epsilon is None or figure <= max_epsilon

        def figures(times: Sequence[int]) -> list[float]:
            return table.epsilons([(*before, *repeated(entries, n)) for n in times], self.delta, accountant, cache, fits)

        fresh = ahead > 1 and not table.known((*before, *entries), self.delta, accountant, cache)
        (figure,) = figures([1])
        if fresh and fits(figure):
            load = table.load((*before, *repeated(entries, ahead)), self.delta, accountant)
            figures(range(2, min(ahead, int(1.0 / max(load, 1.0 / ahead))) + 1))
        return figure

    def rounds_left(self, entries: Sequence[Entry], *, accountant: str, max_epsilon: float, cache: Figures | None = None) -> int:
        """How many rounds of this setting a new run may still have, by the rule that will be enforced."""
        merged = merge(entries)
        if self.declaration is None:
            return _most(lambda count: table.epsilon(repeated(merged, count), self.delta, accountant, cache) <= max_epsilon)
        return _most(lambda count: self.filtered((*self.history, *repeated(merged, count)), max_epsilon) <= max_epsilon)


def _most(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, for a test that is true up to some count; at most MOST_ROUNDS."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
        if low >= MOST_ROUNDS:
            return MOST_ROUNDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
