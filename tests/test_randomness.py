"""Streams by purpose: apart from each other, the same on every machine, and fixed for ever."""

from __future__ import annotations

import numpy as np
import pytest

from fed_dpprune import randomness

IDS = [
    (0, "support"),
    (0, "init"),
    (1, "support"),
    (0, "support", 1),
    (0, "support", 1, 2),
    (0, "support", "1"),
    (0, "support", b"1"),
]


def test_no_two_streams_share_a_word():
    words = [set(randomness.raw_u64(500, *ids).tolist()) for ids in IDS]
    assert len(set.union(*words)) == 500 * len(IDS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        ((1, 2), (12,)),
        ((1,), ("1",)),
        (("1",), (b"1",)),
        ((1, 0), (1,)),
        ((-1,), (2**64 - 1,)),
    ],
)
def test_ids_that_look_alike_are_other_streams(one, other):
    assert randomness.raw_u64(1, 0, "support", *one) != randomness.raw_u64(1, 0, "support", *other)


@pytest.mark.parametrize("purpose", ["", "Support", "weights", "noise "])
def test_a_purpose_that_is_on_no_list_is_refused(purpose):
    with pytest.raises(ValueError, match="unknown random purpose"):
        randomness.raw_u64(1, 0, purpose)


def test_secret_and_public_purposes_are_apart():
    assert not set(randomness.PUBLIC_PURPOSES) & set(randomness.SECRET_PURPOSES)
    assert set(randomness.SECRET_PURPOSES) == {"batches", "noise"}


def test_the_raw_words_are_these_on_every_machine():
    """Golden: a change here changes every support and every initial weight of every run ever made."""
    assert [hex(w) for w in randomness.raw_u64(3, 7, "support", "freeze", 1, 0)] == GOLDEN_U64
    assert randomness.permutation(8, 7, "cohort", 3).tolist() == GOLDEN_PERMUTATION
    assert randomness.uniform_f32(3, 7, "init", "w").tolist() == GOLDEN_UNIFORM


def test_half_words_are_the_low_half_then_the_high_half():
    whole = randomness.raw_u64(4, 1, "init")
    halves = randomness.raw_u32(7, 1, "init")
    expected = [int(w) >> shift & 0xFFFFFFFF for w in whole for shift in (0, 32)][:7]
    assert halves.tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(count):
    assert np.array_equal(randomness.raw_u32(count, 1, "init"), randomness.raw_u32(1000, 1, "init")[:count])
    assert np.array_equal(randomness.uniform_f32(count, 1, "init"), randomness.uniform_f32(1000, 1, "init")[:count])


def test_uniform_draws_fill_their_interval_evenly():
    values = randomness.uniform_f32(100_000, 1, "init")
    assert values.dtype == np.float32
    assert values.min() >= -1
    assert values.max() < 1
    counts = np.histogram(values, bins=20, range=(-1, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-square, 19 degrees of freedom: p about 1e-4


def test_a_permutation_holds_every_number_once():
    assert np.array_equal(np.sort(randomness.permutation(1000, 1, "cohort")), np.arange(1000))


def test_negative_and_large_seeds_are_seeds():
    seeds = [-1, 0, 1, 2**63 - 1, -(2**63)]
    assert len({int(randomness.raw_u64(1, seed, "init")[0]) for seed in seeds}) == len(seeds)


GOLDEN_U64 = ["0x73b2d30a8aa334c0", "0x33138dfcbc09099f", "0x8696e192b81798c8"]
GOLDEN_PERMUTATION = [0, 6, 1, 2, 3, 7, 4, 5]
GOLDEN_UNIFORM = [0.16668915748596191, -0.053960442543029785, 0.6607810258865356]
