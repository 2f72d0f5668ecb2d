"""Accountants: published values, upstream's own figures, and the properties that every sound accountant has."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpprune.errors import ConfigError
from fed_dpprune.privacy import calibration, renyi
from fed_dpprune.privacy.accountants import pld, table
from fed_dpprune.privacy.budget import Account
from fed_dpprune.privacy.history import Entry, merge

# (sample rate, noise multiplier, steps, delta) -> Opacus rdp, Opacus prv, dp-accounting rdp, dp-accounting pld.
KNOWN: list[tuple[list[tuple[float, float, int]], float, float, float, float, float]] = [
    ([(1, 4, 1)], 1e-5, 1.0126, 0.9364, 1.0126, 0.9263),
    ([(1, 1, 1)], 1e-5, 4.7285, 4.3874, 4.7285, 4.3772),
    ([(1, 10, 100)], 1e-5, 4.7285, 4.3874, 4.7285, 4.3772),
    ([(0.01, 1, 1)], 1e-5, 0.9555, 0.2096, 0.9555, 0.1995),
    ([(0.01, 1, 100)], 1e-5, 1.2141, 0.7281, 1.2141, 0.7180),
    ([(0.01, 1, 1000)], 1e-5, 2.1014, 1.8384, 2.1014, 1.8282),
    ([(0.01, 0.8, 1000)], 1e-5, 3.6954, 3.1513, 3.6956, 3.1410),
    ([(0.01, 1.1, 10000)], 1e-5, 5.6320, 5.2029, 5.6320, 5.1926),
    ([(256 / 60000, 1.1, 14063)], 1e-5, 2.5967, 2.3918, 2.5967, 2.3818),
    ([(0.1, 2, 500)], 1e-5, 6.0343, 5.5658, 6.0346, 5.5555),
    ([(0.1, 1, 100)], 1e-5, 7.8993, 7.0571, 7.9039, 7.0466),
    ([(0.05, 1, 200)], 1e-6, 6.0966, 5.4962, 6.0971, 5.4859),
    ([(0.001, 0.6, 1000)], 1e-6, 3.1410, 2.1170, 3.1410, 2.1067),
    ([(0.25, 4, 300)], 1e-5, 5.3817, 4.9795, 5.3834, 4.9692),
    ([(0.5, 5, 50)], 1e-5, 3.3087, 3.0514, 3.3098, 3.0413),
    ([(0.01, 1, 500), (0.02, 1.3, 300)], 1e-5, 2.1052, 1.8622, 2.1052, 1.8520),
    (
        [(0.01, 1, 500), (0.02, 1.3, 300), (0.005, 0.9, 700), (0.1, 2, 50), (0.03, 1.5, 10)],
        1e-5,
        2.9477,
        2.6835,
        2.9477,
        2.6733,
    ),
]


def _history(rows: list[tuple[float, float, int]]) -> list[Entry]:
    return [Entry(float(noise), float(rate), steps) for rate, noise, steps in rows]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "_memory", {})


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: str(row[0][0]))
def test_pld_and_rdp_give_the_known_values(row: Any) -> None:
    rows, delta, _, _, rdp, pld_value = row
    assert table.epsilon(_history(rows), delta, "pld") == pytest.approx(pld_value, abs=2e-3)
    assert table.epsilon(_history(rows), delta, "rdp") == pytest.approx(rdp, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("row", KNOWN, ids=lambda row: str(row[0][0]))
def test_prv_lies_at_most_fifteen_thousandths_above_pld(row: Any) -> None:
    rows, delta, _, prv, _, _ = row
    figure = table.epsilon(_history(rows), delta, "prv")
    assert figure == pytest.approx(prv, abs=2e-3)
    assert 0 <= figure - table.epsilon(_history(rows), delta, "pld") <= 0.015


def _upstream_rdp(history: list[Entry], delta: float) -> float:
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant()
    for entry in history:
        gaussian = dp_accounting.GaussianDpEvent(entry.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(entry.sample_rate, gaussian), entry.steps)
    return float(accountant.get_epsilon(delta))


def _upstream_pld(history: list[Entry], delta: float) -> float:
    import dp_accounting

    accountant = dp_accounting.pld.PLDAccountant()
    for entry in history:
        gaussian = dp_accounting.GaussianDpEvent(entry.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(entry.sample_rate, gaussian), entry.steps)
    return float(accountant.get_epsilon(delta))


def _random_history(rng: random.Random, entries: int) -> list[Entry]:
    return [
        Entry(10 ** rng.uniform(-0.2, 1.1), min(1.0, 10 ** rng.uniform(-3, 0.05)), int(10 ** rng.uniform(0, 2.5)))
        for _ in range(rng.randint(1, entries))
    ]


def _compare(upstream: Callable[[list[Entry], float], float], name: str, count: int, entries: int, within: float) -> None:
    rng = random.Random(20)
    for _ in range(count):
        history, delta = _random_history(rng, entries), rng.choice([1e-3, 1e-5, 1e-6])
        ours, theirs = table.epsilon(history, delta, name), upstream(history, delta)
        assert ours == pytest.approx(theirs, abs=within), (history, delta)


def test_rdp_is_upstreams_figure_for_random_histories() -> None:
    _compare(_upstream_rdp, "rdp", 8, 3, 1e-6)


def test_pld_is_upstreams_figure_for_random_histories() -> None:
    _compare(_upstream_pld, "pld", 3, 2, 2e-3)


@pytest.mark.slow
def test_rdp_is_upstreams_figure_for_a_thousand_random_histories() -> None:
    _compare(_upstream_rdp, "rdp", 1000, 4, 1e-6)


@pytest.mark.slow
def test_pld_is_upstreams_figure_for_fifty_random_histories() -> None:
    _compare(_upstream_pld, "pld", 50, 3, 2e-3)


@pytest.mark.slow
def test_the_chosen_grid_is_pessimistic_and_good_to_a_ten_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    for _ in range(25):
        history, delta = merge(_random_history(rng, 1)), rng.choice([1e-3, 1e-5, 1e-6])
        if renyi.epsilon(history, delta) > 30:
            continue
        chosen = pld.epsilons([history], delta)[0]
        with monkeypatch.context() as patch:
            patch.setattr(pld, "GRIDS", (pld.GRIDS[-1],))
            finest = pld.epsilons([history], delta)[0]
        assert -1e-9 <= chosen - finest <= 1e-4, history


@pytest.mark.parametrize("name", ["pld", "rdp"])
def test_an_empty_history_costs_nothing(name: str) -> None:
    assert table.epsilon([], 1e-5, name) == 0.0
    assert table.epsilon_curve(1.0, 0.1, [0, 0], 1e-5, name) == [0.0, 0.0]


@pytest.mark.parametrize("name", ["pld", "rdp"])
def test_the_curve_is_the_epsilon_of_each_prefix_to_the_last_bit(name: str) -> None:
    steps = [0, 2, 4, 10, 40]
    curve = table.epsilon_curve(2.7, 0.5, steps, 1e-3, name)
    table._memory.clear()
    assert curve[1:] == [table.epsilon([Entry(2.7, 0.5, 1)] * count, 1e-3, name) for count in steps[1:]]
    assert curve == sorted(curve)


@pytest.mark.parametrize("name", ["pld", "rdp"])
def test_order_and_splitting_do_not_matter_to_the_last_bit(name: str) -> None:
    a, b = Entry(1.3, 0.02, 30), Entry(1.0, 0.01, 50)
    halves = [Entry(1.3, 0.02, 10), b, Entry(1.3, 0.02, 20)]
    figures = {table.epsilon(history, 1e-5, name) for history in ([a, b], [b, a], halves)}
    assert len(figures) == 1


@given(
    noise=st.floats(0.7, 5.0),
    rate=st.floats(0.005, 0.5),
    steps=st.integers(1, 60),
    delta=st.sampled_from([1e-3, 1e-5]),
)
@settings(max_examples=5, deadline=None)
def test_more_noise_less_sampling_and_fewer_steps_cost_less(noise: float, rate: float, steps: int, delta: float) -> None:
    for name, slack in (("pld", 1e-4), ("rdp", 1e-9)):
        base = table.compute((Entry(noise, rate, steps),), delta, name)[0]
        assert table.compute((Entry(noise * 1.2, rate, steps),), delta, name)[0] <= base + slack
        assert table.compute((Entry(noise, rate * 0.8, steps),), delta, name)[0] <= base + slack
        assert table.compute((Entry(noise, rate, steps + 20),), delta, name)[0] >= base - slack


@given(noise=st.floats(0.6, 8.0), rate=st.floats(0.001, 1.0), steps=st.integers(1, 300))
@settings(max_examples=8, deadline=None)
def test_rdp_and_its_whole_orders_lie_above_pld(noise: float, rate: float, steps: int) -> None:
    history = (Entry(noise, rate, steps),)
    tight, loose = table.compute(history, 1e-5, "pld")[0], table.compute(history, 1e-5, "rdp")[0]
    assert tight <= loose + 1e-4
    assert tight <= renyi.epsilon(history, 1e-5) + 1e-4
    assert renyi.epsilon(history, 1e-5) <= 2.0 * loose + 0.1, "the bracket of the calibration is near"


def test_gdp_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"less than is spent"):
        table.epsilon([Entry(1.0, 0.01, 1)], 1e-5, "gdp")
    with pytest.raises(ConfigError, match=r"pld \| rdp \| prv"):
        table.epsilon([], 1e-5, "moments")


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_an_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.delta"):
        table.epsilon([Entry(1.0, 0.01, 1)], delta)


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(0.0, 0.1, 1), (-1.0, 0.1, 1), (math.nan, 0.1, 1), (math.inf, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.01, 1), (1.0, math.nan, 1)],
)
def test_an_impossible_setting_is_refused(noise: float, rate: float, steps: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        Entry(noise, rate, steps)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps_are_counted_in_whole_numbers_from_one(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps must be"):
        Entry(1.0, 0.1, steps)


class _Broken:
    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def load(self, history: Any, delta: float) -> float:
        return 0.0

    def epsilons(self, histories: Any, delta: float) -> list[float]:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return [self.outcome]


@pytest.mark.parametrize("outcome", [RuntimeError("discrete mean"), ValueError("x"), OverflowError(), math.nan, math.inf])
def test_an_accountant_that_fails_falls_back_to_a_larger_figure_never_to_nothing(
    outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [Entry(1.0, 0.01, 100)]
    rdp, whole = table.epsilon(history, 1e-5, "rdp"), renyi.epsilon(history, 1e-5)
    real = table.importlib.import_module
    broken: set[str] = {table.ACCOUNTANTS["pld"].module}
    monkeypatch.setattr(table.importlib, "import_module", lambda name: _Broken(outcome) if name in broken else real(name))
    table._memory.clear()
    assert table.epsilon(history, 1e-5, "pld") == rdp
    broken.add(table.ACCOUNTANTS["rdp"].module)
    table._memory.clear()
    assert table.epsilon(history, 1e-5, "pld") == whole > 0


def test_a_negative_figure_is_nothing_and_not_a_refund(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.importlib, "import_module", lambda name: _Broken(-0.2))
    assert table.epsilon([Entry(50.0, 0.001, 1)], 1e-3, "pld") == 0.0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_hopeless_histories_cost_a_finite_bound_or_infinity_and_little_time() -> None:
    assert table.epsilon([Entry(0.05, 0.9, 1000)], 1e-5) > 1000
    assert table.epsilon([Entry(1e-200, 1.0, 1)], 1e-5) == math.inf
    assert table.epsilon([Entry(1e-200, 0.1, 1)], 1e-5) == math.inf


COSTLY = [
    ("prv", Entry(100.0, 0.5, 1_000_000)),  # a minute and 1.9 GB, unbounded
    ("prv", Entry(1e6, 1.0, 1_000_000_000)),  # 2.4 GB, then a failure
    ("prv", Entry(1.0, 0.01, 100_000)),
    ("prv", Entry(0.12, 0.5, 12)),
    ("prv", Entry(0.01, 0.5, 1)),
    ("pld", Entry(1e6, 0.3, 1_000_000_000)),  # did not end in two minutes, unbounded
    ("pld", Entry(100.0, 0.5, 1_000_000)),
    ("pld", Entry(0.01, 1e-9, 1_000_000)),
]


@pytest.mark.parametrize(("accountant", "entry"), COSTLY)
def test_a_setting_that_would_cost_gigabytes_or_minutes_never_reaches_its_accountant(accountant, entry, monkeypatch):
    """A server chooses settings. The looser bound is the figure then: at most too large, so at most a refusal too many."""
    module = table._module(accountant)
    monkeypatch.setattr(module, "epsilons", lambda *_: pytest.fail("the accountant was asked"))
    assert table.load([entry], 1e-5, accountant) > 1.0
    figure, by_name = table.compute((entry,), 1e-5, accountant)
    assert not by_name
    assert figure == table.compute((entry,), 1e-5, "rdp")[0]


# (noise, rate, steps), delta, epsilon that is spent at least: losses rounded down on a grid and convolved without a Fourier
# transform, tails left out.
TINY = [
    (Entry(1.2069921407426043, 0.008366367985578039, 228), 1e-14, 1.9582),
    (Entry(1.2069921407426043, 0.008366367985578039, 228), 1e-13, 1.7487),
    (Entry(1.0, 0.01, 1000), 1e-13, 4.1048),
    (Entry(0.8, 0.005, 500), 1e-12, 4.2733),
]


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
@pytest.mark.parametrize(("entry", "delta", "spent"), TINY)
def test_no_figure_at_a_tiny_delta_is_below_what_is_spent(accountant, entry, delta, spent):
    assert table.epsilon([entry], delta, accountant) >= spent
    verdict = Account(delta).after("r", [entry], rounds=1, accountant=accountant, max_epsilon=None)
    assert verdict.epsilon >= spent


def test_prv_gives_way_to_rdp_at_a_tiny_delta_everywhere(monkeypatch):
    entry, tiny = Entry(1.2069921407426043, 0.008366367985578039, 228), 9.9e-11
    assert table.load([entry], 1e-10, "prv") <= 1.0
    monkeypatch.setattr(table._module("prv"), "epsilons", lambda *_: pytest.fail("prv was asked"))
    figure = table.epsilon([entry], tiny, "rdp")
    assert table.epsilon([entry], tiny, "prv") == figure
    noise = calibration.noise_multiplier(2.0, tiny, entry.sample_rate, 20, "prv")
    assert noise == calibration.noise_multiplier(2.0, tiny, entry.sample_rate, 20, "rdp")
    assert calibration.max_steps(3.0, tiny, 0.01, 1.2, "prv") == calibration.max_steps(3.0, tiny, 0.01, 1.2, "rdp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accountant", "entry"),
    [
        ("pld", Entry(100.0, 0.5, 450_000)),
        ("pld", Entry(1.0, 1e-6, 1_000_000)),
        ("pld", Entry(0.12, 0.5, 12)),
        ("pld", Entry(0.05, 0.5, 2)),
        ("prv", Entry(1.0, 0.005, 20_000)),
        ("prv", Entry(1.0, 1e-6, 100_000)),
        ("prv", Entry(0.3, 0.01, 3)),
    ],
)
def test_the_costliest_settings_that_are_computed_take_seconds_and_megabytes(accountant, entry):
    """In a process of its own: wall seconds of one warm figure, and how far the peak of memory rises."""
    code = f"""
import resource, time
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.history import Entry
module = table._module({accountant!r})
module.epsilons([(Entry(1.0, 0.01, 10),)], 1e-5)
assert table.load([{entry!r}], 1e-5, {accountant!r}) <= 1.0
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
module.epsilons([({entry!r},)], 1e-5)
print(time.perf_counter() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split()[-2:])
    assert seconds < 10  # a couple on a machine with nothing else to do
    assert megabytes < 800


@pytest.mark.parametrize("order", [2, 3, 32])
@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.01), (2.7, 0.5), (0.8, 0.2), (4.0, 1.0)])
def test_whole_order_divergences_are_upstreams(noise: float, rate: float, order: int) -> None:
    import dp_accounting

    accountant = dp_accounting.rdp.RdpAccountant(orders=[order])
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)))
    assert renyi.divergence(noise, rate, order) == pytest.approx(float(accountant.rdp[0]), rel=1e-9)


def test_versions_name_the_library() -> None:
    assert table.version("pld").startswith("pld (dp-accounting ")
    assert "prv (opacus " in table.versions()


_PROBE = """
import sys, json
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy import ledger, policy, report, statement, calibration
figure = table.epsilon([Entry(1.7, 0.3, 7), Entry(1.1, 0.02, 11)], 1e-4)
print(json.dumps([repr(figure), sorted({"torch", "dp_accounting", "opacus", "scipy", "flwr"} & set(sys.modules))]))
"""


def test_a_second_process_has_the_same_float_and_loads_no_accountant_for_it() -> None:
    ours = table.epsilon([Entry(1.1, 0.02, 11), Entry(1.7, 0.3, 7)], 1e-4)
    answer = subprocess.run(
        [sys.executable, "-c", _PROBE],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    figure, loaded = json.loads(answer.stdout)
    assert float(figure) == ours
    assert loaded == []
