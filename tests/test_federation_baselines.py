"""The baselines of a study go through the same clients, server and meter as all else, and none leaks what it selects by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import small_run

from fed_dpprune import config as cfg
from fed_dpprune.comm.arithmetic import selected_payload
from fed_dpprune.errors import ConfigError, WireError
from fed_dpprune.federation import client as client_side
from fed_dpprune.federation import facts, messages, uplink
from fed_dpprune.federation import local_train as training
from fed_dpprune.federation.broadcast import Broadcast
from fed_dpprune.plan import make_plan

DENSE: dict[str, Any] = {
    "federation.clients": 3,
    "sparsity.prune.method": "none",
    "sparsity.prune.rate": 0.0,
    "sparsity.freeze.method": "none",
    "sparsity.freeze.rate": 0.0,
    "model.hidden": [8],
    "client.momentum": 0.0,
    "client.weight-decay": 0.0,
}
TOP: dict[str, Any] = {**DENSE, "wire.select": "top-k", "wire.select-rate": 0.9}
CHANGE: dict[str, Any] = {
    **DENSE,
    "sparsity.freeze.method": "change",
    "sparsity.freeze.rate": 0.9,
    "sparsity.freeze.ramp-end": 0.5,
}
BASELINES: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "dense, int8": {**DENSE, "wire.uplink": "int8"},
    "dense, sign": {**DENSE, "wire.uplink": "sign"},
    "random-k": {**DENSE, "sparsity.freeze.method": "random", "sparsity.freeze.rate": 0.9, "sparsity.freeze.ramp": "constant"},
    "top-k of the noised": TOP,
    "top-k by released change": CHANGE,
}


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_metered_as_planned_at_the_same_epsilon(name, tmp_path):
    conf = small_run.config(**BASELINES[name])
    plan = make_plan(conf, facts.gather(conf).facts)
    outcome, tap = small_run.run(conf, tmp_path / "out")
    assert outcome.status == "complete", outcome.error
    found = small_run.summary(tmp_path / "out")
    dense = make_plan(small_run.config(**DENSE), facts.gather(small_run.config(**DENSE)).facts)
    assert found["privacy"]["epsilon_max"] == pytest.approx(dense.epsilon_max, rel=1e-12)
    measured = sum(small_run.payload_bytes(reply) for replies in tap.replies.values() for reply in replies)
    assert found["bytes"]["uplink"]["payload"] == measured
    assert plan.uplink.exact == (name != "top-k of the noised")
    assert measured == plan.uplink.payload if plan.uplink.exact else 0.9 * plan.uplink.payload < measured <= plan.uplink.payload


def test_the_largest_noised_values_leave_and_their_positions_with_them(tmp_path):
    """What leaves is a function of the noised update alone: the selection cannot see what the noise has not covered."""
    conf = small_run.config(**TOP)
    noised: list[Any] = []

    def spy(*arguments: Any) -> Any:
        noised.append(training.train(*arguments))
        return noised[-1]

    with patch.object(client_side, "train", spy):
        _, tap = small_run.run(conf, tmp_path / "out")
    for place, values in zip(tap.order, noised, strict=True):
        payload = messages.payload_of(tap.replies[place][0], "update")
        assert payload == uplink.encode(conf.wire, values)
        sent = uplink.decode(conf.wire, payload, values.size)
        kept = np.flatnonzero(sent)
        assert kept.size == uplink.selected_count(conf.wire, values.size) == values.size - int(0.9 * values.size)
        assert np.abs(values[kept]).min() >= np.abs(np.delete(values, kept)).max()
        np.testing.assert_array_equal(sent[kept], values[kept].astype(np.float32))


@pytest.mark.parametrize("codec", ["float32", "int8", "level2", "sign"])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.99])
def test_a_selected_update_comes_back_within_its_bound(codec, rate):
    wire = small_run.config(**{**TOP, "wire.uplink": codec, "wire.select-rate": rate}).wire
    values = np.random.default_rng(1).standard_normal(700)
    blob = uplink.encode(wire, values)
    keep = uplink.selected_count(wire, 700)
    assert len(blob) <= selected_payload(codec, 700, keep).payload
    found = np.flatnonzero(uplink.decode(wire, blob, 700))  # a small value may be sent as a zero
    assert np.isin(found, np.sort(np.argsort(-np.abs(values))[:keep])).all()
    assert found.size > 0.8 * keep
    with pytest.raises(WireError):
        uplink.decode(wire, blob[:-1], 700)


def test_a_value_that_is_no_number_is_selected_last_and_one_past_every_number_first():
    wire = small_run.config(**TOP).wire
    values = np.array([1.0, np.nan, 2.0] * 10)
    values[4] = -np.inf
    found = uplink.decode(wire, uplink.encode(wire, values), 30)
    assert found[4] == -np.finfo(np.float32).max
    assert not found[1::3][[0, 2, 3, 4]].any()


def test_top_k_of_the_private_update_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="positions of the largest private values are themselves private data"):
        small_run.config(**{**TOP, "wire.select": "top-k-private"})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"wire.select": "none"}, "wire.select-rate"),
        ({**CHANGE, "wire.select": "none", "wire.select-rate": 0.0, "sparsity.freeze.refresh": "run"}, "sparsity.freeze.refresh"),
        ({**CHANGE, "wire.select": "none", "wire.select-rate": 0.0, "sparsity.freeze.ramp": "constant"}, "sparsity.freeze.ramp"),
        ({**CHANGE, "wire.select": "none", "wire.select-rate": 0.0, "sparsity.freeze.ramp-end": 0.1}, "sparsity.freeze.ramp"),
        ({**CHANGE, "wire.select": "none", "wire.select-rate": 0.0, "sparsity.shared": False}, "sparsity.shared"),
        ({"sparsity.groups": 2}, "sparsity.groups"),
        ({"wire.rounding": "stochastic", "wire.uplink": "sign"}, "wire.rounding"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(changes, key):
    with pytest.raises(ConfigError) as raised:
        small_run.config(**{**TOP, **changes})
    assert raised.value.what == key


def test_released_change_chooses_what_moved_most_and_its_support_is_shipped_and_priced(tmp_path):
    conf = small_run.config(**{**CHANGE, "federation.rounds": 4})
    plan = make_plan(conf, facts.gather(conf).facts)
    models: list[Any] = []
    advance = Broadcast.advance

    def follow(self: Broadcast, *arguments: Any) -> None:
        models.extend([] if models else [self.model.copy()])
        advance(self, *arguments)
        models.append(self.model.copy())

    with patch.object(Broadcast, "advance", follow):
        _, tap = small_run.run(conf, tmp_path / "out")
    lines = small_run.rounds(tmp_path / "out")
    d = models[0].size
    for number in (3, 4):
        moved = np.flatnonzero(models[number] != models[number - 1])
        score = np.abs(models[number - 1].astype(np.float64) - models[0])
        assert moved.size <= lines[number - 1]["live"] == d - int(0.9 * d)
        assert score[moved].min() >= np.sort(score)[-lines[number - 1]["live"]]
        assert tap.requests[number, 0][0]["request"]["shipped"][0] == lines[number - 1]["live"]
    assert not plan.downlink.exact
    assert all(line["bytes_down"] <= most for line, most in zip(lines, plan.downlink.payload_by_round, strict=True))
    assert "data-free" in small_run.summary(tmp_path / "out")["sparsity"]["provenance"]


def test_the_config_of_every_baseline_survives_toml(tmp_path):
    for name, changes in BASELINES.items():
        conf = small_run.config(**changes)
        path = tmp_path / "x.toml"
        path.write_text(cfg.to_toml(conf))
        assert cfg.load(path) == conf, name


@pytest.mark.parametrize(("preset", "times_less"), [("frugal", 200), ("austere", 800), ("extreme", 3000)])
def test_a_preset_carries_as_little_as_it_says(preset, times_less):
    if not os.environ.get("FED_DPPRUNE_DATA"):
        pytest.skip("FED_DPPRUNE_DATA is unset: it names the folder of Fashion-MNIST")
    conf = cfg.load(Path(__file__).parents[1] / "configs" / f"{preset}.toml")
    plan = make_plan(conf, facts.gather(conf).facts)
    assert plan.uplink.exact
    assert plan.uplink.payload * times_less <= plan.uplink.dense_float32
    assert plan.downlink.payload * 100 <= plan.downlink.dense_float32, "a bound: the run sends less"
    assert plan.epsilon_max <= 2.0
