"""Noise: its distribution to the tail, and that no two releases ever share any of it."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fed_dpprune import randomness
from fed_dpprune.dpsgd import compiled, noise, ziggurat
from fed_dpprune.dpsgd.noise import OsNoise, SeededNoise

REPEATS, LIVE = 64, 2000
ALARM = 1e-6


def _sources() -> list[Any]:
    return [OsNoise(), SeededNoise(7, "run", 1, b"digest")]


@pytest.mark.parametrize("source", _sources(), ids=lambda source: source.label)
def test_every_coordinate_has_variance_one_and_so_has_the_pool(source: noise.NoiseSource) -> None:
    drawn = np.stack([source.normal(LIVE) for _ in range(REPEATS)])
    assert drawn.dtype == np.float64 and drawn.shape == (REPEATS, LIVE)
    low, high = stats.chi2.ppf([ALARM / (2 * LIVE), 1 - ALARM / (2 * LIVE)], REPEATS) / REPEATS
    by_coordinate = (drawn**2).mean(axis=0)
    assert low < by_coordinate.min() and by_coordinate.max() < high
    assert abs((drawn**2).mean() - 1) < 4.9 * np.sqrt(2 / drawn.size)
    assert abs(drawn.mean()) < 4.9 / np.sqrt(drawn.size)


@pytest.mark.parametrize("source", _sources(), ids=lambda source: source.label)
def test_the_whole_distribution_is_normal(source: noise.NoiseSource) -> None:
    drawn = source.normal(200_000)
    assert stats.kstest(drawn, "norm").pvalue > ALARM
    # The tail beyond 4 holds 6.3e-5 of the mass: its count is Poisson.
    beyond, expected = int((np.abs(drawn) > 4).sum()), 200_000 * 2 * stats.norm.sf(4)
    assert stats.poisson.cdf(beyond, expected) > ALARM and stats.poisson.sf(beyond - 1, expected) > ALARM


def test_coordinates_are_independent_of_their_neighbours_and_of_the_other_half() -> None:
    drawn = OsNoise().normal(100_000)
    band = 5 / np.sqrt(50_000)
    for lag in (1, 2, 3, 4, 4096, 8192, 50_000):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < band, lag
        assert abs(np.corrcoef(drawn[:-lag] ** 2, drawn[lag:] ** 2)[0, 1]) < band, lag


def test_the_tail_is_not_cut_where_single_precision_would_cut_it() -> None:
    smallest = noise._box_muller(np.array([0, 0], dtype=np.uint64))
    assert smallest.max() == pytest.approx(np.sqrt(2 * 53 * np.log(2)))
    assert smallest.max() > 8.5
    largest = noise._box_muller(np.array([2**64 - 1, 0], dtype=np.uint64))
    assert np.isfinite(largest).all() and np.abs(largest).max() < 1e-7


def test_values_are_sums_of_four_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = noise._box_muller

    def spy(words: NDArray[np.uint64]) -> NDArray[np.float64]:
        taken.append(len(words))
        return real(words)

    monkeypatch.setattr(noise, "_box_muller", spy)
    OsNoise().normal(1000)
    assert sum(taken) == 4 * 1000


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8191, 8192, 8193])
def test_any_count_gives_that_many_values(count: int) -> None:
    for source in _sources():
        drawn = source.normal(count)
        assert drawn.shape == (count,) and np.isfinite(drawn).all() and len(set(drawn.tolist())) == count


def _correlated(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    return bool(abs(np.corrcoef(first, second)[0, 1]) > 5 / np.sqrt(len(first))) or bool(np.intersect1d(first, second).size)


def test_two_calls_two_instances_and_a_copy_never_repeat() -> None:
    one, two = OsNoise(), OsNoise()
    copied = pickle.loads(pickle.dumps(one))
    drawn = [one.normal(5000), one.normal(5000), two.normal(5000), copied.normal(5000)]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert not _correlated(first, second)


def test_seeding_libraries_does_not_repeat_the_noise() -> None:
    torch = pytest.importorskip("torch")
    import random

    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        drawn.append(OsNoise().normal(5000))
    assert not _correlated(*drawn)


def test_the_operating_system_is_asked_for_a_new_key_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = os.urandom

    def spy(size: int) -> bytes:
        asked.append(size)
        return real(size)

    monkeypatch.setattr(noise.os, "urandom", spy)
    source = OsNoise()
    for _ in range(3):
        source.normal(10)
    assert asked == [32, 32, 32]


def _draw(source: Any, pipe: Any) -> None:
    pipe.send(source.normal(2000))
    pipe.close()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_forked_and_spawned_processes_draw_their_own_noise(start: str) -> None:
    context = multiprocessing.get_context(start)
    source = OsNoise()
    source.normal(10)  # a warm parent
    drawn = []
    for _ in range(2):
        ours, theirs = context.Pipe()
        child = context.Process(target=_draw, args=(source, theirs))
        child.start()
        drawn.append(ours.recv())
        child.join()
    drawn.append(source.normal(2000))
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert not _correlated(first, second)


def test_a_fork_in_the_middle_of_a_call_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = iter([1, 2])
    monkeypatch.setattr(noise.os, "getpid", lambda: next(pids))
    with pytest.raises(RuntimeError, match="forked"):
        OsNoise().normal(5)


def test_a_source_keeps_no_key_and_no_stream() -> None:
    source = OsNoise()
    source.normal(5)
    assert vars(source) == {}
    assert pickle.dumps(source) == pickle.dumps(OsNoise())


@pytest.mark.parametrize(
    "other",
    [
        lambda: SeededNoise(8, "run", 1, b"digest"),
        lambda: SeededNoise(7, "run", 2, b"digest"),
        lambda: SeededNoise(7, "run", 1, b"changed"),
    ],
    ids=["seed", "round", "request"],
)
def test_simulated_noise_repeats_for_the_same_request_alone(other: Callable[[], SeededNoise]) -> None:
    first = SeededNoise(7, "run", 1, b"digest").normal(5000)
    assert (first == SeededNoise(7, "run", 1, b"digest").normal(5000)).all()
    assert not _correlated(first, other().normal(5000))


def test_the_steps_of_one_stream_differ() -> None:
    source = SeededNoise(7, "run", 1)
    assert not _correlated(source.normal(5000), source.normal(5000))


def test_labels_tell_protection_from_simulation() -> None:
    assert OsNoise().label == "os-entropy"
    assert SeededNoise(1).label == "seeded-simulation"


needs_kernel = pytest.mark.skipif(compiled.load() is None, reason="no C++ compiler")


@needs_kernel
def test_seeded_noise_from_the_kernel_is_numpys_to_the_bit_over_calls_of_any_length() -> None:
    assert compiled.load().draws_like_numpy
    beyond = 0
    for run, counts in enumerate([(1, 2, 3, 5, 7, 0, 1023, 1025, 4097), (600_001, 1, 333_333), (7,) * 2000]):
        source, theirs = SeededNoise(3, run), randomness.generator(3, "noise", run)
        assert source.stream is not None
        for count in counts:
            drawn = source.normal(count)
            assert drawn.tobytes() == theirs.standard_normal(count).tobytes()
            beyond += int((np.abs(drawn) > ziggurat.EDGE).sum())
    assert beyond > 100, "the tail was not met"


def _numpy_takes(words: list[int]) -> tuple[float, int]:
    """The value that numpy makes when these are the next words (at most four), and how many of them it used."""
    bits = np.random.Philox(key=1)
    state = bits.state
    state["buffer"], state["buffer_pos"] = np.array((words + [0] * 4)[:4], dtype=np.uint64), 0
    bits.state = state
    return float(np.random.Generator(bits).standard_normal()), int(bits.state["buffer_pos"])


def test_the_layers_are_the_ones_that_numpy_draws_with() -> None:
    """Each layer's width and limit, and the height against which a draw in its wedge is judged: one word more or less shows."""
    table = ziggurat.layers()
    width, inside, height = table[:512:2].view(np.float64), table[1:512:2], table[512:].view(np.float64)
    for layer in range(256):
        limit = int(inside[layer])
        if limit:
            assert _numpy_takes([layer | (limit - 1) << 9]) == ((limit - 1) * width[layer], 1)
            assert _numpy_takes([layer | 256 | (limit // 3) << 9]) == (-(limit // 3) * width[layer], 1)
        assert _numpy_takes([layer | limit << 9, 1 << 62, 1 << 63])[1] in (2, 3)
        if layer:
            magnitude = (limit + 2**52) // 2
            x = magnitude * width[layer]
            low, high = 0, 2**53
            while high - low > 1:  # the largest uniform number that passes
                middle = (low + high) // 2
                passes = (height[layer - 1] - height[layer]) * (middle * 2.0**-53) + height[layer] < math.exp(-0.5 * x * x)
                low, high = (middle, high) if passes else (low, middle)
            assert _numpy_takes([layer | magnitude << 9, low << 11, 7])[1] == 2
            assert _numpy_takes([layer | magnitude << 9, high << 11, 7])[1] == 3


def test_without_a_kernel_seeded_noise_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = SeededNoise(3, "run").normal(10_001)
    monkeypatch.setattr(compiled, "load", lambda: None)
    source = SeededNoise(3, "run")
    assert source.stream is None and source.normal(10_001).tobytes() == fast.tobytes()


@needs_kernel
@pytest.mark.parametrize(("entry", "bits"), [(2 * 100, 0), (2 * 200 + 1, 46), (512 + 100, 48)], ids=["width", "limit", "height"])
def test_a_kernel_whose_normals_are_not_numpys_is_not_used_for_them(
    monkeypatch: pytest.MonkeyPatch, entry: int, bits: int
) -> None:
    right = SeededNoise(3, "run").normal(1000)
    wrong = ziggurat.layers().copy()
    wrong[entry] -= np.uint64(1 << bits)
    monkeypatch.setattr(ziggurat, "layers", lambda: wrong)
    kernel = compiled.Kernel(compiled.load().path)
    monkeypatch.setattr(compiled, "_outcome", lambda: (kernel, ""))
    monkeypatch.setattr(compiled, "load", lambda: kernel)
    status = compiled.kernel_status()
    assert status["available"] and status["seeded_noise"] == "numpy" and "not those of this numpy" in str(status["reason"])
    source = SeededNoise(3, "run")
    assert source.stream is None and source.normal(1000).tobytes() == right.tobytes()
