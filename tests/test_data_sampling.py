"""Poisson sampling: the statistics that the accountants assume, and that other samplers fail."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fed_dpprune.data.sampling import OsUniforms, SeededUniforms, poisson

COUNT, RATE, DRAWS = 1000, 0.05, 400
ALARM = 1e-6


class Fixed:
    """Words given in advance."""

    def __init__(self, words: list[int]) -> None:
        self._words = np.array(words, dtype=np.uint64)

    def words(self, count: int) -> NDArray[np.uint64]:
        return self._words[:count]


def _batches(source: SeededUniforms | OsUniforms) -> list[NDArray[np.int64]]:
    return [poisson(COUNT, RATE, source) for _ in range(DRAWS)]


def _size_tails(batches: list[NDArray[np.int64]]) -> tuple[float, float]:
    """How far in each tail the dispersion of batch sizes and of participations lies, two-sided p-values."""
    sizes = np.array([len(batch) for batch in batches])
    size_spread = ((sizes - COUNT * RATE) ** 2).sum() / (COUNT * RATE * (1 - RATE))
    taken = np.bincount(np.concatenate(batches), minlength=COUNT)
    taken_spread = ((taken - DRAWS * RATE) ** 2).sum() / (DRAWS * RATE * (1 - RATE))
    tails = []
    for spread, freedom in ((size_spread, DRAWS), (taken_spread, COUNT)):
        below = float(stats.chi2.cdf(spread, freedom))
        tails.append(2 * min(below, 1 - below))
    return tails[0], tails[1]


@pytest.mark.parametrize("source", [SeededUniforms(5, "run", 1), OsUniforms()], ids=["seeded", "os"])
def test_batch_sizes_and_participations_are_binomial(source: SeededUniforms | OsUniforms) -> None:
    batches = _batches(source)
    assert min(_size_tails(batches)) > ALARM
    sizes = [len(batch) for batch in batches]
    assert len(set(sizes)) > 10, "a fixed batch size is not Poisson sampling"


def test_the_statistics_tell_other_samplers_apart() -> None:
    rng = np.random.default_rng(0)
    fixed = [np.sort(rng.permutation(COUNT)[: int(COUNT * RATE)]) for _ in range(DRAWS)]
    assert _size_tails(fixed)[0] < ALARM
    shuffled = [part for _ in range(DRAWS // 20) for part in np.split(rng.permutation(COUNT), 20)]
    assert max(_size_tails(shuffled)) < ALARM
    again = [batch for _ in range(20) for batch in [poisson(COUNT, RATE, SeededUniforms(1, step)) for step in range(20)]]
    assert _size_tails(again)[1] < ALARM


def test_rows_are_drawn_independently_of_each_other_and_of_the_step_before() -> None:
    source = SeededUniforms(2, "pairs")
    drawn = np.zeros((4000, 40))
    for row in drawn:
        row[poisson(40, 0.3, source)] = 1.0
    band = 5 / np.sqrt(len(drawn))
    correlation = np.corrcoef(drawn.T)
    assert np.abs(correlation[~np.eye(40, dtype=bool)]).max() < band
    after = [np.corrcoef(drawn[:-1, i], drawn[1:, i])[0, 1] for i in range(40)]
    assert np.abs(after).max() < band


def test_rate_one_takes_every_row_and_no_rows_give_none() -> None:
    assert poisson(17, 1.0, OsUniforms()).tolist() == list(range(17))
    assert poisson(0, 0.5, OsUniforms()).shape == (0,)


def test_empty_batches_occur_with_their_probability_and_have_the_right_type() -> None:
    source = SeededUniforms(3, "empty")
    batches = [poisson(20, 0.05, source) for _ in range(2000)]
    empty = sum(len(batch) == 0 for batch in batches)
    expected = 0.95**20
    assert abs(empty / 2000 - expected) < 5 * np.sqrt(expected * (1 - expected) / 2000)
    assert {batch.dtype for batch in batches} == {np.dtype(np.int64)}


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 2.0**-12, 1 - 2.0**-53, 2.0**-12 * (1 - 2.0**-53), 1e-9, 2.0**-63])
def test_the_chance_is_the_stated_rate_to_64_bits_and_never_above_it(rate: float) -> None:
    threshold = math.floor(Fraction(rate) * 2**64)
    edge = Fixed([threshold - 1, threshold, 0])
    assert poisson(3, rate, edge).tolist() == [0, 2]
    if rate >= 2.0**-12:
        assert Fraction(threshold, 2**64) == Fraction(rate), "every float from here on is met exactly"
    else:
        assert Fraction(rate) - Fraction(1, 2**64) < Fraction(threshold, 2**64) <= Fraction(rate)


def test_at_rate_one_even_the_largest_word_is_in_and_below_the_smallest_step_none_is() -> None:
    assert poisson(2, 1.0, Fixed([2**64 - 1, 0])).tolist() == [0, 1]
    assert poisson(2, 2.0**-65, Fixed([2**64 - 1, 0])).tolist() == []


def test_no_batch_is_capped() -> None:
    source = SeededUniforms(4, "cap")
    largest = max(len(poisson(200, 0.05, source)) for _ in range(3000))
    assert largest >= stats.binom.ppf(1 - 1 / 300, 200, 0.05), "large batches must be as common as chance makes them"


def test_seeded_coins_repeat_by_their_names_and_only_by_them() -> None:
    first = poisson(COUNT, RATE, SeededUniforms(1, "run", 3))
    assert (first == poisson(COUNT, RATE, SeededUniforms(1, "run", 3))).all()
    for other in (SeededUniforms(2, "run", 3), SeededUniforms(1, "run", 4), SeededUniforms(1, "run", "3")):
        assert not np.array_equal(first, poisson(COUNT, RATE, other))


def test_coins_of_the_system_do_not_repeat_under_a_seed() -> None:
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        drawn.append(OsUniforms().words(64).tolist())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(("count", "rate"), [(10, 0.0), (10, -0.1), (10, 1.1), (10, float("nan")), (-1, 0.5)])
def test_an_impossible_rate_or_count_is_refused(count: int, rate: float) -> None:
    with pytest.raises(ValueError, match="must"):
        poisson(count, rate, OsUniforms())
