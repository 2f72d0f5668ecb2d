"""One client's private steps, with its secrets in the test's hand: what is clipped, noised, divided, moved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import small_run
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.data.dataset import Examples
from fed_dpprune.federation import start
from fed_dpprune.federation.local_train import Share, train
from fed_dpprune.federation.terms import RoundTerms
from fed_dpprune.federation.workbench import Workbench, workbench
from fed_dpprune.sparsity.recipe import RoundSupport, round_support
from fed_dpprune.sparsity.support import dense

NOMINAL, RATE, CLIP, SIGMA = 40, 0.25, 0.5, 1.5
EVERY, NONE = 0, 2**64 - 1


@dataclass
class OpenSecrets:
    """Coins and noise as the test says, and a record of what was asked for."""

    coins: Any = EVERY
    noise_value: float = 0.0
    label: str = "test"
    noises: list[tuple[int, int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def uniforms(self, terms: RoundTerms, step: int) -> OpenSecrets:
        return self

    def words(self, count: int) -> NDArray[np.uint64]:
        self.counts.append(count)
        return np.broadcast_to(np.asarray(self.coins, dtype=np.uint64), (count,)).copy()

    def noise(self, terms: RoundTerms, step: int) -> Any:
        outer = self

        class Source:
            label = "test"

            def normal(self, count: int) -> NDArray[np.float64]:
                outer.noises.append((step, count))
                return np.full(count, outer.noise_value)

        return Source()


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return workbench(cfg.Model(hidden=(16,)), cfg.Engine(), (64,), 10)


@pytest.fixture(scope="module")
def weights(bench) -> NDArray[np.float32]:
    return start.public_weights(bench.layout, 3)


def settings(**changes: Any) -> cfg.Config:
    changes = {"sparsity.prune.method": "none", "sparsity.prune.rate": 0, "sparsity.freeze.rate": 0.7, **changes}
    changes = {"sparsity.freeze.ramp": "constant", "client.momentum": 0, "client.weight-decay": 0, **changes}
    return small_run.config(**changes)


def terms(**changes: Any) -> RoundTerms:
    basis = RoundTerms(
        run="r", round=2, rounds=4, fingerprint="f", config="c", layout="l", seed=3, survivors="s", survivor_count=1210,
        digest="d", live=0, provenance="random", model="m", client=0, sample_rate=RATE, noise_multiplier=SIGMA,
        clip_norm=CLIP, steps=1, learning_rate=1.0, delta=1e-4, accountant="rdp", unit="example",
    )  # fmt: skip
    return replace(basis, **changes)


def support(conf: cfg.Config, bench: Workbench, weights: NDArray[np.float32], steps: int = 1) -> RoundSupport:
    return round_support(
        conf.sparsity, dense(bench.layout.d), bench.layout, 3, 2, 4, local_steps=steps, client=0, weights=weights
    )


def examples(count: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (count, 64)).astype(np.float32), rng.integers(0, 10, count)


def share(x: NDArray[np.float32], y: NDArray[np.int64]) -> Share:
    return Share(Examples(x, y), np.arange(len(x)), NOMINAL)


def moved(bench: Workbench, weights: Any, data: Share, secrets: Any, conf: cfg.Config | None = None, **changes: Any) -> Any:
    conf, request = conf or settings(), terms(**changes)
    live = support(conf, bench, weights, request.steps)
    request = replace(request, live=live.support.k, digest=live.support.digest)
    return train(conf, request, live, dense(bench.layout.d), weights, bench.gradient, data, secrets)


# --- bounded contribution -------------------------------------------------------------------------------------------------


def _odd_ones() -> dict[str, NDArray[np.float32]]:
    plain = examples(1, 9)[0][0]
    one_nan, one_inf = plain.copy(), plain.copy()
    one_nan[3], one_inf[7] = np.nan, -np.inf
    huge, all_nan = plain * np.float32(1e6), np.full(64, np.nan, dtype=np.float32)
    return {"plain": plain, "huge": huge, "one-nan": one_nan, "one-inf": one_inf, "all-nan": all_nan, "zero": plain * 0}


@pytest.mark.parametrize("kind", _odd_ones())
@pytest.mark.parametrize("clipping", ["flat", "per-layer", "automatic"])
def test_one_example_more_moves_the_release_by_at_most_the_clip_norm(bench, weights, kind, clipping):
    """Record and replay: neighbouring data, identical randomness; the pre-noise sums differ by C at most."""
    conf = settings(**{"privacy.clipping": clipping})
    x, y = examples(12)
    more = share(np.vstack([x, _odd_ones()[kind]]), np.append(y, 4))
    outcomes = [moved(bench, weights, data, OpenSecrets(noise_value=0.3), conf) for data in (share(x, y), more)]
    sums = [np.asarray(o) * (RATE * NOMINAL) for o in outcomes]
    assert np.all(np.isfinite(sums[1]))
    assert np.linalg.norm(sums[0] - sums[1]) <= CLIP * (1 + 1e-5)
    if kind in ("plain", "huge"):
        assert np.linalg.norm(sums[0] - sums[1]) > CLIP / 2 if clipping != "automatic" else True


def test_what_moves_is_the_live_coordinates_alone(bench, weights):
    x, y = examples(12)
    conf = settings()
    live = support(conf, bench, weights).support
    result = moved(bench, weights, share(x, y), OpenSecrets())
    assert result.shape == (live.k,)
    assert live.k == 363
    assert np.count_nonzero(result) > live.k / 2


def test_an_example_with_a_gradient_on_frozen_coordinates_alone_adds_nothing(bench, weights):
    """Mask before clip, and nothing of a frozen coordinate in the sum."""
    x, y = np.zeros((1, 64), dtype=np.float32), np.array([3])
    live = support(settings(), bench, weights).support
    result = moved(bench, weights, share(x, y), OpenSecrets())
    first_layer = next(span for tensor, span in bench.layout.spans() if len(tensor.shape) == 2)
    inside = (live.indices >= first_layer.start) & (live.indices < first_layer.stop)
    assert np.count_nonzero(inside) > 0
    assert not result[inside].any(), "the input is zero, so the first layer's weights have no gradient"


def test_masking_comes_before_clipping(bench, weights):
    """With a live part far below C and a frozen part far above it, the live part passes unscaled."""
    x, y = examples(1)
    free = moved(bench, weights, share(x, y), OpenSecrets(), clip_norm=1e6) * (RATE * NOMINAL)
    live_norm = float(np.linalg.norm(free))
    whole = moved(bench, weights, share(x, y), OpenSecrets(), settings(**{"sparsity.freeze.rate": 0.0}), clip_norm=1e6)
    assert np.linalg.norm(whole) * RATE * NOMINAL > live_norm * 1.2, "else this data does not tell the two orders apart"
    bound = live_norm * 1.05
    clipped = moved(bench, weights, share(x, y), OpenSecrets(), clip_norm=bound) * (RATE * NOMINAL)
    np.testing.assert_allclose(clipped, free, rtol=1e-4, atol=1e-6)


# --- noise ----------------------------------------------------------------------------------------------------------------


def test_noise_is_sigma_times_the_clip_norm_on_the_sum_at_every_live_coordinate(bench, weights):
    x, y = examples(12)
    zero = np.zeros_like(weights)
    quiet = moved(bench, zero, share(x, y), OpenSecrets(noise_value=0.0))
    loud = moved(bench, zero, share(x, y), OpenSecrets(noise_value=1.0))
    np.testing.assert_allclose(quiet - loud, SIGMA * CLIP / (RATE * NOMINAL), rtol=1e-5)


def test_noise_is_drawn_for_live_coordinates_only_at_every_step(bench, weights):
    secrets = OpenSecrets()
    moved(bench, weights, share(*examples(12)), secrets, steps=3)
    assert secrets.noises == [(0, 363), (1, 363), (2, 363)]


def test_an_empty_batch_is_released_like_any_other(bench, weights):
    secrets = OpenSecrets(coins=NONE, noise_value=1.0)
    result = moved(bench, np.zeros_like(weights), share(*examples(12)), secrets, steps=2)
    assert len(secrets.noises) == 2
    np.testing.assert_allclose(result, -2 * SIGMA * CLIP / (RATE * NOMINAL), rtol=1e-6)


def test_a_client_without_any_example_releases_noise_too(bench, weights):
    nobody = Share(Examples(*examples(1)), np.zeros(0, dtype=np.int64), NOMINAL)
    secrets = OpenSecrets(noise_value=1.0)
    result = moved(bench, weights, nobody, secrets)
    assert len(secrets.noises) == 1
    assert np.all(result != 0)


# --- rate and divisor -----------------------------------------------------------------------------------------------------


def test_the_rate_that_is_used_is_the_rate_of_the_terms(bench, weights):
    """A coin just below the rate is in, one at the rate is out: 53 bits decide."""
    x, y = examples(1)
    edge = int(RATE * 2**53)
    in_batch = moved(bench, weights, share(x, y), OpenSecrets(coins=(edge - 1) << 11))
    out_of_it = moved(bench, weights, share(x, y), OpenSecrets(coins=edge << 11))
    assert np.any(in_batch)
    assert not np.any(out_of_it)


def test_the_divisor_is_the_public_size_and_not_the_real_one(bench, weights):
    """One row more, not drawn: the result is the same to the bit, and so is the number of values."""
    x, y = examples(13)
    coins = np.full(13, EVERY, dtype=np.uint64)
    coins[12] = NONE
    fewer = moved(bench, weights, share(x[:12], y[:12]), OpenSecrets(coins=coins[:12], noise_value=0.1))
    more = moved(bench, weights, share(x, y), OpenSecrets(coins=coins, noise_value=0.1))
    assert fewer.tobytes() == more.tobytes()


def test_every_row_has_a_coin_at_every_step(bench, weights):
    secrets = OpenSecrets()
    moved(bench, weights, share(*examples(12)), secrets, steps=2)
    assert secrets.counts == [12, 12]


def test_steps_executed_are_the_steps_of_the_terms(bench, weights):
    for steps in (1, 4):
        secrets = OpenSecrets(coins=NONE)
        moved(bench, weights, share(*examples(2)), secrets, settings(**{"federation.local-steps": 3}), steps=steps)
        assert [step for step, _ in secrets.noises] == list(range(steps))


# --- the optimiser --------------------------------------------------------------------------------------------------------


def test_momentum_and_weight_decay_follow_their_formula(bench, weights):
    """Two empty steps of unit noise: v = m v + g + wd w on the live coordinates."""
    conf = settings(**{"client.momentum": 0.9, "client.weight-decay": 0.01})
    secrets = OpenSecrets(coins=NONE, noise_value=1.0)
    result = moved(bench, weights, share(*examples(2)), secrets, conf, steps=2, learning_rate=0.5)
    index = support(conf, bench, weights, 2).support.indices
    noise = SIGMA * CLIP / (RATE * NOMINAL)
    w0 = weights[index].astype(np.float64)
    v1 = noise + 0.01 * w0
    w1 = w0 - 0.5 * v1
    w2 = w1 - 0.5 * (0.9 * v1 + noise + 0.01 * w1)
    np.testing.assert_allclose(result, w2 - w0, rtol=1e-4, atol=1e-7)


def test_the_rounds_weights_are_left_as_they_were(bench, weights):
    before = weights.copy()
    moved(bench, weights, share(*examples(12)), OpenSecrets(noise_value=1.0), steps=2)
    assert before.tobytes() == weights.tobytes()


def test_a_coordinate_moves_in_its_own_steps_only(bench, weights):
    """Supports that change by step: with momentum on, what a step does not touch stands still in it."""
    conf = settings(**{"sparsity.freeze.refresh": "step", "client.momentum": 0.9, "client.weight-decay": 0.1})
    live = support(conf, bench, weights, 2)
    first, second = live.steps(0), live.steps(1)
    secrets = OpenSecrets(coins=NONE, noise_value=1.0)
    result = moved(bench, weights, share(*examples(2)), secrets, conf, steps=2)
    noise = SIGMA * CLIP / (RATE * NOMINAL)
    for here, other in ((first, second), (second, first)):
        alone = np.setdiff1d(here.indices, other.indices)
        place = np.searchsorted(live.support.indices, alone)
        expected = -(noise + 0.1 * weights[alone].astype(np.float64))
        np.testing.assert_allclose(result[place], expected, rtol=1e-4, atol=1e-7)


def test_d_over_k_rescales_the_noised_mean(bench, weights):
    conf = settings(**{"sparsity.rescale": "d-over-k"})
    secrets = OpenSecrets(coins=NONE, noise_value=1.0)
    plain = moved(bench, np.zeros_like(weights), share(*examples(2)), OpenSecrets(coins=NONE, noise_value=1.0))
    scaled = moved(bench, np.zeros_like(weights), share(*examples(2)), secrets, conf)
    np.testing.assert_allclose(scaled, plain * (1210 / 363), rtol=1e-5)


def test_clip_then_mask_wastes_the_clip_norm_and_stays_bounded(bench, weights):
    x, y = examples(12)
    late = settings(**{"sparsity.order": "clip-then-mask"})
    usual = np.linalg.norm(moved(bench, weights, share(x, y), OpenSecrets()))
    wasteful = np.linalg.norm(moved(bench, weights, share(x, y), OpenSecrets(), late))
    assert wasteful < usual
    assert wasteful * RATE * NOMINAL <= 12 * CLIP * (1 + 1e-5)
    assert math.isfinite(wasteful)
