"""How many live when: the ramps of random freeze and the counts they give."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_dpprune.config import Drop, Freeze, Sparsity
from fed_dpprune.sparsity.schedule import freeze_rate, live_by_round, live_count, step_live_count, steps_differ
from fed_dpprune.sparsity.support import frozen_count

RAMPS = ("constant", "linear", "cosine", "step")
DP_CNN = 550_570


def _freeze(**keys):
    return Freeze(**{"method": "random", "rate": 0.9, **keys})


def test_the_linear_ramp_is_the_published_one():
    rates = [freeze_rate(_freeze(), r, 48) for r in range(1, 49)]
    expected = [0.9 * slot / 47 for slot in range(48)]
    assert rates == pytest.approx(expected, abs=1e-15)
    assert rates[:3] == pytest.approx([0, 0.0191489, 0.0382979], abs=1e-7)
    assert rates[-1] == 0.9
    assert np.mean(rates) == pytest.approx(0.45, abs=1e-12)


def test_the_published_counts_on_the_dp_cnn():
    frozen = [DP_CNN - live_count(_freeze(), DP_CNN, r, 48) for r in (1, 2, 3)]
    assert frozen == [0, 10_542, 21_085]
    assert live_count(_freeze(), DP_CNN, 48, 48) == 55_057


def test_an_early_end_of_the_ramp_gives_the_published_plateau():
    freeze = _freeze(ramp_end=0.5)
    rates = [freeze_rate(freeze, r, 40) for r in range(1, 41)]
    assert rates[19:] == [0.9] * 21
    assert rates[18] < 0.9
    assert np.mean(rates) == pytest.approx(0.9 * (1 - 20 / (2 * 40)))


@pytest.mark.parametrize("ramp", RAMPS)
def test_a_run_of_one_round_freezes_at_the_rate(ramp):
    assert freeze_rate(_freeze(ramp=ramp), 1, 1) == 0.9
    assert freeze_rate(_freeze(ramp=ramp, ramp_end=0.01), 1, 20) == 0.9


@given(st.sampled_from(RAMPS), st.floats(0, 0.999), st.floats(0.01, 1), st.integers(1, 200))
def test_a_ramp_never_falls_stays_in_range_and_ends_at_the_rate(ramp, rate, ramp_end, rounds):
    freeze = _freeze(ramp=ramp, rate=rate, ramp_end=ramp_end)
    rates = [freeze_rate(freeze, r, rounds) for r in range(1, rounds + 1)]
    assert all(0 <= a <= b <= rate for a, b in zip(rates, [*rates[1:], rate], strict=True))
    assert rates[-1] == rate


def test_the_other_ramps_have_their_documented_shapes():
    step = [freeze_rate(_freeze(ramp="step"), r, 8) for r in range(1, 9)]
    assert step == pytest.approx([0, 0, 0.3, 0.3, 0.6, 0.6, 0.9, 0.9])
    cosine = [freeze_rate(_freeze(ramp="cosine"), r, 9) for r in range(1, 10)]
    assert cosine == pytest.approx([0.45 * (1 - np.cos(np.pi * i / 8)) for i in range(9)])
    assert [freeze_rate(_freeze(ramp="constant"), r, 3) for r in (1, 2, 3)] == [0.9] * 3


@pytest.mark.parametrize("round", [0, 21])
def test_a_round_outside_the_run_is_refused(round):
    with pytest.raises(ValueError, match="outside"):
        freeze_rate(_freeze(), round, 20)


def test_without_a_method_nothing_is_frozen():
    assert freeze_rate(Freeze(), 5, 10) == 0.0
    assert live_by_round(Sparsity(), 7, 3) == [7, 7, 7]


def test_drop_counts_what_freeze_left():
    sparsity = Sparsity(freeze=_freeze(rate=0.5, ramp="constant"), drop=Drop(method="magnitude", rate=0.9))
    assert step_live_count(sparsity, 1001, 1, 4) == 501 - frozen_count(0.9, 501)
    assert live_by_round(sparsity, 1001, 2) == [51, 51]


def test_a_random_drop_bounds_the_round_by_the_union_of_its_steps():
    sparsity = Sparsity(drop=Drop(method="random", rate=0.75))
    assert live_by_round(sparsity, 1000, 1, local_steps=1) == [250]
    assert live_by_round(sparsity, 1000, 1, local_steps=3) == [750]
    assert live_by_round(sparsity, 1000, 1, local_steps=9) == [1000]
    assert live_by_round(sparsity, 1000, 1) == [1000]


def test_a_freeze_per_step_bounds_the_round_by_the_survivors():
    sparsity = Sparsity(freeze=_freeze(ramp="constant", refresh="step"))
    assert steps_differ(sparsity)
    assert live_by_round(sparsity, 1000, 1) == [1000]
    assert live_by_round(sparsity, 1000, 1, local_steps=2) == [200]
    assert not steps_differ(Sparsity(freeze=_freeze(), drop=Drop(method="magnitude", rate=0.5)))


def test_groups_are_counted_whole_and_bounded_by_the_largest():
    sparsity = Sparsity(granularity="row", freeze=_freeze(rate=0.5, ramp="constant"))
    assert live_by_round(sparsity, 13, 1, group_sizes=np.array([1, 2, 10, 0])) == [12]
    with pytest.raises(ValueError, match="sizes"):
        live_by_round(sparsity, 13, 1)
