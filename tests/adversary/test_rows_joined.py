"""A user's nets that join rows only for values that made-up examples do not have: 1.2 to 17 C before they went one by one."""

import pytest
import torch
from clipped_sum_search import layout_of
from torch import nn

from fed_dpprune.dpsgd.gradient import PrivateGradient
from fed_dpprune.errors import ConfigError

LABEL = torch.zeros(1, dtype=torch.long)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.between(torch.relu(self.inner(x)), x))

    def between(self, h, x):
        return h


class Scaled(Net):
    def forward(self, x):
        return super().forward(torch.where((x > 100).float().sum() > 0, x / 255, x))


class Capacity(Net):  # an expert takes the first so many of the batch
    def between(self, h, x):
        return h * (torch.cumsum((h > 1e9).float(), 0) <= 45)


class Rolled(Net):
    def between(self, h, x):
        return torch.where(h > 1e9, h.roll(1, 0), h)


class Softmaxed(Net):
    def between(self, h, x):
        return torch.where(h > 1e9, torch.softmax(h, 0), h)


class Attending(Net):
    def between(self, h, x):
        return torch.where(h > 1e9, h @ h.T @ h, h)


class Turned(Net):
    def between(self, h, x):
        return torch.where(h > 1e9, h.T.reshape(h.shape), h)


class ClippedInside(Net):
    def between(self, h, x):
        if h.requires_grad:
            h.register_hook(lambda g: g * (1e9 / g.norm()).clamp(max=1))
        return h


class InNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, g):
        return g * min(1.0, 1e9 / max(1e-30, float((g.numpy() ** 2).sum())))


class BackwardInNumpy(Net):
    def between(self, h, x):
        return InNumpy.apply(h)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 2)

    def forward(self, ids):
        e = self.words(ids)
        return self.head(torch.where((ids == 7).unsqueeze(-1), e.mean((0, 1), keepdim=True), e).mean(1))


@pytest.mark.parametrize(
    "kind", [Scaled, Capacity, Rolled, Softmaxed, Attending, Turned, ClippedInside, BackwardInNumpy, Unknown]
)
def test_code_that_may_join_rows_takes_examples_one_by_one(kind):
    module = kind()
    x = torch.zeros(1, 5, dtype=torch.long) if kind is Unknown else torch.zeros(1, 4)
    assert PrivateGradient(module, layout_of(module)).prove(x, LABEL) == 1


class Apart(nn.Module):
    """What users write: branches, residuals, several heads, norms, words, means over places, all example by example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.down, self.head = nn.Conv2d(6, 8, 3, stride=2), nn.Linear(16, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x)))
        h = nn.functional.max_pool2d(h + 0.1 * h.mean((2, 3), keepdim=True), 2)
        h = torch.tanh(self.down(h))
        return self.head(torch.cat([h.mean((2, 3)), torch.softmax(h.amax((2, 3)), 1)], 1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, ids):
        e = self.norm(self.words(ids))
        return self.head((e * (ids > 0).unsqueeze(-1)).sum(1) / (ids > 0).sum(1, keepdim=True).clamp(min=1))


@pytest.mark.parametrize(("kind", "x"), [(Apart, torch.zeros(1, 1, 13, 13)), (Words, torch.zeros(1, 7, dtype=torch.long))])
def test_code_that_keeps_rows_apart_goes_several_at_a_time(kind, x):
    module = kind()
    assert PrivateGradient(module, layout_of(module)).prove(x, LABEL) > 1


class Renormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Parameter(torch.ones(9, 6)), nn.Linear(6, 2)

    def forward(self, ids):
        return self.head(nn.functional.embedding(ids, self.words, max_norm=1e9).mean(1))


class Largest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.register_buffer("largest", torch.tensor(1e9))

    def forward(self, x):
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        return self.head(x / self.largest)


@pytest.mark.parametrize(("kind", "x"), [(Renormed, torch.zeros(1, 5, dtype=torch.long)), (Largest, torch.zeros(1, 4))])
def test_a_write_to_a_weight_or_buffer_counts_even_where_made_up_values_change_nothing(kind, x):
    module = kind()
    with pytest.raises(ConfigError, match="changes in the forward pass"):
        PrivateGradient(module, layout_of(module)).prove(x, LABEL)
