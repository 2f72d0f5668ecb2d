"""The compiled kernel: built once, shared safely, absent without harm; and what the layer engine never computes."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from dpsgd_oracle import flat_clipped, layout_of, loop_gradients, random_support
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fed_dpprune.dpsgd import compiled
from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.grad_sample.contribution import address
from fed_dpprune.dpsgd.grad_sample.linear import Compressed, Masked, Sampled
from fed_dpprune.dpsgd.gradient import PrivateGradient
from fed_dpprune.dpsgd.live import LiveTensor
from fed_dpprune.errors import ConfigError
from fed_dpprune.sparsity.support import Support

needs_kernel = pytest.mark.skipif(compiled.load() is None, reason="no C++ compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache and nothing remembered in this process; what the tests before had is back afterwards."""
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "_outcome", compiled._outcome.__wrapped__)
    monkeypatch.setattr(compiled, "load", compiled.load.__wrapped__)
    return tmp_path


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.Flatten(), nn.Linear(54, 5)
    )


def conv_batch(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 3, 8, 8)).astype(np.float32), rng.integers(0, 5, n)


@needs_kernel
def test_the_kernel_is_built_once_and_a_damaged_file_is_built_anew(fresh):
    built = compiled.load()
    files = list((fresh / "kernels").iterdir())
    assert set(files) == {built.path, built.path.with_suffix(".sha256")}, "temporary files stayed behind"
    made = built.path.stat().st_mtime_ns
    assert compiled.load().path.stat().st_mtime_ns == made
    built.path.unlink()
    built.path.write_bytes(b"not a library")
    assert compiled.load() is not None and compiled.kernel_status()["available"]


def test_without_a_compiler_the_torch_rules_run_and_the_status_says_why(fresh, monkeypatch, recwarn):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    status = compiled.kernel_status()
    assert not status["available"] and "compiler" in status["reason"]
    net = conv_net()
    engine = PrivateGradient(net, layout_of(net))
    engine.clipped_sum(*conv_batch(3), Clipping(1.0))
    assert engine.route == "torch" and not recwarn.list
    with pytest.raises(ConfigError, match=r"engine\.backend.*compiler"):
        PrivateGradient(net, layout_of(net), backend="compiled")


def test_a_compiler_that_fails_is_asked_once(fresh, monkeypatch, tmp_path):
    calls = tmp_path / "calls"
    broken = tmp_path / "broken-c++"
    broken.write_text(f"#!/bin/sh\necho x >> {calls}\necho 'no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert compiled.kernel_status()["reason"] == "no such flag"
    asked = calls.read_text()
    assert "earlier build failed" in compiled.kernel_status()["reason"] and calls.read_text() == asked


def test_the_status_needs_no_torch():
    code = "import sys; from fed_dpprune.dpsgd import compiled; compiled.kernel_status(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_kernel
def test_the_result_is_bit_identical_for_any_number_of_kernel_threads_and_in_another_process(tmp_path):
    code = f"""
import sys, numpy as np
sys.path[:0] = {sys.path!r}
import torch; torch.set_num_threads(1)
from fed_dpprune.dpsgd import layered
from test_dpsgd_kernel import *
layered.torch.get_num_threads = lambda: int(sys.argv[1])  # the kernel's threads alone; the libraries' own may round differently
net = conv_net(); layout = layout_of(net)
engine = PrivateGradient(net, layout, backend="compiled"); engine.set_support(random_support(layout, 0.3, 0))
np.save(sys.argv[2], engine.clipped_sum(*conv_batch(70), Clipping(0.1)))
"""
    found = []
    for threads in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, threads, str(tmp_path / "sum.npy")], check=True)
        found.append((tmp_path / "sum.npy").read_bytes())
    assert found[0] == found[1]


@needs_kernel
@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-mavx2", "-mfma")], ids=["portable", "avx2"])
def test_the_kernel_is_right_on_cpus_with_shorter_vectors(fresh, monkeypatch, flags):
    if flags and "x86_64" not in compiled.platform.machine():
        pytest.skip("x86 flags")
    monkeypatch.setattr(compiled, "FLAG_SETS", (flags,))
    assert compiled.load().lanes == 8
    net = conv_net()
    layout, (x, y) = layout_of(net), conv_batch(19)
    for fraction in (0.1, 1.0):
        engine, support = PrivateGradient(net, layout, backend="compiled"), random_support(layout, fraction, 1)
        engine.set_support(support)
        expected = flat_clipped(loop_gradients(net, x, y), support, 0.5)
        assert np.linalg.norm(engine.clipped_sum(x, y, Clipping(0.5)) - expected) <= 1e-5 * np.linalg.norm(expected)
        assert engine.route == "compiled"


needs_mkl = pytest.mark.skipif(not torch._C.has_mkl, reason="torch without compressed rows")


@pytest.mark.parametrize(
    "rule", ["masked", pytest.param("compressed", marks=needs_mkl), pytest.param("sampled", marks=needs_kernel)]
)
def test_norms_survive_products_of_huge_inputs_and_tiny_gradients(rule):
    """Squares of what is below 1e-23 vanish in float32; the norm must not, or the example passes unclipped."""
    a, g = torch.full((3, 50), 1e18), torch.full((3, 40), 1e-24)
    a[0], g[0] = 1.0, 1.0
    positions = np.flatnonzero(np.random.default_rng(0).random(2000) < 0.5)
    live = LiveTensor("w", (40, 50), positions, 0)
    part = (
        Sampled(a, g, live, compiled.load())
        if rule == "sampled"
        else {"masked": Masked, "compressed": Compressed}[rule](a, g, live)
    )
    expected = positions.size * np.array([1.0, 1e-12, 1e-12])
    np.testing.assert_allclose(part.squared.numpy(), expected, rtol=1e-5)
    out = torch.empty(positions.size, dtype=torch.float64)
    part.weighted_sum(torch.tensor([0.0, 1.0, 0.5, *[0.0] * 13], dtype=torch.float64), out)
    np.testing.assert_allclose(out.numpy(), 1.5e-6, rtol=1e-5)


def test_the_kernel_takes_no_memory_of_another_type():
    right = torch.zeros(4, 16, dtype=torch.float64)
    assert address(right, torch.float64) == right.data_ptr()
    for wrong in (right.float(), right.T, torch.zeros(4, dtype=torch.bfloat16)):
        with pytest.raises(TypeError, match="kernel needs"):
            address(wrong, torch.float64)


class Watch(TorchDispatchMode):
    """Notes every operation that makes a weight gradient of a whole batch, and every gradient of the first layer's input."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.weight_gradients, self.convolutions = batch, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "convolution_backward" in str(function):
            self.convolutions += 1
            self.weight_gradients += bool(args[-1][1]) and args[1].shape[0] == self.batch
        return function(*args, **(kwargs or {}))


@pytest.mark.slow  # the dispatch mode alone takes seconds to load
@needs_kernel
def test_no_weight_gradient_of_the_batch_and_no_gradient_of_its_input_is_computed():
    net = conv_net()
    engine = PrivateGradient(net, layout_of(net))
    x, y = conv_batch(10)
    engine.clipped_sum(x, y, Clipping(1.0))
    with Watch(10) as watch:
        engine.clipped_sum(x, y, Clipping(1.0))
    assert (watch.weight_gradients, watch.convolutions) == (0, 1)  # one: the input gradient of the second convolution


@pytest.mark.slow  # the dispatch mode alone takes seconds to load
@needs_kernel
def test_layers_before_the_first_live_one_keep_no_graph():
    net = conv_net()
    layout = layout_of(net, frozen=("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"))
    engine = PrivateGradient(net, layout)
    x, y = conv_batch(10)
    engine.clipped_sum(x, y, Clipping(1.0))
    with Watch(10) as watch:
        engine.clipped_sum(x, y, Clipping(1.0))
    assert watch.convolutions == 0


@pytest.mark.slow  # the dispatch mode alone takes seconds to load
def test_frozen_rows_are_left_out_of_the_dense_products():
    layer = nn.Linear(30, 20)
    layout = layout_of(layer)
    indices = np.concatenate([np.arange(90, 120), np.arange(300, 330)]).astype(np.int64)
    engine = PrivateGradient(layer, layout, backend="torch")
    engine.set_support(Support(indices, layout.d))
    x, y = torch.randn(8, 30), torch.randint(0, 20, (8,))
    engine.clipped_sum(x, y, Clipping(1.0))
    shapes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function) == "aten.mm.out":
                shapes.append((tuple(args[0].shape), tuple(args[1].shape)))
            return function(*args, **(kwargs or {}))

    with Products():
        engine.clipped_sum(x, y, Clipping(1.0))
    assert shapes == [((2, 8), (8, 30))]


def test_the_module_is_left_as_it_was():
    net = conv_net().train()
    net[0].weight.requires_grad_(False)
    layout = layout_of(net, frozen=("0.weight",))
    before = [p.detach().clone() for p in net.parameters()]
    state = torch.get_rng_state()
    PrivateGradient(net, layout).clipped_sum(*conv_batch(4), Clipping(1.0))
    assert net.training and [p.requires_grad for p in net.parameters()] == [False] + [True] * 6 + [True]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_huge_and_ordinary_examples_together_stay_finite_and_bounded():
    layer = nn.Linear(4, 3, bias=False)
    layout = layout_of(layer)
    x = torch.tensor([[1e30, 0, 0, 0], [1.0, 1.0, 1.0, 1.0]])
    for backend in ("torch", "auto"):
        engine = PrivateGradient(layer, layout, backend=backend)
        total = engine.clipped_sum(x, torch.tensor([0, 1]), Clipping(1.0))
        assert np.isfinite(total).all() and np.linalg.norm(total) <= 2 * (1 + 1e-5)


def test_an_absent_example_leaves_the_kernels_sum_as_it_was():
    layer = nn.Linear(40, 30)
    layout, x, y = layout_of(layer), torch.randn(20, 40), torch.zeros(20, dtype=torch.long)
    engine = PrivateGradient(layer, layout, backend="compiled")
    engine.set_support(random_support(layout, 0.2, 0))
    without = engine.clipped_sum(x[:19], y[:19], Clipping(0.1))
    for poison in (np.nan, np.inf):
        x[19] = poison
        assert engine.clipped_sum(x, y, Clipping(0.1)).tobytes() == without.tobytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_agrees_with_the_loop(precision):
    net = conv_net()
    layout, (x, y) = layout_of(net), conv_batch(33)
    support = random_support(layout, 0.3, 0)
    expected = flat_clipped(loop_gradients(net, x, y), support, 0.5)
    engine = PrivateGradient(net.cuda(), layout, precision=precision)
    engine.set_support(support)
    allowed = 1e-5 if precision == "float32" else 3e-2
    assert np.linalg.norm(engine.clipped_sum(x, y, Clipping(0.5)) - expected) <= allowed * np.linalg.norm(expected)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_bfloat16_autocast_stays_bounded_and_close(backend):
    net = conv_net()
    layout, (x, y) = layout_of(net), conv_batch(20)
    support = random_support(layout, 0.3, 0)
    engine = PrivateGradient(net, layout, backend=backend, precision="bfloat16")
    engine.set_support(support)
    expected = flat_clipped(loop_gradients(net, x, y), support, 0.5)
    total = engine.clipped_sum(x, y, Clipping(0.5))
    assert engine.route != "whole-model"
    assert 0 < np.linalg.norm(total - expected) <= 3e-2 * np.linalg.norm(expected)
    one = engine.clipped_sum(x[:1], y[:1], Clipping(1e-3))
    assert np.linalg.norm(one) <= 1e-3 * (1 + 1e-5)


def test_a_compiler_is_part_of_what_the_suite_expects_here_or_is_said_to_be_missing():
    assert bool(shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")) == compiled.kernel_status()["available"]


@needs_kernel
def test_the_kernel_adds_up_the_bands_of_a_large_image():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 65 * 40, 2))
    layout = layout_of(net, frozen=("3.weight", "3.bias"))
    x, y = torch.randn(3, 8, 65, 40), torch.tensor([0, 1, 1])
    gradients = loop_gradients(net, x.numpy(), y.numpy())
    conv = layout.offsets[2]
    for fraction in (0.2, 1.0):
        mask = np.random.default_rng(0).random(conv) < fraction
        support = Support(np.flatnonzero(mask).astype(np.int64), layout.d)
        engine = PrivateGradient(net, layout, backend="compiled")
        engine.set_support(support)
        clip_norm = float(np.median(np.linalg.norm(gradients[:, support.indices], axis=1)))
        expected = flat_clipped(gradients, support, clip_norm)
        assert np.linalg.norm(engine.clipped_sum(x, y, Clipping(clip_norm)) - expected) <= 1e-5 * np.linalg.norm(expected)
        assert engine.route == "compiled"
