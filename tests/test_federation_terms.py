"""Terms are read strictly: what no server of this project writes is refused before anything is made from it."""

from __future__ import annotations

from typing import Any

import pytest

from fed_dpprune.errors import ClientFault
from fed_dpprune.federation.terms import DIGESTS, MOST_ODDS, RoundTerms, from_wire

TERMS = RoundTerms(
    run="a" * 32, round=1, rounds=4, fingerprint="f" * 32, config="c" * 32, layout="b" * 32, seed=3, survivors="d" * 32,
    survivor_count=10, digest="e" * 32, live=5, provenance="random", model="0" * 32, client=0, sample_rate=0.1,
    noise_multiplier=1.2, clip_norm=1.0, steps=2, learning_rate=1.0, delta=1e-5, accountant="rdp", unit="example",
)  # fmt: skip


def _read(**changes: Any) -> RoundTerms:
    return from_wire({**TERMS.to_wire(), **{key.replace("_", "-"): value for key, value in changes.items()}})


def test_terms_survive_the_wire():
    assert _read() == TERMS
    assert _read(odds=[3, 0, 2**63 - 1]).odds == (3, 0, 2**63 - 1)


def test_odds_past_the_most_are_refused_as_they_are_read():
    assert len(_read(odds=[1] * MOST_ODDS).odds) == MOST_ODDS
    with pytest.raises(ClientFault, match="odds"):
        _read(odds=[1] * (MOST_ODDS + 1))


@pytest.mark.parametrize("odds", [[-1], [2**63], [True], [0.5], ["1"], "1", (1,)])
def test_odds_that_are_no_whole_numbers_of_the_wire_are_refused(odds):
    with pytest.raises(ClientFault, match="odds"):
        _read(odds=odds)


@pytest.mark.parametrize("name", ["round", "rounds", "survivor_count", "live", "client", "steps", "seed"])
@pytest.mark.parametrize("value", [2**63, 2**200, -(2**63) - 1])
def test_whole_numbers_past_the_wires_are_refused(name, value):
    """In one process they are not bound by the wire, and a seed of 200 bits would break the keys that are made of it."""
    with pytest.raises(ClientFault) as refused:
        _read(**{name: value})
    assert refused.value.code == "malformed-terms"


@pytest.mark.parametrize("name", DIGESTS)
@pytest.mark.parametrize("value", ["", "g", "a" * 65, "A" * 32, "a\n", "a" * 10**6])
def test_digests_are_hex_of_bounded_length(name, value):
    with pytest.raises(ClientFault, match="digest"):
        _read(**{name: value})


@pytest.mark.parametrize("name", ["provenance", "accountant", "unit"])
@pytest.mark.parametrize("value", ["", "a" * 33, "two words", "pld\n"])
def test_words_are_words_of_bounded_length(name, value):
    with pytest.raises(ClientFault, match="word"):
        _read(**{name: value})
