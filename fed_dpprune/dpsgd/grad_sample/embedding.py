"""Embedding: the gradient of one example is a sum of output gradients per row it looked up; rows looked up twice add up first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.grad_sample.contribution import Call, Contribution, on_device
from fed_dpprune.dpsgd.live import LiveTensor


class Rows(Contribution):
    """The rows that occur: row r of `rows` belongs to example `example[r]` and word `word[r]`; frozen coordinates are zero."""

    def __init__(self, rows: Tensor, example: Tensor, word: Tensor, n: int, words: int, live: LiveTensor) -> None:
        self._rows, self._example, self._word, self._n, self._words, self._live = rows, example, word, n, words, live
        per_row = rows.to(torch.float64, copy=True).square_().sum(1)
        self.squared = torch.zeros(n, dtype=torch.float64, device=rows.device).index_add_(0, example, per_row)

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution."""
        total = out.new_zeros(self._words, self._rows.shape[1])
        factor = factors[self._example].unsqueeze(1)
        total.index_add_(0, self._word, self._rows.to(torch.float64, copy=True).mul_(factor).masked_fill_(factor == 0, 0.0))
        torch.index_select(total.flatten(), 0, on_device(self._live, total.device), out=out)

    def bits(self) -> list[Tensor]:
        """See Contribution: each example's rows added up, in the order of its words."""
        total = self.squared.new_zeros(self._n, self._rows.shape[1])
        return [total.index_add_(0, self._example, self._rows.double()), self.squared]

    def values(self) -> Tensor:
        """See Contribution."""
        whole = self._rows.new_zeros(self._n * self._words, self._rows.shape[1])
        whole[self._example * self._words + self._word] = self._rows
        return whole.view(self._n, -1).index_select(1, on_device(self._live, whole.device))


def contributions(
    layer: nn.Module, live: Mapping[str, LiveTensor], calls: Sequence[Call], kernel: Kernel | None
) -> dict[str, Contribution]:
    """Rule for nn.Embedding; inputs (n, ...) of word numbers."""
    table, tensor = cast(nn.Embedding, layer), live["weight"]
    n, words, width = calls[0].g.shape[0], table.num_embeddings, table.embedding_dim
    ids = torch.cat([call.arguments[0].reshape(n, -1) for call in calls], 1)
    gradient = torch.cat([call.g.reshape(n, -1, width) for call in calls], 1).flatten(0, 1)
    keys = (torch.arange(n, device=ids.device).unsqueeze(1) * words + ids).flatten()
    if table.padding_idx is not None:
        real = ids.flatten() != table.padding_idx
        keys, gradient = keys[real], gradient[real]
    occurring, place = torch.unique(keys, return_inverse=True)
    rows = gradient.new_zeros(len(occurring), width).index_add_(0, place, gradient)
    word = occurring % words
    if not tensor.full:
        rows *= _mask(tensor, words, rows)[word]
    return {"weight": Rows(rows, occurring // words, word, n, words, tensor)}


def _mask(live: LiveTensor, words: int, like: Tensor) -> Tensor:
    key = ("mask", str(like.device))
    if key not in live.cache:
        flat = like.new_zeros(live.size)
        flat[on_device(live, like.device)] = 1
        live.cache[key] = flat.view(words, -1)
    found: Tensor = live.cache[key]
    return found
