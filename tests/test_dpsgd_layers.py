"""Every layer rule against a loop over single examples, on both backends: random shapes, random supports."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from dpsgd_oracle import flat_clipped, layout_of, loop_gradients, random_support, weighted_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fed_dpprune.dpsgd import compiled
from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.grad_sample.table import TABLE
from fed_dpprune.dpsgd.gradient import PrivateGradient
from fed_dpprune.errors import ConfigError

ROUTES = ["torch", pytest.param("compiled", marks=pytest.mark.skipif(compiled.load() is None, reason="no C++ compiler"))]
small = st.integers(1, 5)


@dataclass
class Case:
    layer: nn.Module
    shape: tuple[int, ...]
    words: int = 0  # inputs are word numbers below this
    extra: dict[str, Any] = field(default_factory=dict)


@st.composite
def linear(draw):
    inputs, outputs = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    middle = draw(st.sampled_from([(), (1,), (7,), (3, 4)]))
    return Case(nn.Linear(inputs, outputs, bias=draw(st.booleans())), (*middle, inputs))


@st.composite
def conv2d(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel, stride, dilation = (draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in range(3))
    padding = draw(st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.just("valid")))
    mode = "zeros"
    if stride == (1, 1):
        padding = draw(st.sampled_from([padding, "same"]))
    if draw(st.booleans()):
        mode, padding = "circular", (1, 1)
    low = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    size = [draw(st.integers(max(low[i], 2), low[i] + 14)) for i in range(2)]
    channels, outputs = groups * draw(small), groups * draw(st.integers(1, 6))
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode)
    return Case(layer, (channels, *size))


@st.composite
def group_norm(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    channels = groups * draw(small)
    space = draw(st.sampled_from([(), (9,), (5, 5), (8, 8), (2, 3, 4)])) if channels > groups else (5, 5)
    return Case(nn.GroupNorm(groups, channels), (channels, *space))


@st.composite
def layer_norm(draw):
    shape = draw(st.sampled_from([(6,), (3, 4)]))
    return Case(nn.LayerNorm(shape), (*draw(st.sampled_from([(), (5,), (2, 3)])), *shape))


@st.composite
def embedding(draw):
    words = draw(st.integers(2, 9))
    padding = draw(st.sampled_from([None, 0, words - 1]))
    return Case(nn.Embedding(words, draw(small), padding_idx=padding), draw(st.sampled_from([(6,), (2, 4)])), words)


@st.composite
def without_a_rule(draw):
    """Layers that go through the fallback."""
    return draw(
        st.sampled_from(
            [
                Case(nn.Conv1d(3, 4, 3, stride=2), (3, 11)),
                Case(nn.Conv3d(2, 3, 2), (2, 4, 5, 3)),
                Case(nn.ConvTranspose2d(2, 3, 3, stride=2), (2, 4, 4)),
                Case(nn.InstanceNorm2d(3, affine=True), (3, 4, 5)),
                Case(nn.RMSNorm(6), (4, 6)),
                Case(nn.PReLU(3), (3, 7)),
            ]
        )
    )


CASES = {nn.Linear: linear, nn.Conv2d: conv2d, nn.GroupNorm: group_norm, nn.LayerNorm: layer_norm, nn.Embedding: embedding}


def test_every_rule_of_the_table_has_a_case():
    assert set(CASES) == set(TABLE)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", [*CASES.values(), without_a_rule], ids=lambda kind: kind.__name__)
def test_rule_agrees_with_a_loop_over_examples_to_1e5(kind, route):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        case=kind(),
        n=st.sampled_from([1, 2, 5, 16, 19, 33]),
        fraction=st.sampled_from([0.02, 0.1, 0.3, 0.5, 0.9, 1.0]),
        structure=st.sampled_from(["element", "row"]),
        seed=st.integers(0, 2**20),
        last=st.booleans(),
    )
    def check(case, n, fraction, structure, seed, last):
        generator = torch.Generator().manual_seed(seed)
        for parameter in case.layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        x = torch.randn(n, *case.shape, generator=generator)
        if case.words:
            x = torch.randint(0, case.words, (n, *case.shape), generator=generator)
        elif x.ndim == 4 and last:
            x = x.contiguous(memory_format=torch.channels_last)
        y = torch.randn(case.layer(x).shape, generator=generator)
        layout = layout_of(case.layer)
        support = random_support(layout, fraction, seed, structure)
        engine = PrivateGradient(case.layer, layout, backend=route, loss=weighted_outputs)
        engine.set_support(support)
        gradients = loop_gradients(case.layer, x.numpy(), y.numpy(), weighted_outputs)
        clip_norm = float(np.median(np.linalg.norm(gradients[:, support.indices], axis=1))) or 1.0
        for bound in (clip_norm, 1e6):  # clipped by the norm; and the plain sum
            expected = flat_clipped(gradients, support, bound)
            got = engine.clipped_sum(x, y, Clipping(bound))
            assert engine.route == route, "the rule was not used"
            scale = np.abs(gradients[:, support.indices]).sum(0)  # cancellation over examples is not the rule's doing
            assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(scale) * min(1, bound / clip_norm) + 1e-30

    check()


class Twice(nn.Module):
    """One layer called twice, and one weight tied to a layer of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        h = torch.tanh(self.mix(torch.tanh(self.mix(self.words(x)))))
        return self.out(h.mean(1))


class ConvTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(torch.relu(self.conv(torch.relu(self.conv(x)))).mean((2, 3)))


class TiedConvs(nn.Module):
    """One weight in two layers, with a bias in the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, bias=False), nn.Linear(3, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.tanh(self.a(x)))).mean((2, 3)))


class RawParameter(nn.Module):
    """A parameter of its own beside a layer, and a layer's weight used outside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.randn(5)), nn.Linear(5, 5)

    def forward(self, x):
        return nn.functional.linear(self.layer(x) * self.scale, self.layer.weight)


class TimeFirst(nn.Module):
    """The layer sees (time, examples, features)."""

    def __init__(self, time: int) -> None:
        super().__init__()
        self.layer, self.time = nn.Linear(4, 3), time

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).tanh().sum(0)


class Meddler(nn.Module):
    """Examples see each other in the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        return self.b(h - h.mean(0, keepdim=True))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = nn.functional.relu_(self.norm(nn.functional.relu_(self.a(x))))
        return self.b(h.mean((2, 3)))


ODD = {
    "twice": (Twice, (5,), 7, True),
    "conv-twice": (ConvTwice, (3, 6, 6), 0, True),
    "tied-convs": (TiedConvs, (3, 6, 6), 0, True),
    "in-place": (InPlace, (2, 6, 6), 0, True),
    "raw": (RawParameter, (5,), 0, False),
    "time-first": (lambda: TimeFirst(6), (6, 4), 0, False),
    "time-first-as-long-as-the-batch": (lambda: TimeFirst(9), (9, 4), 0, False),
}


@pytest.mark.parametrize("route", [*ROUTES, "reference"])
def test_code_that_lets_examples_see_each_other_is_refused_and_the_place_is_named(route):
    module = Meddler()
    engine = PrivateGradient(module, layout_of(module), backend=route)
    with pytest.raises(ConfigError, match=r"mixes the examples.*layer b \(Linear\)"):
        engine.clipped_sum(torch.randn(5, 4), torch.randint(0, 3, (5,)), Clipping(0.1))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ODD)
def test_unusual_models_are_exact_by_rule_or_by_the_whole_model_route(name, route):
    make, shape, words, by_rule = ODD[name]
    torch.manual_seed(3)
    module = make()
    x = torch.randint(0, words, (9, *shape)) if words else torch.randn(9, *shape)
    y = torch.randint(0, 3, (9,))
    layout = layout_of(module)
    support = random_support(layout, 0.5, 0)
    engine = PrivateGradient(module, layout, backend=route)
    engine.set_support(support)
    gradients = loop_gradients(module, x.numpy(), y.numpy())
    clip_norm = float(np.median(np.linalg.norm(gradients[:, support.indices], axis=1)))
    got = engine.clipped_sum(x, y, Clipping(clip_norm))
    expected = flat_clipped(gradients, support, clip_norm)
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    assert engine.route == (route if by_rule else "whole-model")


@pytest.mark.parametrize("name", ["DPLSTM", "DPGRU", "DPMultiheadAttention"])
def test_what_opacus_trains_this_trains(name):
    from opacus import layers

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = getattr(layers, name)
            self.attends = name == "DPMultiheadAttention"
            self.core = kind(8, 2, batch_first=True) if self.attends else kind(8, 8, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            out = self.core(x, x, x)[0] if self.attends else self.core(x)[0]
            return self.head(out.mean(1))

    torch.manual_seed(0)
    module = Net()
    x, y = torch.randn(4, 5, 8), torch.randint(0, 3, (4,))
    layout = layout_of(module)
    engine = PrivateGradient(module, layout)
    gradients = loop_gradients(module, x.numpy(), y.numpy())
    support = random_support(layout, 0.5, 0)
    engine.set_support(support)
    expected = flat_clipped(gradients, support, 0.1)
    assert np.linalg.norm(engine.clipped_sum(x, y, Clipping(0.1)) - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("route", [*ROUTES, "reference"])
def test_a_net_that_draws_random_numbers_is_refused(route):
    """The draws go by place in the batch: one example more would give all that follow it other masks."""
    module = nn.Sequential(nn.Linear(20, 30), nn.Dropout(0.5), nn.Tanh(), nn.Linear(30, 3)).train()
    batch = torch.randn(4, 20), torch.zeros(4, dtype=torch.long)
    engine = PrivateGradient(module, layout_of(module), backend=route)
    with pytest.raises(ConfigError, match="random numbers"):
        engine.clipped_sum(*batch, Clipping(1e-3))
    module.eval()
    assert np.linalg.norm(PrivateGradient(module, layout_of(module), backend=route).clipped_sum(*batch, Clipping(1e-3))) > 0


class Overwriter(nn.Module):
    """Changes a layer's input after the layer has seen it, in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        out = self.b(h)
        if self.training:
            with torch.no_grad():
                h.mul_(3.0)
        return out


@pytest.mark.parametrize("route", ROUTES)
def test_an_input_changed_in_place_after_its_use_is_refused(route):
    module = Overwriter().train()
    engine = PrivateGradient(module, layout_of(module, frozen=("a.weight", "a.bias")), backend=route)
    with pytest.raises(ConfigError, match="modified by an inplace operation"):
        engine.clipped_sum(torch.randn(5, 4), torch.randint(0, 3, (5,)), Clipping(0.1))
