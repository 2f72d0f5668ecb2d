"""Linear: with one position per example the weight's gradient is an outer product, and its norm on any mask needs no gradient.

Squared norm of example i on mask M: sum over (o, k) of M[o, k] g[i, o]^2 a[i, k]^2, in float64, whose range holds fourth powers
of float32. With several positions (sequences, modules called twice) that formula drops cross terms; there the gradients on the
live weights are formed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.grad_sample.contribution import Call, Contribution, Unfit, Values, address, even_part, on_device, pick
from fed_dpprune.dpsgd.grad_sample.sampled import Window, sliding
from fed_dpprune.dpsgd.live import LiveTensor

# Sampled products take this much of the time of the two dense products and the gathering that any mask needs.
DENSE_FROM = 0.65
# Torch's products with compressed rows: the density up to which they beat the dense ones (measured on CPU, with MKL).
COMPRESSED_BELOW = 0.15


def contributions(
    layer: nn.Module, live: Mapping[str, LiveTensor], calls: Sequence[Call], kernel: Kernel | None
) -> dict[str, Contribution]:
    """Rule for nn.Linear; inputs (n, ..., in_features)."""
    linear = cast(nn.Linear, layer)
    n = calls[0].gradient.shape[0]
    if any(call.arguments[0].ndim < 2 for call in calls):
        raise Unfit("a linear layer without a dimension for the examples")
    a = _joined([call.x for call in calls], n, linear.in_features)
    g = _joined([call.g for call in calls], n, linear.out_features)
    found: dict[str, Contribution] = {}
    if "bias" in live:
        found["bias"] = Values(pick(g if g.ndim == 2 else g.sum(1), live["bias"]))
    if "weight" in live:
        found["weight"] = _weight(a, g, live["weight"], kernel)
    return found


def _joined(parts: list[Tensor], n: int, features: int) -> Tensor:
    """Calls of one layer as one longer sequence, shape (n, positions, features), or (n, features) with a single position."""
    if len(parts) == 1 and parts[0].ndim == 2:
        return parts[0]
    sequences = [part.reshape(n, -1, features) for part in parts]
    joined = sequences[0] if len(parts) == 1 else torch.cat(sequences, 1)
    return joined.squeeze(1) if joined.shape[1] == 1 else joined


def _weight(a: Tensor, g: Tensor, live: LiveTensor, kernel: Kernel | None) -> Contribution:
    if a.ndim > 2:
        return _several(a, g, live, kernel)
    if live.product:
        return Outer(a, g, live)
    if kernel is not None and live.count < DENSE_FROM * live.size:
        return Sampled(a, g, live, kernel)
    few = a.is_cpu and torch._C.has_mkl and live.count < COMPRESSED_BELOW * live.size
    return Compressed(a, g, live) if few else Masked(a, g, live)


def _several(a: Tensor, g: Tensor, live: LiveTensor, kernel: Kernel | None) -> Contribution:
    """Gradients over several positions: a convolution with a window of one."""
    if kernel is not None:
        wide = a.transpose(1, 2).unsqueeze(2), g.transpose(1, 2).unsqueeze(2)  # (n, features, 1, positions), a view
        return cast(Contribution, sliding(kernel, *wide, Window(), live, None)[0])
    size = even_part(a.shape[0], live.size)
    parts = []
    for start in range(0, a.shape[0], size):
        part = slice(start, start + size)
        parts.append(pick(torch.bmm(g[part].transpose(1, 2), a[part]).flatten(1), live))
    return Values(torch.cat(parts))


class _OnePosition(Contribution):
    """Holds input a (n, in) and output gradient g (n, out): each gradient is one product, exact in float64."""

    def __init__(self, a: Tensor, g: Tensor, live: LiveTensor) -> None:
        self.a, self.g, self.live = a, g, live

    def values(self) -> Tensor:
        """See Contribution."""
        positions = on_device(self.live, self.a.device)
        return self.g.index_select(1, positions // self.live.columns) * self.a.index_select(1, positions % self.live.columns)

    def bits(self) -> list[Tensor]:
        """See Contribution."""
        return [self.a, self.g]

    def joined(self, others: Sequence[Contribution]) -> Contribution:
        """See Contribution."""
        if not others:
            return self
        parts = [self, *cast(Sequence[_OnePosition], others)]
        made = copy.copy(self)
        made.a, made.g = torch.cat([part.a for part in parts]), torch.cat([part.g for part in parts])
        made._join_squares(parts)
        return made

    def _join_squares(self, parts: Sequence[Contribution]) -> None:
        self.squared = torch.cat([part.squared for part in parts])

    def _scaled(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Factor times g, and a, in float64; rows of absent examples are 0."""
        factors = factors[: len(self.g)].unsqueeze(1)
        absent = factors == 0
        g, a = self.g.to(torch.float64, copy=True), self.a.to(torch.float64, copy=True)
        return g.mul_(factors).masked_fill_(absent, 0.0), a.masked_fill_(absent, 0.0)


class Outer(_OnePosition):
    """Live rows that share their live columns: dense once they are picked; frozen rows and columns cost nothing."""

    def __init__(self, a: Tensor, g: Tensor, live: LiveTensor) -> None:
        super().__init__(a, g, live)
        if live.count < live.size:
            rows, columns = _rows_and_columns(live, a.device)
            self.g = g if len(rows) == g.shape[1] else g.index_select(1, rows)
            self.a = a if len(columns) == a.shape[1] else a.index_select(1, columns)
        self.squared = _squared_norm(self.a) * _squared_norm(self.g)

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution."""
        g, a = self._scaled(factors)
        torch.mm(g.T, a, out=out.view(g.shape[1], a.shape[1]))

    def values(self) -> Tensor:
        """See Contribution."""
        return (self.g.unsqueeze(2) * self.a.unsqueeze(1)).flatten(1)


class Masked(_OnePosition):
    """Any mask by dense matrix products: one for the norms, one for the sum, then the live ones are picked."""

    def __init__(self, a: Tensor, g: Tensor, live: LiveTensor) -> None:
        super().__init__(a, g, live)
        per_feature = self._over_outputs(_finite(g).square_())
        self.squared = per_feature.mul_(_finite(a).square_()).sum(1)
        self.squared.masked_fill_(~(a.isfinite().all(1) & g.isfinite().all(1)), torch.inf)

    def _over_outputs(self, squares: Tensor) -> Tensor:
        """For each input, the sum of `squares` (n, out) over the outputs that it has a live weight to; shape (n, in)."""
        return squares @ _mask(self.live, squares)

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution."""
        g, a = self._scaled(factors)
        torch.index_select((g.T @ a).flatten(), 0, on_device(self.live, a.device), out=out)


class Compressed(Masked):
    """Few live weights, by torch's own products with compressed rows: work in proportion to them, but slower per weight."""

    def _over_outputs(self, squares: Tensor) -> Tensor:
        return cast(Tensor, torch.sparse.mm(_compressed(self.live, transposed=True), squares.T)).T

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution."""
        g, a = self._scaled(factors)
        out.copy_(torch.sparse.sampled_addmm(_compressed(self.live), g.T, a, beta=0.0).values())


class Sampled(_OnePosition):
    """Any mask by the compiled kernel: work in proportion to the live weights."""

    def __init__(self, a: Tensor, g: Tensor, live: LiveTensor, kernel: Kernel) -> None:
        super().__init__(a.contiguous(), g.contiguous(), live)
        self._kernel = kernel

    @cached_property
    def squared(self) -> Tensor:  # type: ignore[override]  # taken when all micro-batches are joined: the kernel likes many
        """See Contribution."""
        a, g = self.a, self.g
        self._turned, turned_g = self._scratch(a, torch.float32), self._scratch(g, torch.float32)
        squared = torch.empty(self._turned.shape[1], dtype=torch.float64)
        into = self._turned.data_ptr(), turned_g.data_ptr(), squared.data_ptr()
        operands = address(a, torch.float32), a.shape[1], address(g, torch.float32), g.shape[1]
        self._kernel.library.linear_squared(len(a), a.shape[1], g.shape[1], *operands, *self.live.row_addresses, *into)
        return squared[: len(a)]

    def _join_squares(self, parts: Sequence[Contribution]) -> None:
        self.__dict__.pop("squared", None)

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution; `squared` comes first, and this once."""
        (n, inputs), rows, g = self.a.shape, self.g.shape[1], self.g
        turned = self._turned.data_ptr(), address(g, torch.float32), rows, address(factors, torch.float64)
        scratch = self._scratch(g, torch.float64)
        into = scratch.data_ptr(), address(out, torch.float64)
        self._kernel.library.linear_sum(n, inputs, rows, *turned, *self.live.row_addresses, *into)

    def _scratch(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for (features, n padded)."""
        return torch.empty(source.shape[1], -(-len(source) // self._kernel.lanes) * self._kernel.lanes, dtype=dtype)


def _squared_norm(value: Tensor) -> Tensor:
    return value.to(torch.float64, copy=True).square_().sum(1)


def _finite(value: Tensor) -> Tensor:
    """In float64, with 0 where it is not finite: a product over the batch must not carry it to other examples."""
    return value.to(torch.float64, copy=True).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _rows_and_columns(live: LiveTensor, device: torch.device) -> tuple[Tensor, Tensor]:
    key = ("rows", str(device))
    if key not in live.cache:
        per_row = live.count // live.rows.size
        columns = torch.tensor(live.within_row[:per_row], device=device, dtype=torch.int64)
        live.cache[key] = torch.tensor(live.rows, device=device), columns
    found: tuple[Tensor, Tensor] = live.cache[key]
    return found


def _compressed(live: LiveTensor, transposed: bool = False) -> Tensor:
    """The mask as compressed rows, shape (out, in), or (in, out) when transposed."""
    key = ("compressed", transposed)
    if key not in live.cache:
        row, column = np.divmod(live.positions, live.columns)
        outputs, inputs = live.shape[0], live.columns
        if transposed:
            order = np.lexsort((row, column))
            row, column, outputs, inputs = column[order], row[order], inputs, outputs
        starts = torch.tensor(np.searchsorted(row, np.arange(outputs + 1)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse .* beta state", category=UserWarning)
            parts = starts, torch.tensor(column), torch.ones(live.count, dtype=torch.float64)
            live.cache[key] = torch.sparse_csr_tensor(*parts, (outputs, inputs), check_invariants=True)  # or torch warns
    found: Tensor = live.cache[key]
    return found


def _mask(live: LiveTensor, like: Tensor) -> Tensor:
    """The mask as floats, shape (out, in)."""
    key = ("mask", str(like.device), like.dtype)
    if key not in live.cache:
        flat = torch.zeros(live.size, device=like.device, dtype=like.dtype)
        flat[on_device(live, like.device)] = 1
        live.cache[key] = flat.view(live.shape)
    found: Tensor = live.cache[key]
    return found
