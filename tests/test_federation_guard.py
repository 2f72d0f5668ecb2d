"""The guard: one delta, accountant and unit for policy and ledger, and a ledger that is made by the first charge alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fed_dpprune.errors import ClientFault, LedgerError
from fed_dpprune.federation.guard import LedgerGuard
from fed_dpprune.federation.terms import RoundTerms
from fed_dpprune.privacy.ledger import Ledger
from fed_dpprune.privacy.policy import ClientPolicy

DELTA, SIZE = 1e-4, 300
OPERATOR = ClientPolicy(max_epsilon=4.0, delta=DELTA, min_noise_multiplier=1.0, accountant="rdp", unit="example")
TERMS = RoundTerms(
    run="a" * 32, round=1, rounds=4, fingerprint="f" * 32, config="c" * 32, layout="b" * 32, seed=3, survivors="d" * 32,
    survivor_count=10, digest="e" * 32, live=5, provenance="random", model="0" * 32, client=0, sample_rate=0.1,
    noise_multiplier=1.2, clip_norm=1.0, steps=2, learning_rate=1.0, delta=DELTA, accountant="rdp", unit="example",
)  # fmt: skip


def opener(path: Path, **changes: Any) -> Any:
    fixed = {"delta": DELTA, "accountant": "rdp", "unit": "example", **changes}
    return lambda: Ledger.open_or_create(path, "the data", mode="deployment", **fixed)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node" / "ledger.sqlite"


def test_the_ledger_is_made_by_the_first_charge_and_by_nothing_before(path):
    guard = LedgerGuard(opener(path), OPERATOR, {0: SIZE})
    for bent in (replace(TERMS, noise_multiplier=0.5), replace(TERMS, delta=1e-6), replace(TERMS, client=1)):
        with pytest.raises(ClientFault):
            guard.admit(bent)
    assert not path.parent.exists()
    assert guard.admit(TERMS) is None
    assert guard.ledger.head().count == 1
    assert guard.keep(TERMS, b"reply") == b"reply"
    assert guard.admit(TERMS) == b"reply"


def test_a_ledger_that_could_not_be_opened_is_tried_again(path):
    tries: list[int] = []

    def open_at_last() -> Ledger:
        tries.append(1)
        if len(tries) == 1:
            raise LedgerError("ledger", "the disk is away")
        return opener(path)()

    guard = LedgerGuard(open_at_last, OPERATOR, {0: SIZE})
    with pytest.raises(LedgerError):
        guard.admit(TERMS)
    assert guard.admit(TERMS) is None
    assert guard.admit(TERMS) is None
    assert len(tries) == 2


@pytest.mark.parametrize("name", ["delta", "accountant", "unit"])
def test_a_ledger_to_be_opened_needs_an_operators_own_claim(path, name):
    with pytest.raises(ValueError, match=name):
        LedgerGuard(opener(path), replace(OPERATOR, **{name: None}), {0: SIZE})


@pytest.mark.parametrize(
    ("changes", "key"), [({"delta": 1e-6}, "delta"), ({"accountant": "pld"}, "accountant"), ({"unit": "client"}, "unit")]
)
def test_policy_and_ledger_count_alike_or_nothing_is_charged(path, changes, key):
    """Six rounds of next to no noise once passed a policy that looked at one delta, charged at another."""
    ledger = opener(path, **changes)()
    with pytest.raises(LedgerError, match=f"its {key} is"):
        LedgerGuard(ledger, OPERATOR, {0: SIZE})
    ledger.close()
    with pytest.raises(LedgerError, match=f"its {key} is"):
        LedgerGuard(opener(path, **changes), OPERATOR, {0: SIZE}).admit(TERMS)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"delta": 1e-6}, "delta-mismatch"),
        ({"delta": 3e-3}, "delta-mismatch"),
        ({"delta": 4e-3}, "delta-above-policy"),
        ({"accountant": "prv"}, "accountant-mismatch"),
        ({"unit": "client"}, "accountant-mismatch"),
    ],
)
def test_terms_that_count_otherwise_are_refused_where_the_policy_says_nothing(path, changes, code):
    """A policy without a delta, as a simulation's, takes the ledger's; it never takes the terms'."""
    guard = LedgerGuard(opener(path)(), ClientPolicy(), {0: SIZE})
    with pytest.raises(ClientFault) as refused:
        guard.admit(replace(TERMS, **changes))
    assert refused.value.code == code
    assert guard.ledger.head().count == 0


def test_the_figure_charged_is_at_the_operators_delta(path):
    guard = LedgerGuard(opener(path), OPERATOR, {0: SIZE})
    guard.admit(TERMS)
    ledger = guard.ledger
    assert ledger.delta == OPERATOR.delta == TERMS.delta
    assert ledger.spent("0").accountant.startswith("rdp ")


def test_other_data_are_noticed_in_the_log_and_change_no_answer(path, caplog):
    first = LedgerGuard(opener(path), OPERATOR, {0: SIZE}, data=lambda: "some data")
    assert first.admit(TERMS) is None
    first.keep(TERMS, b"reply")
    assert "other data" not in caplog.text
    first.ledger.close()
    second = LedgerGuard(opener(path), OPERATOR, {0: SIZE}, data=lambda: "other data than before")
    assert second.admit(TERMS) == b"reply"
    assert "was opened with other data" in caplog.text
