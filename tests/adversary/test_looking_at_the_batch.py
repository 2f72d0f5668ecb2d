"""Nets that look at the whole batch: one example more sent all others another way, by 6 to 190 C, before they went one by one.

Made-up examples cannot show what values will do, so what such a net runs is compared with a table of operations that go row by
row, and code of a user's own must run on tensors that have no values.
"""

import numpy as np
import pytest
import torch
from clipped_sum_search import layout_of
from torch import nn

from fed_dpprune.dpsgd.arithmetic import pinned
from fed_dpprune.dpsgd.clipping import GROUP, MOST_EXAMPLES, UNIT, Clipping, slack
from fed_dpprune.dpsgd.grad_sample.contribution import even_part
from fed_dpprune.dpsgd.gradient import PrivateGradient
from fed_dpprune.dpsgd.operations import ROW_BY_ROW, Recorder, shapes_follow_from_shapes
from fed_dpprune.dpsgd.sums import in_levels
from fed_dpprune.errors import ConfigError
from fed_dpprune.sparsity.support import Support

ROUTES = ["auto", "torch", "reference"]
LABEL = torch.zeros(1, dtype=torch.long)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.between(torch.tanh(self.inner(x)), x))

    def between(self, h, x):
        return h


class Product(Net):  # its gradient asks whether any element of the batch is zero
    def between(self, h, x):
        return h * torch.prod(h, 1, keepdim=True)


class Experts(Net):  # a product over as many rows as the batch has of one kind
    def between(self, h, x):
        chosen, out = x[:, 0] > 0, h.clone()
        out[chosen] = h[chosen] * 2
        return out


class Filled(Net):
    def between(self, h, x):
        return torch.masked_select(h, torch.ones_like(h, dtype=torch.bool)).view_as(h)


class Branch(Net):
    def between(self, h, x):
        return h.clamp(-0.5, 0.5) if (x.sum(1) < -1e9).any() else h


class Trimmed(Net):  # a sum whose order follows from the longest row
    def between(self, h, x):
        return h + x[:, : int((x > -1e9).any(0).nonzero().max()) + 1].sum(1, keepdim=True)


class InNumpy(Net):
    def between(self, h, x):
        return h * 2 if (x.detach().numpy() < -1e9).any() else h


class InLists(Net):
    def between(self, h, x):
        return h * 2 if min(map(min, x.detach().tolist())) < -1e9 else h


@pytest.mark.parametrize("kind", [Product, Experts, Filled, Branch, Trimmed, InNumpy, InLists])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("frozen", [(), ("inner.weight", "inner.bias")])
def test_a_net_that_may_look_at_the_batch_takes_examples_one_by_one(kind, route, frozen):
    module = kind()
    engine = PrivateGradient(module, layout_of(module, frozen), backend=route)
    if kind is InNumpy and route == "reference":  # torch.func has no numbers to hand out
        with pytest.raises(ConfigError, match="fails on a made-up batch"):
            engine.prove(torch.zeros(1, 4), LABEL)
        return
    assert engine.prove(torch.zeros(1, 4), LABEL) == 1


@pytest.mark.parametrize("route", ROUTES)
def test_a_plain_net_of_a_users_own_goes_several_at_a_time(route):
    module = Net()
    assert PrivateGradient(module, layout_of(module), backend=route).prove(torch.zeros(1, 4), LABEL) > 1


def test_a_forward_that_was_put_into_a_known_layer_is_code_of_the_users():
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    plain = module[1].forward
    module[1].forward = lambda h: h if (h.detach().numpy() == 0.12345).any() else plain(h)
    assert PrivateGradient(module, layout_of(module)).prove(torch.zeros(1, 4), LABEL) == 1


@pytest.mark.parametrize(
    "name", ["prod", "cumprod", "nonzero", "masked_select", "_local_scalar_dense", "unique", "index", "sort"]
)
def test_operations_whose_way_or_shape_follows_from_values_are_not_in_the_table(name):
    assert name not in ROW_BY_ROW


def test_whole_numbers_as_indices_go_row_by_row_and_boolean_ones_do_not():
    x = torch.arange(6.0).view(3, 2)
    with Recorder() as plain:
        x[:, torch.tensor([1, 0])] * x.relu_()
    with Recorder() as boolean:
        x[x[:, 0] > 1]
    assert not plain.others and "aten::index" in boolean.others


def test_what_cannot_be_traced_is_not_trusted():
    assert shapes_follow_from_shapes(lambda x: x * 2, torch.ones(2))
    assert not shapes_follow_from_shapes(lambda x: float(x.sum()), torch.ones(2))


def test_a_product_whose_zero_sends_the_whole_batch_another_way_moves_the_sum_by_one_clip_norm():
    """63 equal rows and one whose product has a zero: 64 C before. One formula gives 0, the other rounding times 1e25."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.factors, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(1, 2)

        def forward(self, x):
            return self.head(torch.prod(self.factors(self.inner(x)), 1, keepdim=True))

    module, t = Products(), 287.0
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.inner.weight[0, 1] = 1.0
        module.factors.weight[:3, 0] = torch.tensor([1.0, 1.0, -1.0])
        module.factors.bias[:] = torch.tensor([3 * t, 6 * t, 2 * t, 1.0])
        module.head.weight[:, 0] = torch.tensor([1e25, -1e25])
    layout, clipping = layout_of(module), Clipping(1.0)
    x, y = torch.zeros(64, 4), torch.ones(64, dtype=torch.long)
    x[:, 0], x[-1, 1] = 1.0, -3 * t
    for route in ROUTES:
        engine = PrivateGradient(module, layout, backend=route)
        engine.set_support(Support(np.arange(1), layout.d))
        moved = engine.clipped_sum(x, y, clipping) - engine.clipped_sum(x[:-1], y[:-1], clipping)
        assert 0 < np.linalg.norm(moved) <= clipping.sensitivity(layout)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7])
def test_the_torch_rule_of_a_convolution_has_the_same_bits_at_every_place_whatever_lives(rows):
    """With few live output channels the product had a shape that was never proven: up to 190 C on windows that cancel."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 16, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    layout = layout_of(module)
    engine = PrivateGradient(module, layout, backend="torch")
    engine.set_support(Support(np.arange(25 * rows), layout.d))
    size = engine.prove(torch.zeros(1, 1, 12, 12), LABEL)
    x, y = torch.randn(size, 1, 12, 12), torch.zeros(size, dtype=torch.long)
    with engine._pinned():
        first = engine._engine.micro_batch(engine.live, x, y)[0][0].bits()[0]
        for shift in (1, 7, size // 2):
            moved = engine._engine.micro_batch(engine.live, x.roll(shift, 0), y)[0][0].bits()[0]
            assert torch.equal(moved.roll(-shift, 0), first)


def test_parts_of_a_micro_batch_have_one_shape():
    for rows in (1, 12, 32, 64):
        for floats in (1, 10**5, 10**6, 10**9):
            assert rows % even_part(rows, floats) == 0


def test_no_example_is_left_out_of_a_large_batch():
    """A cap on the batch replaced one example by another: 2 C."""
    module = nn.Linear(1, 2)
    layout, clipping = layout_of(module), Clipping(1.0)
    engine = PrivateGradient(module, layout)
    x, y = np.zeros((MOST_EXAMPLES + 1, 1), np.float32), np.zeros(MOST_EXAMPLES + 1, np.int64)
    x[1:-1], x[-1] = 1.0, -3.0
    moved = engine.clipped_sum(x, y, clipping) - engine.clipped_sum(x[1:], y[1:], clipping)
    assert 0 < np.linalg.norm(moved) <= clipping.sensitivity(layout)


@pytest.mark.parametrize("count", [1, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP + 5])
def test_sums_in_levels_are_sums_and_stay_within_the_counted_additions(count):
    terms = np.random.default_rng(0).normal(size=(count, 3))
    exact = terms.astype(np.longdouble).sum(0)
    total = in_levels(iter(terms), np.zeros(3))
    assert (np.abs(total - exact) <= (GROUP + count / GROUP + 2) * UNIT * np.abs(terms).sum(0)).all()
    assert slack(0, 0) >= 2 * MOST_EXAMPLES * (GROUP + GROUP + MOST_EXAMPLES / GROUP) * UNIT


def test_attentions_fast_path_is_off_inside_and_as_before_outside():
    before = torch.backends.mha.get_fastpath_enabled()
    with pinned(torch.device("cpu")):
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before
