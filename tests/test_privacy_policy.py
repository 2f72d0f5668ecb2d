"""The client's own limits hold against whatever a server sends."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_dpprune import config
from fed_dpprune.errors import ClientFault, ConfigError
from fed_dpprune.privacy.policy import MOST_CLIP_NORM, REFUSAL_CODES, REQUIRED_KEYS, ClientPolicy

POLICY = ClientPolicy(
    max_epsilon=4.0, delta=1e-4, min_noise_multiplier=1.0, max_sample_rate=0.5, max_steps_per_round=10, max_clip_norm=2.0,
    accountant="pld", unit="example",
)  # fmt: skip
FINE: dict[str, Any] = {
    "noise_multiplier": 1.0,
    "sample_rate": 0.5,
    "steps": 10,
    "delta": 1e-4,
    "clip_norm": 1.0,
    "provenance": "random",
    "nominal_size": 100,
    "accountant": "pld",
    "unit": "example",
}
HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("noise-multiplier-below-policy", {"noise_multiplier": 0.999}),
    ("noise-multiplier-below-policy", {"noise_multiplier": 0.0}),
    ("noise-multiplier-below-policy", {"noise_multiplier": -5.0}),
    ("noise-multiplier-below-policy", {"noise_multiplier": math.nan}),
    ("noise-multiplier-below-policy", {"noise_multiplier": math.inf}),
    ("sample-rate-above-policy", {"sample_rate": 0.51}),
    ("sample-rate-above-policy", {"sample_rate": 0.0}),
    ("sample-rate-above-policy", {"sample_rate": -0.5}),
    ("sample-rate-above-policy", {"sample_rate": math.nan}),
    ("steps-above-policy", {"steps": 11}),
    ("steps-above-policy", {"steps": 0}),
    ("steps-above-policy", {"steps": -1}),
    ("noise-multiplier-below-policy", {"noise_multiplier": 1e300}),
    ("sample-rate-above-policy", {"sample_rate": 5e-324}),
    ("delta-mismatch", {"delta": 2e-4}),
    ("delta-mismatch", {"delta": 1e-5}),
    ("delta-above-policy", {"delta": 2e-2}),
    ("accountant-mismatch", {"accountant": "prv"}),
    ("accountant-mismatch", {"accountant": ""}),
    ("accountant-mismatch", {"unit": "client"}),
    ("clip-norm-out-of-range", {"clip_norm": 2.1}),
    ("delta-above-policy", {"delta": 0.0}),
    ("delta-above-policy", {"delta": math.nan}),
    ("delta-above-policy", {"delta": 1e-4, "nominal_size": 10_000}),
    ("clip-norm-out-of-range", {"clip_norm": 1e38}),
    ("clip-norm-out-of-range", {"clip_norm": 1e-40}),
    ("clip-norm-out-of-range", {"clip_norm": 0.0}),
    ("clip-norm-out-of-range", {"clip_norm": -1.0}),
    ("clip-norm-out-of-range", {"clip_norm": math.nan}),
    ("release-not-allowed", {"releases": ("training-loss",)}),
    ("provenance-not-allowed", {"provenance": "private"}),
    ("provenance-not-allowed", {"provenance": ""}),
]


def test_a_request_at_every_limit_is_allowed() -> None:
    POLICY.check(**FINE)


@pytest.mark.parametrize(("code", "change"), HOSTILE, ids=lambda value: str(value))
def test_a_request_past_one_limit_is_refused_with_its_code(code: str, change: dict[str, Any]) -> None:
    with pytest.raises(ClientFault) as refused:
        POLICY.check(**{**FINE, **change})
    assert refused.value.code == code


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, 1e-300, 0.009])
def test_no_noise_is_refused_under_the_default_policy_too(noise: float) -> None:
    with pytest.raises(ClientFault):
        ClientPolicy().check(**{**FINE, "noise_multiplier": noise})


def _any(low: float, high: float) -> st.SearchStrategy[float]:
    """Any float at all, or one near the limit, so that both outcomes are common."""
    return st.one_of(st.floats(), st.floats(low, high))


@given(noise=_any(0.9, 3.0), rate=_any(0.01, 0.6), steps=st.integers(-2, 15), delta=_any(1e-6, 2e-4), clip=_any(0.1, 10.0))
def test_whatever_passes_is_within_every_limit(noise: float, rate: float, steps: int, delta: float, clip: float) -> None:
    request = {**FINE, "noise_multiplier": noise, "sample_rate": rate, "steps": steps, "delta": delta, "clip_norm": clip}
    try:
        POLICY.check(**request)
    except ClientFault:
        return
    assert 1.0 <= noise < math.inf and 0 < rate <= 0.5 and 1 <= steps <= 10 and 0 < delta <= 1e-4 and 1e-6 <= clip <= 1e6


def test_releases_are_allowed_by_name() -> None:
    allowing = ClientPolicy(allow_releases=("training-loss",))
    allowing.check(**FINE, releases=("training-loss",))
    with pytest.raises(ClientFault):
        allowing.check(**FINE, releases=("training-loss", "accuracy"))


def test_the_policy_of_a_simulation_is_the_configs() -> None:
    table = config.Policy(max_epsilon=3.0, min_noise_multiplier=0.7, max_sample_rate=0.2, max_steps_per_round=5)
    policy = ClientPolicy.from_config(table, delta=1e-5)
    assert policy == ClientPolicy(3.0, 1e-5, 0.7, 0.2, 5)
    assert ClientPolicy.from_config(config.Policy()) == ClientPolicy()


def test_the_policy_of_a_node_is_its_operators() -> None:
    node = {
        **NODE,
        "policy-max-epsilon": 2,
        "policy-max-sample-rate": 0.1,
        "policy-max-steps-per-round": 7,
        "policy-allow-provenance": "random, public",
        "policy-max-clip-norm": 4,
    }
    assert ClientPolicy.from_node_config(node) == ClientPolicy(
        2.0, 1e-6, 1.5, 0.1, 7, (), ("random", "public"), 4.0, "rdp", "example"
    )


NODE = {
    "partition-id": 3,
    "ledger": "client.sqlite",
    "nominal-size": 1000,
    "accountant": "rdp",
    "policy-max-epsilon": 3.0,
    "policy-min-noise-multiplier": 1.5,
    "policy-delta": 1e-6,
}


@pytest.mark.parametrize("key", ["nominal-size", "accountant", *REQUIRED_KEYS])
def test_what_a_node_leaves_out_is_an_error_and_no_number_of_ours(key: str) -> None:
    with pytest.raises(ConfigError, match=f"node-config {key}: is missing"):
        ClientPolicy.from_node_config({name: value for name, value in NODE.items() if name != key})


def test_what_a_node_may_leave_out_is_bounded_all_the_same() -> None:
    policy = ClientPolicy.from_node_config(NODE)
    assert (policy.max_sample_rate, policy.max_steps_per_round, policy.max_clip_norm) == (1.0, 1000, MOST_CLIP_NORM)
    assert (policy.allow_releases, policy.allow_provenance) == ((), ("random", "data-free", "public"))


@pytest.mark.parametrize(
    "change",
    [
        {"policy-max-epsilom": 2.0},
        {"policy-max-epsilon": -1.0},
        {"policy-max-epsilon": "two"},
        {"policy-max-epsilon": "2.0"},
        {"policy-max-epsilon": math.inf},
        {"policy-max-epsilon": math.nan},
        {"policy-max-epsilon": True},
        {"policy-min-noise-multiplier": 0},
        {"policy-min-noise-multiplier": math.nan},
        {"policy-max-sample-rate": 1.5},
        {"policy-max-steps-per-round": 0},
        {"policy-max-steps-per-round": 7.0},
        {"policy-max-clip-norm": 1e7},
        {"policy-delta": 2.0},
        {"policy-delta": "small"},
        {"policy-delta": 1e-3},
        {"accountant": "gdp"},
    ],
    ids=str,
)
def test_a_limit_that_is_misspelt_or_impossible_is_never_no_limit(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="node-config " + next(iter(change))):
        ClientPolicy.from_node_config(NODE | change)


@pytest.mark.parametrize("code", REFUSAL_CODES)
def test_every_code_is_explained_with_what_would_fit(code: str) -> None:
    for policy in (POLICY, ClientPolicy()):
        line = policy.explain(code)
        assert line.startswith(REFUSAL_CODES[code]) and "\n" not in line and len(line) > len(REFUSAL_CODES[code]) + 5


def test_the_explanation_names_the_limit() -> None:
    assert "at least 1" in POLICY.explain("noise-multiplier-below-policy")
    assert "limit is 4" in POLICY.explain("budget-exhausted")


def test_a_fault_carries_its_code_alone_to_the_outside() -> None:
    with pytest.raises(ClientFault) as refused:
        POLICY.check(**{**FINE, "noise_multiplier": 0.25})
    assert refused.value.code == "noise-multiplier-below-policy"
    assert "0.25" in refused.value.detail and "0.25" not in refused.value.code
