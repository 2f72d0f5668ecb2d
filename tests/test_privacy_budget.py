"""The rule that is enforced: any accountant within one declared schedule, the filter of one fixed order beyond it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpprune.privacy import budget, renyi
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.budget import Account, Declaration
from fed_dpprune.privacy.history import Entry

DELTA = 1e-5
ROUND = (Entry(1.0, 0.01, 10),)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path))


def _charge(
    account: Account, run: str, entries: tuple[Entry, ...], rounds: int = 20, limit: float | None = None
) -> budget.Verdict:
    verdict = account.after(run, entries, rounds=rounds, accountant="rdp", max_epsilon=limit)
    account.add(run, account.last_round.get(run, 0) + 1, entries, verdict.declaration)
    return verdict


ROOMS = [(1, 16, 0.4818), (1, 32, 0.7722), (1, 64, 0.8990), (2, 8, 0.7859), (2, 16, 1.4818), (4, 4, 0.9121), (8, 4, 4.9121)]


@pytest.mark.parametrize(("epsilon", "order", "room"), ROOMS)
def test_the_filters_room_has_the_known_values(epsilon: float, order: int, room: float) -> None:
    assert epsilon - renyi.conversion(order, DELTA) == pytest.approx(room, abs=1e-4)


@pytest.mark.parametrize(("epsilon", "order", "steps"), [(2, 6, 408), (2, 8, 879), (4, 6, 3835), (8, 4, 13526), (4, 10, 80)])
def test_the_filter_stops_after_the_known_number_of_steps(epsilon: float, order: int, steps: int) -> None:
    account = Account(DELTA, Declaration("first", 1, (Entry(1.0, 0.01, 1),), order))
    account.add("first", 1, (Entry(1.0, 0.01, 1),), None)
    left = account.rounds_left((Entry(1.0, 0.01, 1),), accountant="pld", max_epsilon=epsilon)
    assert left + 1 == pytest.approx(steps, abs=1)


def test_the_order_is_the_one_that_lasts_longest_within_the_limit() -> None:
    order = budget.choose_order((Entry(1.0, 0.01, 1),), 100, DELTA, 2.0)
    lasting = {o: (2.0 - renyi.conversion(o, DELTA)) / renyi.divergence(1.0, 0.01, o) for o in renyi.ORDERS}
    assert order == max(lasting, key=lambda o: lasting[o]) == 8


def test_a_declared_schedule_is_counted_by_its_accountant() -> None:
    account = Account(DELTA)
    for count in range(1, 4):
        verdict = _charge(account, "one", ROUND, rounds=3)
        assert verdict.rule == "schedule"
        assert verdict.epsilon == table.epsilon([Entry(1.0, 0.01, 10 * count)], DELTA, "rdp")


@pytest.mark.parametrize(
    ("run", "entries"),
    [("two", ROUND), ("one", (Entry(1.1, 0.01, 10),)), ("one", (Entry(1.0, 0.02, 10),)), ("one", (Entry(1.0, 0.01, 11),))],
    ids=["another run", "other noise", "other rate", "other steps"],
)
def test_whatever_was_not_declared_goes_through_the_filter_for_good(run: str, entries: tuple[Entry, ...]) -> None:
    account = Account(DELTA)
    _charge(account, "one", ROUND)
    changed = _charge(account, run, entries)
    assert changed.rule == "filter"
    order = account.declaration.order if account.declaration else 0
    expected = renyi.spent((*ROUND, *entries), order) + renyi.conversion(order, DELTA)
    assert changed.epsilon == pytest.approx(expected, rel=1e-12)
    assert _charge(account, "one", ROUND).rule == "filter", "the schedule cannot be taken up again"


def test_more_rounds_than_declared_go_through_the_filter() -> None:
    account = Account(DELTA)
    assert [_charge(account, "one", ROUND, rounds=2).rule for _ in range(3)] == ["schedule", "schedule", "filter"]


def test_the_order_stays_when_limit_and_setting_change() -> None:
    account = Account(DELTA)
    _charge(account, "one", ROUND, limit=2.0)
    assert account.declaration is not None
    order = account.declaration.order
    _charge(account, "two", (Entry(4.0, 1.0, 1),), limit=8.0)
    assert account.declaration.order == order


def test_a_schedule_that_the_filter_could_not_hold_closes_the_ledger_to_others() -> None:
    rounds = 120
    assert table.epsilon([Entry(1.0, 0.01, 10 * rounds)], DELTA, "pld") <= 2.0
    account = Account(DELTA)
    assert _charge(account, "one", ROUND, rounds=rounds, limit=2.0).epsilon <= 2.0
    assert account.after("two", ROUND, rounds=1, accountant="pld", max_epsilon=2.0).epsilon == math.inf
    assert account.rounds_left(ROUND, accountant="pld", max_epsilon=2.0) == 0
    assert account.after("one", ROUND, rounds=rounds, accountant="pld", max_epsilon=2.0).epsilon <= 2.0


def test_a_second_run_never_costs_less_than_the_same_steps_in_one_schedule() -> None:
    account = Account(DELTA)
    _charge(account, "one", ROUND)
    second = _charge(account, "two", ROUND)
    assert second.epsilon >= table.epsilon([Entry(1.0, 0.01, 20)], DELTA, "rdp")
    assert second.run_epsilon <= second.epsilon


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.floats(0.8, 4), st.floats(0.01, 0.5), st.integers(1, 5)), max_size=6),
    st.floats(0.5, 8.0),
)
@settings(max_examples=15, deadline=None)
def test_under_the_filter_the_spent_divergence_never_passes_the_room(
    requests: list[tuple[str, float, float, int]], limit: float
) -> None:
    account = Account(DELTA)
    _charge(account, "first", (Entry(3.0, 0.1, 1),), rounds=1, limit=limit)
    for run, noise, rate, steps in requests:
        entries = (Entry(noise, rate, steps),)
        verdict = account.after(run, entries, rounds=5, accountant="rdp", max_epsilon=limit)
        if verdict.epsilon <= limit:
            account.add(run, account.last_round.get(run, 0) + 1, entries, None)
    assert account.declaration is not None
    order = account.declaration.order
    if account.history != (Entry(3.0, 0.1, 1),):
        assert renyi.spent(account.history, order) <= limit - renyi.conversion(order, DELTA) + 1e-12


def test_rounds_left_of_an_untouched_ledger_are_those_of_a_declared_schedule() -> None:
    left = Account(DELTA).rounds_left(ROUND, accountant="rdp", max_epsilon=2.0)
    fits, too_long = table.epsilon_curve(1.0, 0.01, [10 * left, 10 * (left + 1)], DELTA, "rdp")
    assert fits <= 2.0 < too_long


def test_declarations_and_entries_survive_their_text() -> None:
    declared = Declaration("run", 7, (Entry(0.1 + 0.2, 1 / 3, 3), Entry(2.0, 1.0, 1)), 12)
    again = Declaration.from_text(declared.text())
    assert (again.run, again.rounds, again.order) == ("run", 7, 12)
    assert set(again.entries) == set(declared.entries)
