"""Each example for itself: its bits depend on no batch, place, neighbour, thread or mode of the program around it."""

import ctypes
import subprocess
import sys

import numpy as np
import pytest
import torch
from dpsgd_oracle import layout_of, random_support
from torch import nn

from fed_dpprune.dpsgd import selfcheck
from fed_dpprune.dpsgd.arithmetic import pinned
from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.grad_sample.contribution import Values
from fed_dpprune.dpsgd.gradient import ROWS, ROWS_OF_SMALL, PrivateGradient, filled_up
from fed_dpprune.errors import ConfigError

ROUTES = ["reference", "torch", "auto"]
CPU = torch.device("cpu")


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 3, 3, padding=1),
        nn.GroupNorm(1, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(75, 9),
        nn.ReLU(),
        nn.Linear(9, 3),
    ]
    return nn.Sequential(*layers)


def batch(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 1, 5, 5)).astype(np.float32), rng.integers(0, 3, n)


def seen(engine: PrivateGradient, x: np.ndarray, y: np.ndarray) -> list[list[bytes]]:
    """For each example the bits that its norm and its part of the sum are made from, as the engine's route gives them."""
    rows = engine.prove(torch.tensor(x), torch.tensor(y))
    found = []
    with engine._pinned():
        for start in range(0, len(x), rows):
            part_x, part_y = torch.tensor(x[start : start + rows]), torch.tensor(y[start : start + rows])
            parts, present = engine._micro_batch(part_x, part_y, rows)
            for i in np.flatnonzero(present):
                found.append([t[i].numpy().tobytes() for part in parts for t in (part.squared, *part.bits())])
    return found


@pytest.mark.parametrize("route", ROUTES)
def test_an_examples_bits_are_the_same_alone_and_anywhere_among_others(route):
    engine = PrivateGradient(net(), layout_of(net()), backend=route)
    engine.set_support(random_support(engine.layout, 0.3, 0))
    x, y = batch(70)
    alone = [seen(engine, x[i : i + 1], y[i : i + 1])[0] for i in range(12)]
    for n in (12, 31, 32, 33, 63, 64, 65, 70):
        assert seen(engine, x[:n], y[:n])[:12] == alone
    order = np.random.default_rng(1).permutation(70)
    moved = seen(engine, x[order], y[order])
    assert [moved[int(np.flatnonzero(order == i)[0])] for i in range(12)] == alone


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("wild", [np.nan, np.inf, 3.4e38, 1e-42])
def test_an_examples_bits_do_not_depend_on_what_its_neighbours_hold(route, wild):
    engine = PrivateGradient(net(), layout_of(net()), backend=route)
    x, y = batch(9)
    kept = x[::2], y[::2]
    x[1::2] = wild
    found = seen(engine, x, y)
    if len(found) == 9:  # the neighbours count as well
        found = found[::2]
    assert found == seen(engine, *kept)


@pytest.mark.parametrize("route", ROUTES)
def test_the_sum_has_the_same_bits_at_any_number_of_threads_and_under_any_mode_of_the_program(route):
    engine = PrivateGradient(net(), layout_of(net()), backend=route)
    x, y = batch(70)
    threads = torch.get_num_threads()
    once = engine.clipped_sum(x, y, Clipping(0.1)).tobytes()
    rounding = ctypes.CDLL(None)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert engine.clipped_sum(x, y, Clipping(0.1)).tobytes() == once
            assert torch.get_num_threads() == count
        torch.set_flush_denormal(True)
        torch.set_float32_matmul_precision("medium")
        assert engine.clipped_sum(x, y, Clipping(0.1)).tobytes() == once
        assert torch.get_float32_matmul_precision() == "medium"
        rounding.fesetround(0x400)  # downwards on x86; another platform refuses it and stays as it is
        assert engine.clipped_sum(x, y, Clipping(0.1)).tobytes() == once
    finally:
        rounding.fesetround(0)
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(threads)


def test_denormals_are_kept_inside_and_the_mode_of_products_is_put_back():
    tiny = torch.tensor([1e-42])
    torch.set_flush_denormal(True)
    try:
        with pinned(CPU):
            assert (tiny * 1).item() > 0 and torch.get_num_threads() == 1
    finally:
        torch.set_flush_denormal(False)


def test_micro_batches_have_one_shape_that_no_argument_sets(monkeypatch):
    shapes = []
    for micro_batch in (0, 1, 7, 1000):
        engine = PrivateGradient(net(), layout_of(net()), backend="auto", micro_batch=micro_batch)
        engine.clipped_sum(*batch(3), Clipping(0.1))
        whole = engine._layers.micro_batch
        monkeypatch.setattr(
            engine._layers, "micro_batch", lambda live, x, y, w=whole: shapes.append(tuple(x.shape)) or w(live, x, y)
        )
        for n in (1, 5, 64, 65, 130):
            engine.clipped_sum(*batch(n), Clipping(0.1))
    assert set(shapes) == {(ROWS_OF_SMALL, 1, 5, 5)}


def test_a_net_that_puts_out_much_takes_fewer_rows():
    wide = nn.Sequential(nn.Conv2d(1, 66, 1), nn.Flatten(), nn.Linear(66 * 32 * 32, 3))
    engine = PrivateGradient(wide, layout_of(wide))
    assert engine.prove(torch.zeros(1, 1, 32, 32), torch.zeros(1, dtype=torch.long)) == ROWS


@pytest.mark.parametrize("features", [3, 5, 9, 13, 27, 75, 30])
def test_uneven_rows_of_a_linear_layer_do_not_cost_the_micro_batch(features):
    """Rows that begin at odd addresses are rounded by where they begin; laid out apart they are not."""
    module = nn.Sequential(nn.Linear(features, 9), nn.Tanh(), nn.Linear(9, 2))
    engine = PrivateGradient(module, layout_of(module))
    assert engine.prove(torch.zeros(1, features), torch.zeros(1, dtype=torch.long)) == ROWS_OF_SMALL


class ByPlace(nn.Module):
    """Rounds an example by where it stands, as a library with left-over rows would."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        h = self.layer(x)
        return h + 1e-6 * (torch.arange(len(x)).unsqueeze(1) > 3)


class ByNeighbour(nn.Module):
    """Takes another routine when a value beside is large, as some vector libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        h = self.layer(x)
        return h * (1 + 1e-6 * (h.abs().amax() > 1e2))


class OtherEachTime(nn.Module):
    """Bits of its own each time it is run; no generator is drawn from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.runs = nn.Linear(4, 3), 0

    def forward(self, x):
        self.runs += 1
        return self.layer(x) * (1 + 1e-6 * (self.runs % 7))


@pytest.mark.parametrize("route", ["torch", "compiled"])
@pytest.mark.parametrize("kind", [ByPlace, ByNeighbour])
def test_a_net_whose_bits_depend_on_the_batch_takes_examples_one_at_a_time(route, kind):
    module = kind()
    engine = PrivateGradient(module, layout_of(module), backend=route)
    x, y = torch.randn(9, 4), torch.randint(0, 3, (9,))
    assert engine.prove(x, y) == 1
    total = engine.clipped_sum(x, y, Clipping(0.1))
    ones = sum(engine.clipped_sum(x[i : i + 1], y[i : i + 1], Clipping(0.1)) for i in range(9))
    np.testing.assert_allclose(total, ones, rtol=0, atol=1e-15)


@pytest.mark.parametrize("route", ROUTES)
def test_a_net_that_gives_other_bits_each_time_is_refused(route):
    module = OtherEachTime()
    engine = PrivateGradient(module, layout_of(module), backend=route)
    with pytest.raises(ConfigError, match="other bits for the same example"):
        engine.clipped_sum(torch.randn(5, 4), torch.randint(0, 3, (5,)), Clipping(0.1))


class KeepsTraces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("largest", torch.zeros(4))

    def forward(self, x):
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().amax(0)))
        return self.layer(x)


def renormed() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4, max_norm=0.1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize(("make", "x"), [(KeepsTraces, torch.zeros(1, 4)), (renormed, torch.zeros(1, 2, dtype=torch.long))])
def test_a_net_that_keeps_traces_of_the_batch_is_refused(make, x):
    module = make()
    engine = PrivateGradient(module, layout_of(module))
    before = [p.detach().clone() for p in (*module.parameters(), *module.buffers())]
    with pytest.raises(ConfigError, match="changes in the forward pass"):
        engine.prove(x, torch.zeros(1, dtype=torch.long))
    assert all(torch.equal(a, b) for a, b in zip(before, (*module.parameters(), *module.buffers()), strict=True))


def test_a_layer_that_mixes_in_training_mode_only_is_proven_in_the_mode_it_runs_in():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True) if self.training else x

    for training in (True, False):
        module = nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 3)).train(training)
        engine, given = PrivateGradient(module, layout_of(module)), (torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))
        if training:
            with pytest.raises(ConfigError, match=r"mixes the examples.*layer 1 \(Centred\)"):
                engine.prove(*given)
        else:
            assert engine.prove(*given) > 1


def test_a_loss_that_mixes_examples_is_refused():
    def weighted(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        losses = nn.functional.cross_entropy(logits, y, reduction="none")
        return losses / losses.detach().mean()

    engine = PrivateGradient(net(), layout_of(net()), loss=weighted)
    with pytest.raises(ConfigError, match="loss: mixes"):
        engine.clipped_sum(*batch(4), Clipping(0.1))


@pytest.mark.parametrize("route", ROUTES)
def test_an_example_that_the_loss_does_not_take_is_absent_and_moves_no_other_bit(route):
    engine = PrivateGradient(net(), layout_of(net()), backend=route)
    x, y = batch(9)
    before = seen(engine, x, y)
    y[4] = 99
    assert seen(engine, x, y) == before[:4] + before[5:]
    y[:] = 99
    assert not engine.clipped_sum(x, y, Clipping(0.1)).any()


def test_squares_come_from_the_stored_numbers_over_all_of_float32():
    rng = np.random.default_rng(0)
    values = (10.0 ** rng.uniform(-45, 38, (4, 50)) * rng.choice([-1, 1], (4, 50))).astype(np.float32)
    exact = (values.astype(np.longdouble) ** 2).sum(1)
    assert np.abs(Values(torch.tensor(values)).squared.numpy() / exact - 1).max() < 60 * 2.0**-53


def test_rows_are_filled_up_with_zeros_in_aligned_memory():
    source = torch.arange(13.0)[1:].reshape(4, 3)
    made = filled_up(source, 32)
    assert made.shape == (32, 3) and made.data_ptr() % 64 == 0
    assert torch.equal(made[:4], source) and not made[4:].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_another_default_type_corrupts_nothing(dtype):
    code = f"""
import torch, sys
sys.path.insert(0, "tests")
from test_dpsgd_alone import PrivateGradient, Clipping, batch, net, layout_of, random_support
first = None
module = net()
for kind in (torch.float32, torch.{dtype}):
    torch.set_default_dtype(kind)
    engine = PrivateGradient(module, layout_of(module))
    engine.set_support(random_support(engine.layout, 0.3, 0))
    total = engine.clipped_sum(*batch(40), Clipping(0.1)).tobytes()
    first = first or total
    assert total == first, kind
print("equal", engine.route)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("equal") and "whole" not in done.stdout, done.stderr[-2000:]


def test_made_up_examples_take_nothing_but_shape_and_type():
    secret = torch.full((3, 4), 7.0)
    assert torch.equal(selfcheck.made_up(secret, 5, 1), selfcheck.made_up(torch.zeros(1, 4), 5, 1))
    assert not selfcheck.made_up_labels(torch.tensor([5, 5]), 4).any()
