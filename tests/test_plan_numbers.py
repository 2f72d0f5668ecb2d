"""The plan: refusals that need the clients' sizes, and numbers that hold by themselves; runs are held to it elsewhere."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import small_run

from fed_dpprune import cli
from fed_dpprune import config as cfg
from fed_dpprune.comm.masks import packed_size_bound
from fed_dpprune.errors import ConfigError
from fed_dpprune.federation.facts import gather, prepare
from fed_dpprune.plan import Facts, Plan, check_sizes, draw_cohorts, make_plan, sample_rate
from fed_dpprune.sparsity.support import draw_positions

PLAN_KEYS = {
    "noise_multiplier", "epsilon_by_round", "epsilon_max", "nominal_sizes", "sample_rates", "live_by_round", "bytes",
    "max_rounds",
}  # fmt: skip


def planned(sizes: tuple[int, ...] | None = None, *, known: bool = True, **changes: Any) -> Plan:
    conf = small_run.config(**changes)
    facts = gather(conf).facts
    return make_plan(conf, Facts(facts.layout, sizes or facts.nominal_sizes, 449), cohorts_known=known)


# --- sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("delta", "fits"), [(1 / 401, True), (1 / 400, False), (0.01, False), (1e-5, True)])
def test_delta_is_below_one_over_every_clients_size(delta, fits):
    conf = small_run.config(**{"privacy.delta": delta})
    if fits:
        assert check_sizes(conf, [100, 400, 50, 60]) == ()
    else:
        with pytest.raises(ConfigError, match="not below 1/N of client 1, which has 400 examples"):
            check_sizes(conf, [100, 400, 50, 60])


def test_an_expected_batch_larger_than_every_client_is_refused():
    with pytest.raises(ConfigError, match="larger than every client"):
        check_sizes(small_run.config(**{"privacy.expected-batch": 101}), [100, 90, 80, 70])


def test_a_client_smaller_than_the_batch_gets_rate_1_and_a_warning():
    made = planned((100, 30, 80, 20), **{"privacy.expected-batch": 50})
    assert made.sample_rates == (0.5, 1.0, 0.625, 1.0)
    (warning,) = made.warnings
    assert "2 client(s) (1, 3)" in warning


def test_more_clients_per_round_than_there_are_is_refused():
    conf = small_run.config(**{"data.partition": "natural", "federation.clients-per-round": 5})
    with pytest.raises(ConfigError, match="more than the 4 clients there are"):
        check_sizes(conf, [100] * 4)


def test_fewer_clients_than_the_minimum_are_refused():
    conf = small_run.config(**{"data.partition": "natural", "federation.min-clients": 3, "federation.clients-per-round": 0})
    with pytest.raises(ConfigError, match="min-clients"):
        check_sizes(conf, [100] * 2)


def test_a_given_sample_rate_replaces_the_expected_batch():
    made = planned((100, 30, 80, 20), **{"privacy.sample-rate": 0.25, "privacy.expected-batch": 1000})
    assert made.sample_rates == (0.25,) * 4
    assert made.warnings == ()


@pytest.mark.parametrize(("size", "rate"), [(40, 1.0), (39, 1.0), (41, 40 / 41), (400, 0.1)])
def test_the_rate_follows_from_the_nominal_size(size, rate):
    assert sample_rate(small_run.config().privacy, size) == rate


# --- noise and epsilon ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 2])
def test_calibrated_noise_keeps_every_client_within_epsilon_and_no_smaller_one_does(asked):
    """Also where one client samples more and another is asked more often, so that neither binds by its looks."""
    some = {"federation.clients-per-round": asked, "federation.rounds": 7}
    made = planned((180, 200, 190, 210), **some, **{"privacy.noise-multiplier": "", "privacy.epsilon": 2.0})
    assert 2.0 - 1e-2 <= made.epsilon_max <= 2.0
    if asked:
        assert len(set(made.steps_by_client)) > 1
    less = planned((180, 200, 190, 210), **some, **{"privacy.noise-multiplier": made.noise_multiplier * 0.99})
    assert less.epsilon_max > 2.0


def test_one_noise_multiplier_serves_the_client_that_samples_most():
    """The smallest client binds: alone, each of the others would need less."""
    epsilon = {"privacy.noise-multiplier": "", "privacy.epsilon": 2.0}
    whole = planned((400, 100, 200, 50), **epsilon)
    without = planned((400, 100, 200, 200), **epsilon)
    assert whole.noise_multiplier > without.noise_multiplier


def test_epsilon_grows_by_round_and_ends_at_its_largest():
    made = planned()
    assert list(made.epsilon_by_round) == sorted(made.epsilon_by_round)
    assert made.epsilon_max == made.epsilon_by_round[-1]


def test_cohorts_that_are_drawn_beforehand_cost_less_than_all_rounds():
    changes = {"federation.clients-per-round": 2, "federation.rounds": 8}
    known, unknown = planned(**changes), planned(known=False, **changes)
    assert known.cohorts == unknown.cohorts
    assert max(known.steps_by_client) < max(unknown.steps_by_client) == 16
    assert known.epsilon_max < unknown.epsilon_max


def test_cohorts_are_drawn_from_the_public_stream():
    conf = small_run.config(**{"federation.clients": 9, "federation.clients-per-round": 4, "federation.rounds": 5})
    cohorts = draw_cohorts(conf, 9)
    assert all(len(set(c)) == 4 and list(c) == sorted(c) for c in cohorts)
    assert len(set(cohorts)) > 1
    assert cohorts[2] == tuple(draw_positions(9, 4, conf.seed, "cohort", 3).tolist())


def test_the_largest_number_of_rounds_fits_and_one_more_does_not():
    made = planned(**{"policy.max-epsilon": 1.8})
    assert made.max_rounds is not None
    fits = planned(**{"federation.rounds": made.max_rounds})
    past = planned(**{"federation.rounds": made.max_rounds + 1})
    assert fits.epsilon_max <= 1.8 < past.epsilon_max


@pytest.mark.parametrize("asked", [0, 3])
def test_a_budget_that_stops_the_run_is_warned_of_and_the_run_stops_there(asked, tmp_path):
    changes = {"policy.max-epsilon": 1.8, "federation.clients-per-round": asked, "federation.min-clients": asked or 4}
    conf = small_run.config(**changes)
    made = prepare(conf)[1]
    fitting = sum(spent <= 1.8 for spent in made.epsilon_by_round)
    assert 0 < fitting < 4
    assert f"policy.max-epsilon = 1.8 lets {fitting} of the 4 rounds happen" in made.warnings[-1]
    outcome = small_run.run(conf, tmp_path)[0]
    assert (outcome.exit_code, outcome.summary["rounds"]) == (3, fitting)
    rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [row["clients"]["refused"] > 0 for row in rows] == [False] * fitting + [True]


def test_a_budget_that_suffices_is_no_warning():
    assert planned(**{"policy.max-epsilon": planned().epsilon_max}).warnings == ()


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ({"policy.max-sample-rate": 0.05}, "policy.max-sample-rate"),
        ({"policy.min-noise-multiplier": 1.3}, "policy.min-noise-multiplier"),
        ({"policy.max-steps-per-round": 1}, "policy.max-steps-per-round"),
    ],
)
def test_a_limit_that_no_round_keeps_is_warned_of_with_what_would_fit(limit, text):
    (warning,) = planned(**limit).warnings
    assert warning.startswith("0 of the 4 rounds fit: client 0 will refuse each")
    assert text in warning
    assert f"{next(iter(limit.values())):g}" in warning


def test_the_client_named_is_the_one_that_samples_too_often():
    (warning,) = planned((400, 400, 100, 400), **{"policy.max-sample-rate": 0.2}).warnings
    assert "client 2 will refuse" in warning


@pytest.mark.parametrize("rounds", [10_001, 10**9])
def test_rounds_past_any_schedule_are_refused_at_once(rounds, tmp_path, capsys):
    path = tmp_path / "small.toml"
    path.write_text(cfg.to_toml(small_run.config()))
    assert cli.main(["plan", str(path), "--set", f"federation.rounds={rounds}"]) == 2
    error = capsys.readouterr().err
    assert "federation.rounds" in error and "10000" in error


def test_without_a_budget_there_is_no_largest_number_of_rounds():
    assert planned().max_rounds is None


def test_the_ramp_of_the_published_method_is_the_plans():
    """E = 48, final rate 0.9, d = 550,570 (arXiv 2112.00845): first 550,570 live, last 55,057."""
    changes = {"data.dataset": "digits", "federation.rounds": 48, "sparsity.freeze.rate": 0.9}
    made = planned(**changes, **{"sparsity.prune.method": "none", "sparsity.prune.rate": 0})
    frozen = [1 - live / made.parameters for live in made.live_by_round]
    assert frozen[0] == 0
    assert frozen[1] == pytest.approx(0.0191489, abs=1 / made.parameters)
    assert frozen[-1] == pytest.approx(0.9, abs=1 / made.parameters)
    assert float(np.mean(frozen)) == pytest.approx(0.45, abs=1e-3)


def test_the_plan_reads_no_feature(monkeypatch):
    from fed_dpprune.data.dataset import Examples

    monkeypatch.setattr(Examples, "take", lambda *a: pytest.fail("a feature was read"))
    assert prepare(small_run.config())[1].parameters == 1210


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(cfg.to_toml(small_run.config(**{"policy.max-epsilon": 1.8})))
    return path


def test_plan_json_has_the_keys_of_the_contract(file, capsys, tmp_path):
    assert cli.main(["plan", str(file), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made) >= PLAN_KEYS
    for way in ("uplink", "downlink"):
        assert set(made["bytes"][way]) >= {"payload", "payload_by_round", "dense_float32"}
        assert made["bytes"][way]["payload"] == sum(made["bytes"][way]["payload_by_round"])
    assert list(made["nominal_sizes"]) == ["0", "1", "2", "3"]
    assert len(made["epsilon_by_round"]) == len(made["live_by_round"]) == 4
    assert made["max_rounds"] == 2
    assert any("policy.max-epsilon" in text for text in made["warnings"])
    assert [p.name for p in tmp_path.iterdir()] == ["small.toml"]


def test_plan_in_words_says_the_same(file, capsys):
    assert cli.main(["plan", str(file)]) == 0
    out = capsys.readouterr().out
    made = prepare(cfg.load(file))[1]
    assert f"{made.survivors:,} of {made.parameters:,}" in out
    assert "budget     allows 2 rounds" in out
    assert "delta 0.0001" in out


@pytest.mark.parametrize(
    ("way", "changes", "n", "kept"),
    [
        ("uplink", {"wire.select": "top-k", "wire.select-rate": 0.9, "sparsity.freeze.rate": 0.0}, 618, 62),
        ("downlink", {}, 1210, 618),
    ],
)
def test_the_entropy_bound_stands_beside_positions_that_travel(way, changes, n, kept, tmp_path, capsys):
    conf = small_run.config(**changes)
    found = planned(**changes).as_json()["bytes"][way]["positions"]
    bound = math.ceil(math.log2(math.comb(n, kept)) / 8)
    assert found == {"n": n, "k": kept, "bytes": packed_size_bound(n, kept), "entropy_bound": bound}
    path = tmp_path / "small.toml"
    path.write_text(cfg.to_toml(conf))
    assert cli.main(["plan", str(path)]) == 0
    assert f"{kept:,} of {n:,}; entropy bound {bound} B" in capsys.readouterr().out


def test_no_positions_travel_where_both_ends_draw_them():
    made = planned(**{"sparsity.prune.method": "random", "sparsity.shared": False})
    assert made.uplink.positions is None and made.downlink.positions is None


def test_plan_with_a_ledger_says_how_many_rounds_are_left(file, tmp_path, capsys):
    from fed_dpprune.privacy.history import Entry
    from fed_dpprune.privacy.ledger import Ledger

    small_run.run(small_run.config(**{"federation.rounds": 1}), tmp_path / "out")
    assert cli.main(["plan", str(file), "--json", "--ledger", str(tmp_path / "out" / "ledger.sqlite")]) == 0
    left = json.loads(capsys.readouterr().out)["ledger"]["rounds_left"]
    rate = prepare(cfg.load(file))[1].sample_rates[0]
    with Ledger.read(tmp_path / "out" / "ledger.sqlite") as ledger:
        expected = {c: ledger.rounds_left(c, [Entry(1.2, rate, 2)], 1.8) for c in ledger.clients()}
    assert left == expected
    assert set(left) == {"0", "1", "2", "3"}


def test_plan_with_a_ledger_needs_a_limit(tmp_path, capsys):
    path = tmp_path / "small.toml"
    path.write_text(cfg.to_toml(small_run.config()))
    assert cli.main(["plan", str(path), "--ledger", str(tmp_path / "none.sqlite")]) == 2
    assert "policy.max-epsilon" in capsys.readouterr().err
