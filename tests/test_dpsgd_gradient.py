"""The private gradient as its callers see it: masked, bounded, indifferent to batch size, NaN and empty batches."""

import copy
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpprune.dpsgd import compiled
from fed_dpprune.dpsgd.clipping import GROUP, MODES, MOST_EXAMPLES, Clipping, slack
from fed_dpprune.dpsgd.gradient import PrivateGradient
from fed_dpprune.errors import ConfigError
from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.sparsity.support import Support, dense, from_mask

BACKENDS = ["reference", "torch", "auto"]


def layout_of(module: nn.Module, frozen: tuple[str, ...] = ()) -> Layout:
    return Layout(tuple(Tensor(n, tuple(p.shape), frozen=n in frozen) for n, p in module.named_parameters()))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 1, 6, 6)).astype(np.float32), rng.integers(0, 3, n)


def some_support(layout: Layout, fraction: float = 0.3, seed: int = 1) -> Support:
    return from_mask(np.random.default_rng(seed).random(layout.d) < fraction)


def loop_gradients(module: nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Per-example gradients by ordinary backward on one example at a time, float64, shape (n, d)."""
    double = copy.deepcopy(module).double()
    rows = []
    for xi, yi in zip(x, y, strict=True):
        double.zero_grad()
        xi = torch.from_numpy(xi[None])
        logits = double(xi.double() if xi.is_floating_point() else xi)
        nn.functional.cross_entropy(logits, torch.tensor([yi])).backward()
        rows.append(torch.cat([p.grad.flatten() for p in double.parameters()]).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_live_gradient_passes_unscaled_when_only_frozen_coordinates_are_large(backend):
    net = small_net()
    x, y = batch(5)
    grads = loop_gradients(net, x, y)
    layout = layout_of(net)
    order = np.argsort(np.abs(grads).max(axis=0))
    support = Support(np.sort(order[: layout.d // 4]), layout.d)
    live = grads[:, support.indices]
    clip_norm = 1.01 * np.linalg.norm(live, axis=1).max()
    assert np.linalg.norm(grads, axis=1).min() > 2 * clip_norm  # clipping before masking would shrink every example
    engine = PrivateGradient(net, layout, backend=backend)
    engine.set_support(support)
    np.testing.assert_allclose(engine.clipped_sum(x, y, Clipping(clip_norm)), live.sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [1.0, 1e6, np.nan, np.inf])
def test_adding_one_example_moves_the_sum_by_at_most_the_clip_norm(backend, mode, poison):
    net = small_net()
    layout = layout_of(net)
    engine = PrivateGradient(net, layout, backend=backend)
    engine.set_support(some_support(layout))
    x, y = batch(6)
    x[-1] *= poison
    clipping = Clipping(0.05, mode)
    moved = engine.clipped_sum(x, y, clipping).astype(np.float64) - engine.clipped_sum(x[:-1], y[:-1], clipping)
    assert np.isfinite(moved).all()
    assert np.linalg.norm(moved) <= clipping.sensitivity(layout) * (1 + 1e-5)
    if not np.isfinite(poison):
        np.testing.assert_allclose(moved, 0, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_zeros_on_the_support(backend):
    net = small_net()
    engine = PrivateGradient(net, layout_of(net), backend=backend)
    support = some_support(engine.layout)
    engine.set_support(support)
    x, y = batch(0)
    total = engine.clipped_sum(x, y, Clipping(1.0))
    assert total.shape == (support.k,) and not total.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_the_sum_does_not_depend_on_the_micro_batch(backend, size):
    net = small_net()
    x, y = batch(17)
    whole = PrivateGradient(net, layout_of(net), backend=backend).clipped_sum(x, y, Clipping(0.1))
    parts = PrivateGradient(net, layout_of(net), backend=backend, micro_batch=size).clipped_sum(x, y, Clipping(0.1))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_reference_agrees_with_a_loop_over_examples_to_1e12_in_float64(mode):
    net = small_net()
    layout = layout_of(net)
    x, y = batch(9)
    support = some_support(layout)
    engine = PrivateGradient(net, layout, backend="reference", precision="float64")
    engine.set_support(support)
    live = loop_gradients(net, x, y)[:, support.indices]
    clip_norm = float(np.median(np.linalg.norm(live, axis=1)))
    if mode == "per-layer":
        bounds = np.searchsorted(support.indices, layout.offsets)
        parts = [live[:, a:b] for a, b in itertools.pairwise(bounds) if a < b]
        bound = clip_norm / np.sqrt(len(parts))
        clipped = [p * np.minimum(1, bound / np.linalg.norm(p, axis=1))[:, None] for p in parts]
        expected = np.concatenate([c.sum(0) for c in clipped])
    else:
        norm = np.linalg.norm(live, axis=1)
        factor = clip_norm / (norm + 0.01) if mode == "automatic" else np.minimum(1, clip_norm / norm)
        expected = factor @ live
    total = engine.clipped_sum(x, y, Clipping(clip_norm, mode))
    assert np.linalg.norm(total - expected) <= 1e-12 * np.linalg.norm(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_over_a_wider_support_shrinks_what_is_released(backend):
    net = small_net()
    layout = layout_of(net)
    x, y = batch(8)
    support = some_support(layout)
    grads = loop_gradients(net, x, y)
    factor = np.minimum(1, 0.1 / np.linalg.norm(grads, axis=1))
    engine = PrivateGradient(net, layout, backend=backend)
    engine.set_support(support, norm_over=dense(layout.d))
    np.testing.assert_allclose(engine.clipped_sum(x, y, Clipping(0.1)), factor @ grads[:, support.indices], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="not inside"):
        engine.set_support(dense(layout.d), norm_over=support)


def test_a_support_inside_a_frozen_tensor_is_refused():
    net = small_net()
    layout = layout_of(net, frozen=("0.weight",))
    engine = PrivateGradient(net, layout, backend="reference")
    assert engine.clipped_sum(*batch(3), Clipping(1.0)).shape == (layout.d - 36,)
    with pytest.raises(ValueError, match=r"0\.weight"):
        engine.set_support(dense(layout.d))


def test_layers_that_mix_examples_are_refused_by_name_with_the_fix():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ConfigError, match=r"layer 1: BatchNorm2d.*GroupNorm"):
        PrivateGradient(net, layout_of(net))


def test_clipping_refuses_bounds_that_bound_nothing():
    for bad in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="positive"):
            Clipping(bad)
    with pytest.raises(ValueError, match="mode"):
        Clipping(1.0, "median")


@pytest.mark.parametrize("mode", MODES)
def test_factors_are_rounded_toward_zero_over_the_whole_range(mode):
    """Norms log-uniform from the smallest to the largest that float32 gradients can have, checked in exact rationals."""
    rng = np.random.default_rng(0)
    norm = 10.0 ** rng.uniform(-45, 60, (1, 2000))
    for clip_norm in (1e-6, 0.3, 1e6):
        factors = Clipping(clip_norm, mode).factors(np.square(norm))
        rooted = np.sqrt(np.square(norm))
        for f, n in zip(factors[0, :300], rooted[0, :300], strict=True):
            assert Fraction(float(f)) * Fraction(float(n)) <= Fraction(clip_norm)
        assert (factors[norm > 1e3 * clip_norm] > 0).all()
        if mode == "flat":
            assert (factors[rooted <= clip_norm] == 1).all()


def test_the_slack_is_small_and_counts_every_addition():
    assert slack(10**7, 500) < 1e-4
    assert slack(10**7, 500) - slack(0, 0) == pytest.approx((10**7 + 1500) * 2.0**-53)
    layout = layout_of(small_net())
    assert Clipping(2.0).sensitivity(layout) == 2.0 * (1 + slack(layout.d, len(layout.tensors))) > 2.0
    assert slack(0, 0) >= 2 * MOST_EXAMPLES * (2 * GROUP + MOST_EXAMPLES // GROUP) * 2.0**-53


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_example_whose_loss_alone_is_not_finite_adds_nothing(backend):
    """An infinite loss with a finite gradient still says that the example is beyond what the model can take."""

    def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, y, reduction="none") + torch.where(y == 2, torch.inf, 0.0)

    net = small_net()
    x, y = batch(6)
    y[:] = [0, 1, 2, 0, 2, 1]
    engine = PrivateGradient(net, layout_of(net), backend=backend, loss=loss)
    rest = engine.clipped_sum(x[y != 2], y[y != 2], Clipping(0.1))
    np.testing.assert_allclose(engine.clipped_sum(x, y, Clipping(0.1)), rest, rtol=1e-4, atol=1e-7)


def _engine_with(change: str = "") -> tuple[PrivateGradient, nn.Module, Layout]:
    net = small_net()
    if change == "channels last":  # not one after the other in memory
        net[0] = net[0].to(memory_format=torch.channels_last)
        net[0].weight.data = torch.randn(4, 1, 3, 3).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if change == "float64":
        net.double()
    layout = layout_of(net, frozen=("3.weight",))
    return PrivateGradient(net, layout, precision="float64" if change == "float64" else "float32"), net, layout


def _flat(net: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().float().numpy().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("change", ["", "channels last", "float64"])
def test_live_values_write_the_live_weights_and_no_other(monkeypatch, change, kernel):
    """Whole tensors in their own memory, parts of tensors, tensors without a live weight; over changes of the support."""
    if not kernel:
        monkeypatch.setattr(compiled, "load", lambda: None)
    engine, net, layout = _engine_with(change)
    allowed = np.concatenate([np.full(t.size, not t.frozen) for t in layout.tensors])
    start = np.random.default_rng(0).normal(size=layout.d).astype(np.float32)
    engine.set_weights(start)
    expected, rng = start.copy(), np.random.default_rng(3)
    whole_bias = np.arange(layout.d) < layout.offsets[2]
    for seed in (1, 1, 2, 3):
        mask = (np.random.default_rng(seed).random(layout.d) < 0.3) & allowed
        support = from_mask(mask | whole_bias if seed == 2 else mask)
        engine.set_support(support)
        for _ in range(2):
            with engine.live_values() as parts:
                assert np.concatenate(parts).tobytes() == expected[support.indices].tobytes()
                for part in parts:
                    part += rng.normal(size=part.size).astype(np.float32)
                    assert part.dtype == np.float32 and part.flags.c_contiguous
                expected[support.indices] = np.concatenate(parts)
            assert _flat(net).tobytes() == expected.tobytes()
            assert engine.weights_on(support).tobytes() == expected[support.indices].tobytes()


def test_live_values_follow_weights_that_are_set_anew():
    engine, net, layout = _engine_with()
    allowed = np.concatenate([np.full(t.size, not t.frozen) for t in layout.tensors])
    support = from_mask((np.random.default_rng(1).random(layout.d) < 0.3) & allowed)
    engine.set_support(support)
    for value in (1.0, 2.0):
        engine.set_weights(np.full(layout.d, value, dtype=np.float32))
        with engine.live_values() as parts:
            assert all((part == value).all() for part in parts)
    assert (_flat(net) == 2.0).all()


def test_the_ablations_wider_norm_moves_the_support_alone():
    engine, net, layout = _engine_with()
    allowed = np.flatnonzero(np.concatenate([np.full(t.size, not t.frozen) for t in layout.tensors]))
    wide, support = Support(allowed, layout.d), Support(allowed[::3], layout.d)
    before = _flat(net)
    engine.set_support(support, norm_over=wide)
    with engine.live_values() as parts:
        assert sum(part.size for part in parts) == support.k
        for part in parts:
            part += 1
    assert np.flatnonzero(_flat(net) != before).tolist() == support.indices.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_live_values_go_to_a_gpu():
    net = small_net().cuda()
    layout = layout_of(net)
    engine, support = PrivateGradient(net, layout), some_support(layout)
    start = np.random.default_rng(0).normal(size=layout.d).astype(np.float32)
    engine.set_weights(start)
    engine.set_support(support)
    for _ in range(2):
        with engine.live_values() as parts:
            for part in parts:
                part += 1
    start[support.indices] += 1
    start[support.indices] += 1
    assert np.concatenate([p.detach().cpu().numpy().reshape(-1) for p in net.parameters()]).tobytes() == start.tobytes()
