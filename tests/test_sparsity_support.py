"""The support type and the exact-count draw: order, ties, nesting, golden digests."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_dpprune import randomness
from fed_dpprune.sparsity import support
from fed_dpprune.sparsity.support import Support, draw_positions, from_mask, frozen_count, largest, smallest, union, weakest

# BLAKE2b-64 of the little-endian int64 positions, seed 7, purpose "support", ids (1,) and ("freeze", 3, 0).
GOLDEN = [
    (1, 0, "e4a6a0577479b2b4", "e4a6a0577479b2b4"),
    (1, 1, "ca08ea5bca49cc18", "ca08ea5bca49cc18"),
    (10, 3, "48b2447d5de3b0a2", "352128396c27fde5"),
    (1_000, 1, "91e51b12a9a198c5", "1e12630238252a7d"),
    (1_000, 500, "a37442f08379bec5", "c5b1732d26152f0d"),
    (1_000, 999, "4e9795d15df6aebb", "66a8e844e0a1d2ea"),
    (26_010, 0, "e4a6a0577479b2b4", "e4a6a0577479b2b4"),
    (26_010, 406, "b2decb3d529acf30", "c97160f04ec67359"),
    (26_010, 26_010, "83bc2813c7eedeff", "83bc2813c7eedeff"),
    (550_570, 55_057, "11ce834c7c13f9be", "d30739b586de9fbb"),
    (550_570, 495_513, "e0be6a9b07847789", "aea99c23bebba7b7"),
    (11_181_642, 1_118_165, "313944545031a8ac", "e16f8c253d63b455"),
]


def _digest(positions):
    return hashlib.blake2b(positions.astype("<i8").tobytes(), digest_size=8).hexdigest()


@pytest.mark.parametrize(("count", "keep", "by_number", "by_name"), GOLDEN)
def test_draws_are_the_same_for_ever(count, keep, by_number, by_name):
    assert _digest(draw_positions(count, keep, 7, "support", 1)) == by_number
    assert _digest(draw_positions(count, keep, 7, "support", "freeze", 3, 0)) == by_name


@given(st.integers(0, 3000), st.data())
def test_a_draw_is_the_keep_smallest_key_position_pairs(count, data):
    keep = data.draw(st.integers(0, count))
    keys = randomness.raw_u32(count, 3, "support", count)
    expected = np.sort(np.argsort(keys, kind="stable")[:keep])
    assert np.array_equal(draw_positions(count, keep, 3, "support", count), expected)


@pytest.mark.parametrize("count", [support.CHUNK - 1, support.CHUNK, support.CHUNK + 1, 2 * support.CHUNK + 3])
def test_a_draw_does_not_depend_on_the_pieces_it_is_made_in(count):
    keys = randomness.raw_u32(count, 3, "support", 9)
    for keep in (1, count // 3, count - 1):
        expected = np.sort(np.argsort(keys, kind="stable")[:keep])
        assert np.array_equal(draw_positions(count, keep, 3, "support", 9), expected)


def test_fewer_of_one_stream_are_a_subset_of_more():
    sets = [set(draw_positions(5000, keep, 1, "support", 2).tolist()) for keep in (0, 1, 17, 2500, 4999, 5000)]
    assert all(small < large for small, large in itertools.pairwise(sets))


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_the_count_is_exact_even_when_all_keys_are_equal(monkeypatch, word):
    class Stuck:
        def random_raw(self, size):
            return np.full(size, word, dtype=np.uint64)

    monkeypatch.setattr(randomness, "bit_generator", lambda *_: Stuck())
    for keep in (1, 500, 999):
        assert np.array_equal(draw_positions(1000, keep, 0, "support"), np.arange(keep))


def test_every_position_is_equally_likely():
    draws, count, keep = 4000, 50, 10
    hits = np.zeros(count)
    for number in range(draws):
        hits[draw_positions(count, keep, 0, "support", "uniform", number)] += 1
    share = keep / count
    deviation = (hits - draws * share) / np.sqrt(draws * share * (1 - share))
    assert np.abs(deviation).max() < 4.5  # 50 normal values: one beyond 4.5 in 3,000 seeds, and this seed is fixed


def test_draws_of_other_seeds_purposes_and_ids_differ():
    base = draw_positions(1000, 100, 0, "support", 1)
    for other in ((1, "support", 1), (0, "client-support", 1), (0, "support", 2), (0, "support", "1")):
        assert not np.array_equal(base, draw_positions(1000, 100, *other))


@pytest.mark.parametrize("keep", [-1, 11])
def test_an_impossible_count_is_refused(keep):
    with pytest.raises(ValueError, match="cannot keep"):
        draw_positions(10, keep, 0, "support")


@given(st.lists(st.integers(0, 3), max_size=60), st.data())
def test_ties_go_to_the_lower_position_and_the_count_is_exact(values, data):
    keep = data.draw(st.integers(0, len(values)))
    scores = np.asarray(values, dtype=np.float64)
    order = np.argsort(scores, kind="stable")
    assert np.array_equal(smallest(scores, keep), np.sort(order[:keep]))
    best = np.argsort(-scores, kind="stable")
    assert np.array_equal(largest(scores, keep), np.sort(best[:keep]))


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="not a number"):
        largest(np.array([1.0, np.nan]), 1)


@pytest.mark.parametrize(
    ("rate", "count", "frozen"),
    [(0.9, 550_570, 495_513), (0.3, 10, 3), (0.29, 100, 29), (0.0, 5, 0), (0.999, 1, 0), (0.5, 3, 1), (0.7, 0, 0)],
)
def test_the_frozen_count_is_the_floor_of_the_decimal_product(rate, count, frozen):
    assert frozen_count(rate, count) == frozen


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_outside_the_unit_interval_is_refused(rate):
    with pytest.raises(ValueError, match="outside"):
        frozen_count(rate, 10)


@pytest.mark.parametrize(
    "indices",
    [
        np.array([1, 1]),
        np.array([2, 1]),
        np.array([-1]),
        np.array([5]),
        np.array([0.0]),
        np.array([[0]]),
        np.array([0], np.int32),
    ],
)
def test_indices_that_are_not_ascending_unique_and_in_range_are_refused(indices):
    with pytest.raises(ValueError, match="indices"):
        Support(indices, 5)


def test_a_support_cannot_be_changed():
    live = Support(np.array([0, 2]), 5)
    with pytest.raises(ValueError, match="read-only"):
        live.indices[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        live.mask[1] = True


def test_the_digest_tells_supports_apart_and_ignores_provenance():
    digests = {Support(np.array(indices, dtype=np.int64), d).digest for indices, d in (([], 8), ([0], 8), ([1], 8), ([0], 9))}
    assert len(digests) == 4
    assert Support(np.array([3]), 8, "public").digest == Support(np.array([3]), 8).digest


def test_a_support_that_leaves_the_one_it_should_nest_in_is_refused():
    outer = Support(np.array([1, 4, 6]), 8)
    assert Support(np.array([1, 6]), 8).within(outer).tolist() == [0, 2]
    for outside in ([2], [7], [1, 5]):
        with pytest.raises(ValueError, match="nest"):
            Support(np.array(outside), 8).within(outer)


def test_a_union_lives_where_any_does_and_claims_the_least():
    both = union([Support(np.array([1, 3]), 6, "random"), Support(np.array([0, 3]), 6, "public")])
    assert both.indices.tolist() == [0, 1, 3]
    assert both.provenance == "public"
    assert weakest("random", "private", "data-free") == "private"


def test_masks_and_indices_say_the_same():
    mask = np.array([True, False, True, True])
    assert np.array_equal(from_mask(mask).mask, mask)
    assert from_mask(mask).live_fraction == 0.75
