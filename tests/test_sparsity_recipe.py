"""A round's support from public terms: nesting, counts, streams, and the same answer everywhere."""

import itertools
import multiprocessing
import os
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_dpprune.config import Drop, Freeze, Sparsity
from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.sparsity.recipe import drawn_live_by_round, fixed, recomputable, round_support, tensor_quotas
from fed_dpprune.sparsity.schedule import live_by_round, live_count
from fed_dpprune.sparsity.support import Support, dense, frozen_count

LAYOUT = Layout(
    (
        Tensor("conv.weight", (8, 3, 3, 3), fan_in=27),
        Tensor("conv.bias", (8,), "bias"),
        Tensor("norm.weight", (8,), "norm"),
        Tensor("fc.weight", (20, 40), fan_in=40),
        Tensor("fc.bias", (20,), "bias"),
    )
)
ALL = dense(LAYOUT.d)
WEIGHTS = np.random.default_rng(0).normal(size=LAYOUT.d).astype(np.float32)
SCORES = np.random.default_rng(1).uniform(size=LAYOUT.d)
ODDS = np.array([9, 1, 1, 30, 2])

RANDOM_FREEZE = Sparsity(freeze=Freeze(method="random", rate=0.9))
SELECT = Sparsity(drop=Drop(method="random", rate=0.9))
MIXED = Sparsity(freeze=Freeze(method="random", rate=0.6, refresh="step"), drop=Drop(method="random", rate=0.5))


def _constant(rate=0.8, **keys):
    return Freeze(method=keys.pop("method", "random"), rate=rate, ramp="constant", **keys)


def _support(sparsity, round=2, rounds=4, survivors=ALL, layout=LAYOUT, seed=5, **keys):
    terms = {"weights": WEIGHTS, "start_weights": WEIGHTS, "public_scores": SCORES, "odds": ODDS, **keys}
    return round_support(sparsity, survivors, layout, seed, round, rounds, **terms)


def golden_digests():
    """What two presets' third round is, for ever and everywhere."""
    random_freeze = _support(RANDOM_FREEZE, round=3, rounds=10)
    select = _support(SELECT, round=3, rounds=10, local_steps=2)
    mixed = _support(MIXED, round=3, rounds=10, local_steps=2)
    odds = _support(Sparsity(freeze=_constant(odds="layer-energy")), round=3)
    return (random_freeze.support.digest, select.steps(1).digest, mixed.support.digest, odds.support.digest)


GOLDEN = (
    "c1aac80a75055058563e50bb955c9db8",
    "597b1b25fa609205be66ff921c30fb34",
    "70029c32232cd1ef48999c31549d0cce",
    "ef982dba2725b5dd8cdd128af1f1270f",
)


def test_supports_are_the_same_for_ever():
    assert golden_digests() == GOLDEN


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_supports_are_the_same_in_every_process(method):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(golden_digests) == GOLDEN


@pytest.mark.parametrize("threads", ["1", "4"])
def test_supports_are_the_same_for_every_thread_count_and_need_no_torch(threads):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_sparsity_recipe as t;"
        "assert t.golden_digests() == t.GOLDEN; assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_ramp_freezes_the_published_counts_of_the_dp_cnn():
    layout = Layout((Tensor("w", (550_570,)),))
    for round, live in ((1, 550_570), (2, 540_028), (3, 529_485), (48, 55_057)):
        assert round_support(RANDOM_FREEZE, dense(layout.d), layout, 0, round, 48).support.k == live


def test_a_run_of_one_round_is_at_the_final_rate():
    assert _support(RANDOM_FREEZE, round=1, rounds=1).support.k == LAYOUT.d - frozen_count(0.9, LAYOUT.d)


@given(st.floats(0, 0.999), st.integers(1, 6), st.sampled_from(["random", "magnitude", "public"]), st.integers(0, 1104))
def test_the_count_is_exact_for_any_rate_and_any_survivors(rate, round, method, survivors):
    outer = Support(np.arange(survivors, dtype=np.int64), 1104)
    layout = Layout((Tensor("w", (1104,)),))
    freeze = Freeze(method=method, rate=rate)
    ties = {"weights": np.ones(1104, np.float32), "start_weights": None, "public_scores": np.zeros(1104), "odds": None}
    live = _support(Sparsity(freeze=freeze), round, 6, outer, layout, **ties).support
    assert live.k == live_count(freeze, survivors, round, 6)
    assert set(live.indices) <= set(outer.indices)


@pytest.mark.parametrize("refresh", ["run", "round", "step"])
def test_the_support_changes_when_refresh_says_so(refresh):
    sparsity = Sparsity(freeze=_constant(refresh=refresh))
    first, second = (_support(sparsity, round=r, local_steps=2) for r in (1, 2))
    assert (first.support.digest == second.support.digest) == (refresh == "run")
    assert (first.steps(0).digest == first.steps(1).digest) == (refresh != "step")


def test_refresh_per_run_gives_nested_supports_under_a_ramp():
    sparsity = Sparsity(freeze=Freeze(method="random", rate=0.9, refresh="run"))
    supports = [_support(sparsity, round=r, rounds=6).support for r in range(1, 7)]
    for outer, inner in itertools.pairwise(supports):
        assert inner.k < outer.k
        inner.within(outer)


def test_redrawn_supports_are_not_nested():
    supports = [_support(RANDOM_FREEZE, round=r, rounds=4).support for r in (2, 3)]
    with pytest.raises(ValueError, match="nest"):
        supports[1].within(supports[0])


@pytest.mark.parametrize("sparsity", [SELECT, MIXED, Sparsity(freeze=_constant(refresh="step"))])
@pytest.mark.parametrize("granularity", ["element", "row", "channel", "layer"])
def test_the_rounds_support_is_the_union_of_its_steps(sparsity, granularity):
    whole = _support(sparsity.model_copy(update={"granularity": granularity}), local_steps=3)
    steps = [whole.steps(step) for step in range(3)]
    for step in steps:
        step.within(whole.support)
    assert np.array_equal(whole.support.indices, np.unique(np.concatenate([s.indices for s in steps])))


def test_with_freeze_and_prune_off_two_steps_of_one_round_differ():
    whole = _support(SELECT, local_steps=2)
    assert whole.steps(0).k == whole.steps(1).k == LAYOUT.d - frozen_count(0.9, LAYOUT.d)
    assert whole.steps(0).digest != whole.steps(1).digest


def test_with_one_local_step_the_uplink_carries_that_step_alone():
    assert _support(SELECT, local_steps=1).support.k == LAYOUT.d - frozen_count(0.9, LAYOUT.d)


@pytest.mark.parametrize("step", [-1, 2])
def test_a_step_that_the_round_does_not_have_is_refused(step):
    with pytest.raises(ValueError, match="outside"):
        _support(SELECT, local_steps=2).steps(step)


def test_a_step_is_the_same_whenever_and_in_whatever_order_it_is_asked_for():
    forward, backward = _support(MIXED, local_steps=20), _support(MIXED, local_steps=20)
    digests = [forward.steps(step).digest for step in range(20)]
    assert digests == [backward.steps(step).digest for step in reversed(range(20))][::-1]
    assert len(set(digests)) == 20


def test_magnitude_keeps_the_largest_released_weights():
    live = _support(Sparsity(freeze=_constant(0.7, method="magnitude"))).support
    kept = LAYOUT.d - frozen_count(0.7, LAYOUT.d)
    assert np.array_equal(live.indices, np.sort(np.argsort(-np.abs(WEIGHTS), kind="stable")[:kept]))
    assert live.provenance == "data-free"


def test_magnitude_with_refresh_per_run_looks_at_the_start_of_the_run():
    sparsity = Sparsity(freeze=_constant(method="magnitude", refresh="run"))
    at_start = _support(sparsity, weights=WEIGHTS[::-1].copy(), start_weights=WEIGHTS).support
    assert at_start.digest == _support(Sparsity(freeze=_constant(method="magnitude"))).support.digest
    assert not recomputable(sparsity)


def test_equal_weights_are_kept_from_the_front():
    sparsity = Sparsity(drop=Drop(method="magnitude", rate=0.5))
    live = _support(sparsity, weights=np.full(LAYOUT.d, -1.0, np.float32)).support
    assert np.array_equal(live.indices, np.arange(LAYOUT.d - LAYOUT.d // 2))


def test_public_scores_make_a_public_support_and_must_be_shipped():
    sparsity = Sparsity(drop=Drop(method="public", rate=0.5))
    assert _support(sparsity).support.provenance == "public"
    assert not recomputable(sparsity)
    assert recomputable(MIXED)


def test_provenance_never_improves_on_its_way():
    outer = Support(ALL.indices, ALL.d, "public")
    for sparsity in (RANDOM_FREEZE, SELECT, Sparsity(drop=Drop(method="magnitude", rate=0.5))):
        assert _support(sparsity, survivors=outer, local_steps=2).support.provenance == "public"


def test_shared_supports_ignore_the_client_and_others_differ_by_client():
    shared = [_support(RANDOM_FREEZE, client=c).support.digest for c in (None, 1, 2)]
    assert len(set(shared)) == 1
    alone = RANDOM_FREEZE.model_copy(update={"shared": False})
    own = [_support(alone, client=c).support.digest for c in (1, 2, 1)]
    assert own[0] == own[2] != own[1]
    assert shared[0] not in own
    with pytest.raises(ValueError, match="client"):
        _support(alone)


@pytest.mark.parametrize(
    ("sparsity", "missing"),
    [
        (Sparsity(freeze=_constant(method="magnitude")), "weights"),
        (Sparsity(drop=Drop(method="magnitude", rate=0.5)), "weights"),
        (Sparsity(freeze=_constant(method="public")), "public_scores"),
        (Sparsity(freeze=_constant(odds="layer-energy")), "odds"),
    ],
)
def test_what_a_method_needs_is_never_guessed(sparsity, missing):
    for wrong in (None, np.zeros(3)):
        with pytest.raises(ValueError, match=r"need|must be"):
            _support(sparsity, **{missing: wrong})


def test_survivors_of_another_net_are_refused():
    with pytest.raises(ValueError, match="layout"):
        _support(RANDOM_FREEZE, survivors=dense(3))


@pytest.mark.parametrize("granularity", ["row", "channel", "layer"])
@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_groups_live_whole_and_are_counted_exactly(granularity, method):
    from fed_dpprune.sparsity.groups import group_ids

    live = _support(Sparsity(granularity=granularity, freeze=_constant(0.5, method=method))).support
    ids = group_ids(LAYOUT, granularity)
    living, groups = np.unique(ids[live.indices]), int(ids.max()) + 1
    assert living.size == groups - frozen_count(0.5, groups)
    assert np.array_equal(live.indices, np.flatnonzero(np.isin(ids, living)))


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("sparsity", [RANDOM_FREEZE, SELECT, MIXED])
def test_counting_bounds_what_drawing_finds_and_is_exact_for_one_step(sparsity, local_steps):
    drawn = drawn_live_by_round(sparsity, ALL, LAYOUT, 5, 4, local_steps)
    bound = live_by_round(sparsity, LAYOUT.d, 4, local_steps=local_steps)
    assert all(a <= b for a, b in zip(drawn, bound, strict=True))
    if local_steps == 1:
        assert drawn == bound


def test_what_is_not_known_beforehand_is_not_drawn_beforehand():
    with pytest.raises(ValueError, match="not known"):
        drawn_live_by_round(Sparsity(drop=Drop(method="magnitude", rate=0.5)), ALL, LAYOUT, 5, 4, 1)


def test_a_fixed_support_is_every_steps_support():
    assert fixed(ALL).steps(7) is ALL


# Layer-energy odds


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 65535)), min_size=1, max_size=12), st.integers(0, 2**64 - 1), st.data()
)
def test_quotas_add_up_and_stay_within_rounding_of_their_share(tensors, word, data):
    sizes, odds = [s for s, _ in tensors], [o for _, o in tensors]
    keep = data.draw(st.integers(0, sum(sizes)))
    quotas = tensor_quotas(sizes, odds, keep, word)
    assert sum(quotas) == keep
    assert all(0 <= q <= s for q, s in zip(quotas, sizes, strict=True))
    open_ones = [t for t, (q, s) in enumerate(zip(quotas, sizes, strict=True)) if q < s - 1]
    total = sum(sizes[t] * odds[t] for t in open_ones)
    rest = sum(quotas[t] for t in open_ones)
    for t in open_ones:
        assert abs(quotas[t] - rest * sizes[t] * odds[t] / total) <= 1 + len(open_ones)


def test_the_mean_quota_is_the_share_so_that_no_small_tensor_starves():
    sizes, odds, keep, starts = [1000, 10, 3000], [1, 2, 3], 40, 1000
    words = [int(n * 2**64 / starts) for n in range(starts)]
    mean = np.mean([tensor_quotas(sizes, odds, keep, word) for word in words], axis=0)
    total = 1000 + 20 + 9000
    assert mean == pytest.approx([keep * 1000 / total, keep * 20 / total, keep * 9000 / total], abs=0.01)


def test_a_tensor_whose_share_exceeds_it_is_taken_whole():
    assert tensor_quotas([5, 100], [1000, 1], 50, 2**63) == [5, 45]
    assert tensor_quotas([5, 100], [1000, 1], 105, 0) == [5, 100]
    assert tensor_quotas([5, 0], [1, 1], 0, 2**64 - 1) == [0, 0]


def test_equal_odds_live_evenly_and_higher_odds_more_often():
    def live_shares(odds):
        sparsity, hits = Sparsity(freeze=_constant(0.9, odds="layer-energy")), np.zeros(LAYOUT.d)
        for round in range(1, 301):
            support = _support(sparsity, round=round, rounds=300, odds=odds).support
            assert support.k == LAYOUT.d - frozen_count(0.9, LAYOUT.d)
            hits[support.indices] += 1
        return np.array([hits[span].mean() / 300 for _, span in LAYOUT.spans()])

    assert live_shares(np.full(5, 7)) == pytest.approx(np.full(5, 0.1), abs=0.02)
    shares = live_shares(np.array([4, 1, 1, 2, 1]))
    assert shares[0] / shares[3] == pytest.approx(2, abs=0.1)
    assert shares[3] > shares[1]


def test_odds_apply_to_groups_too():
    sparsity = Sparsity(granularity="row", freeze=_constant(0.5, odds="layer-energy"))
    assert 0 < _support(sparsity).support.k < LAYOUT.d


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.99, 0.9, 0.5, 0.1])
def test_eleven_million_parameters_take_at_most_150_ms(rate, capsys):
    layout = Layout((Tensor("w", (11_181_642,)),))
    sparsity, everything, seconds = Sparsity(freeze=_constant(rate)), dense(layout.d), []
    weights = np.zeros(layout.d, np.float32)
    for round in range(1, 10):
        start = time.perf_counter()
        live = round_support(sparsity, everything, layout, 0, round, 9).support
        weights[live.indices] += 1.0
        live.digest  # noqa: B018  (computed on first use, and it travels with the terms)
        seconds.append(time.perf_counter() - start)
    with capsys.disabled():
        print(f"\nrate {rate}: k {live.k}, median {np.median(seconds) * 1e3:.0f} ms, worst {max(seconds) * 1e3:.0f} ms")
    assert np.median(seconds) <= 0.15


def test_a_rounds_support_of_many_steps_takes_the_memory_of_a_few():
    """A server chooses the steps: their supports are added up one by one, not kept."""
    layout = Layout((Tensor("w", (200, 1000)),))
    sparsity = Sparsity(freeze=Freeze(method="random", rate=0.5, refresh="step"))
    tracemalloc.start()
    try:
        round_support(sparsity, dense(layout.d), layout, 0, 1, 1, local_steps=100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 25 * 9 * layout.d  # mask and indices of all steps would be 50 times
