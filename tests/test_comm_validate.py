"""The bound on an update: honest clients stay below it, its tails add up to the stated chance, absurd values do not pass."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from fed_dpprune.comm.codecs.table import NAMES, codec
from fed_dpprune.comm.validate import FALSE_REJECTION, UpdateBound, check_update
from fed_dpprune.errors import WireError

USUAL = UpdateBound(
    clip_norm=0.5,
    noise_multiplier=1.1,
    divisor=64.0,
    learning_rate=3.0,
    steps=4,
    coordinates=500,
    clients=20,
    rounds=60,
    momentum=0.9,
    weight_decay=0.01,
    weight=2.0,
)


def worst_round(bound: UpdateBound, gradient: float) -> float:
    """The loop of one client with every step's noised mean gradient equal to `gradient` and the weight at its bound."""
    weight, velocity = -bound.weight, 0.0
    for _ in range(bound.steps):
        velocity = bound.momentum * velocity + gradient + bound.weight_decay * weight
        weight -= bound.learning_rate * velocity
    return abs(weight + bound.weight)


def test_an_honest_round_stays_below_the_bound_with_room_to_spare():
    rng = np.random.default_rng(0)
    bound = replace(USUAL, size_slack=1.0)
    for _ in range(20):
        start = rng.uniform(-bound.weight, bound.weight, 500)
        weights, velocity = start.copy(), np.zeros(500)
        for _ in range(bound.steps):
            batch = rng.poisson(bound.divisor)
            gradients = rng.standard_normal((batch, 500))
            gradients *= bound.clip_norm / np.linalg.norm(gradients, axis=1, keepdims=True)
            noise = rng.standard_normal(500) * bound.noise_multiplier * bound.clip_norm
            velocity = bound.momentum * velocity + (gradients.sum(axis=0) + noise) / bound.divisor + bound.weight_decay * weights
            weights -= bound.learning_rate * velocity
        check_update((weights - start).astype(np.float32), 500, bound.value)


def test_examples_that_all_push_one_coordinate_with_all_their_norm_pass():
    """The worst that clipping allows, with the batch and the noise at their tails, is still an honest update."""
    worst = worst_round(USUAL, USUAL.gradient)
    assert worst <= USUAL.value
    check_update(np.array([worst], dtype=np.float32), 1, USUAL.value)


def test_the_bound_is_tight_where_the_worst_case_is_exact():
    plain = replace(USUAL, weight_decay=0.0)
    assert worst_round(plain, plain.gradient) == pytest.approx(plain.value, rel=2e-5)
    one = replace(plain, steps=1)
    assert one.value == pytest.approx(one.learning_rate * one.gradient, rel=2e-5)


def test_the_gaussian_tails_add_up_to_half_the_stated_chance():
    batches = USUAL.steps * USUAL.clients * USUAL.rounds
    quantile = (replace(USUAL, noise_multiplier=1e6).gradient - replace(USUAL, noise_multiplier=0.0).gradient) * USUAL.divisor
    quantile /= 1e6 * USUAL.clip_norm
    chance = 2 * stats.norm.sf(quantile) * USUAL.coordinates * batches
    assert FALSE_REJECTION * 1e-3 < chance <= FALSE_REJECTION / 2


@pytest.mark.parametrize("divisor", [0.5, 4.0, 64.0, 2000.0])
@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5])
def test_the_batch_tails_add_up_to_half_the_stated_chance(divisor, rate):
    exact = replace(USUAL, noise_multiplier=0.0, divisor=divisor, size_slack=1.0)
    most = exact.gradient * divisor / exact.clip_norm
    size = max(1, round(divisor / rate))
    assert stats.binom.sf(math.floor(most), size, rate) * USUAL.steps * USUAL.clients * USUAL.rounds <= FALSE_REJECTION / 2


def test_weights_stored_as_float32_do_not_push_an_honest_update_over_the_bound():
    """With a learning rate near the resolution of float32 a step of 0.6 units in the last place is stored as a whole one."""
    tiny = replace(USUAL, weight_decay=0.0, momentum=0.0, learning_rate=0.6 * 2.0**-23 / USUAL.gradient, weight=1.0)
    weight = np.float32(1.0)
    for _ in range(tiny.steps):
        weight = np.float32(float(weight) + tiny.learning_rate * tiny.gradient)
    moved = weight - np.float32(1.0)
    assert moved > tiny.steps * tiny.learning_rate * tiny.gradient
    check_update(np.array([moved]), 1, tiny.value)


@pytest.mark.parametrize(
    "harsher",
    [
        {"clip_norm": 1.0},
        {"noise_multiplier": 5.0},
        {"learning_rate": 4.0},
        {"steps": 5},
        {"coordinates": 10**7},
        {"clients": 1000},
        {"rounds": 10**4},
        {"momentum": 0.95},
        {"weight_decay": 0.1},
        {"weight": 5.0},
        {"size_slack": 3.0},
        {"overshoot": 1.5},
    ],
)
def test_the_bound_grows_with_whatever_moves_weights_further(harsher):
    assert replace(USUAL, **harsher).value > USUAL.value


def test_the_bound_falls_as_the_divisor_grows():
    assert replace(USUAL, divisor=128.0).value < USUAL.value


@pytest.mark.parametrize("name", NAMES)
def test_an_update_at_the_bound_passes_whatever_the_codec_makes_of_it(name):
    chosen = codec(name)
    bound = replace(USUAL, overshoot=chosen.overshoot).value
    for shape in (np.ones(500), np.eye(1, 500, 7)[0], np.linspace(-1, 1, 500)):
        update = shape * USUAL.value / USUAL.overshoot
        check_update(chosen.decode(chosen.encode(update), 500), 500, bound)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (np.zeros(4, dtype=np.float32), "wrong-length"),
        (np.zeros((5, 1), dtype=np.float32), "wrong-length"),
        (np.array([0, 0, np.nan, 0, 0], dtype=np.float32), "non-finite"),
        (np.array([0, 0, -np.inf, 0, 0], dtype=np.float32), "non-finite"),
        (np.array([0, 0, 0, 0, 1.1], dtype=np.float32), "out-of-bound"),
        (np.array([-1.1, 0, 0, 0, 0], dtype=np.float32), "out-of-bound"),
        (np.full(5, 3e38, dtype=np.float32), "out-of-bound"),
    ],
)
def test_what_no_honest_client_sends_is_refused_with_a_code(values, code):
    with pytest.raises(WireError) as caught:
        check_update(values, 5, 1.0)
    assert caught.value.why == code


def test_an_empty_update_and_one_at_the_bound_pass():
    check_update(np.zeros(0, dtype=np.float32), 0, 1.0)
    check_update(np.array([1.0, -1.0], dtype=np.float32), 2, 1.0)


@pytest.mark.parametrize(
    "impossible", [{"clip_norm": 0.0}, {"divisor": 0.0}, {"learning_rate": math.inf}, {"noise_multiplier": -1.0}, {"steps": 0}]
)
def test_terms_that_the_derivation_does_not_cover_are_refused(impossible):
    with pytest.raises(ValueError, match="bound"):
        replace(USUAL, **impossible)
