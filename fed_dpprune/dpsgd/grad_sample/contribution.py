"""What a layer rule hands back for one parameter tensor: norms now, the weighted sum once all layers are in."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.live import LiveTensor

PADDING = 16  # the most lanes the kernel has
CHUNK_BYTES = 32 * 2**20  # scratch of one product over several examples
COLUMNS = 1 << 16  # coordinates that are widened to float64 at once


class Unfit(Exception):
    """A model that the layer rules cannot do exactly; the caller takes the slower route that can."""


@dataclass(frozen=True)
class Call:
    """One use of a layer in a forward pass.

    Attributes:
        arguments: The layer's arguments; tensors have the examples in their first dimension.
        gradient: Gradient of the summed loss in the layer's output; first dimension n.
    """

    arguments: tuple[Tensor, ...]
    gradient: Tensor

    @property
    def x(self) -> Tensor:
        """The first argument, in float32 when it is a float of less."""
        return _widen(self.arguments[0])

    @property
    def g(self) -> Tensor:
        """The output gradient, in float32 when it is less."""
        return _widen(self.gradient)


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def even_part(rows: int, floats: int) -> int:
    """How many examples to take at once so that `floats` numbers each fit into CHUNK_BYTES: a divisor of `rows`, a power of two.

    All parts have one shape then, which a left-over would not have; `floats` must follow from the layer alone.
    """
    size = 1
    while size < rows and rows % (2 * size) == 0 and 2 * size * floats * 4 <= CHUNK_BYTES:
        size *= 2
    return size


def address(tensor: Tensor, dtype: torch.dtype) -> int:
    """Where a tensor lies, for the kernel, which believes what it is told.

    Raises:
        TypeError: It is of another type, lies elsewhere than in main memory or is not in one piece.
    """
    if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise TypeError(f"the kernel needs contiguous {dtype} in main memory, not {tensor.dtype} on {tensor.device}")
    return tensor.data_ptr()


class Contribution(ABC):
    """Per-example gradients of one tensor on its m live positions, in whatever form is cheapest.

    Attributes:
        squared: Squared norms, shape (n,), float64, of the very numbers that `weighted_sum` adds up.
        held: Bytes kept per example until the sum, beyond what the layer's input and output gradient take.
    """

    squared: Tensor
    held: int = 0

    @abstractmethod
    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """Write the sum over examples of factor times gradient into `out`, shape (m,), float64, contiguous.

        `factors` has n float64 entries and zeros after them up to a multiple of PADDING, which the kernel reads. An example
        of factor 0 is left out, not multiplied: it may hold infinities.
        """

    @abstractmethod
    def values(self) -> Tensor:
        """The gradients themselves, shape (n, m); for tensors that several layers share."""

    def bits(self) -> list[Tensor]:
        """What norms and sums are made from, examples in front: equal bits here give equal contributions."""
        return [self.values()]

    def joined(self, others: Sequence[Contribution]) -> Contribution:
        """This and those of further micro-batches as one, in their order."""
        return Parts([self, *others]) if others else self


class Values(Contribution):
    """Gradients kept as a matrix of shape (n, m)."""

    def __init__(self, values: Tensor) -> None:
        self._values, self.held = values, values.element_size() * values.shape[1]
        squares = (part.to(torch.float64, copy=True).square_().sum(1) for part in torch.split(values, COLUMNS, 1))
        self.squared = sum(squares, torch.zeros(len(values), dtype=torch.float64, device=values.device))

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution."""
        factors = factors[: len(self._values)]
        absent = (factors == 0).unsqueeze(1)
        for part, place in zip(torch.split(self._values, COLUMNS, 1), torch.split(out, COLUMNS), strict=True):
            torch.mv(part.to(torch.float64, copy=True).masked_fill_(absent, 0.0).T, factors, out=place)

    def values(self) -> Tensor:
        """See Contribution."""
        return self._values

    def joined(self, others: Sequence[Contribution]) -> Contribution:
        """See Contribution: few columns are put together, many stay where they are."""
        if not others or self._values.shape[1] > COLUMNS:
            return super().joined(others)
        parts = [self, *cast(Sequence[Values], others)]
        made = copy.copy(self)
        made._values, made.squared = torch.cat([p._values for p in parts]), torch.cat([p.squared for p in parts])
        return made


class Parts(Contribution):
    """Several micro-batches, one after the other."""

    def __init__(self, parts: Sequence[Contribution]) -> None:
        self._parts, self.held = parts, parts[0].held
        self.squared = torch.cat([part.squared for part in parts])

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution."""
        out.zero_()
        one = torch.empty_like(out)
        sizes = [len(part.squared) for part in self._parts]
        for part, own in zip(self._parts, torch.split(factors[: sum(sizes)], sizes), strict=True):
            part.weighted_sum(nn.functional.pad(own, (0, -len(own) % PADDING)), one)
            out += one

    def values(self) -> Tensor:
        """See Contribution."""
        return torch.cat([part.values() for part in self._parts])


class Blocks(Contribution):
    """Gradients as the compiled kernel writes them: shape (groups, m, lanes), examples side by side."""

    def __init__(self, kernel: Kernel, n: int, blocks: Tensor, squared: Tensor | None = None) -> None:
        self._kernel, self._n, self._blocks, self.held = kernel, n, blocks, 4 * blocks.shape[1]
        if squared is None:
            squared = torch.empty(blocks.shape[0] * kernel.lanes, dtype=torch.float64)
            addresses = address(blocks, torch.float32), address(squared, torch.float64)
            kernel.library.squared_values(blocks.shape[0], blocks.shape[1], *addresses)
        self.squared = squared[:n]

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution."""
        groups, live, _ = self._blocks.shape
        addresses = address(self._blocks, torch.float32), address(factors, torch.float64), address(out, torch.float64)
        self._kernel.library.weighted_values(groups, live, *addresses)

    def values(self) -> Tensor:
        """See Contribution."""
        return self._blocks.transpose(1, 2).flatten(0, 1)[: self._n]


class Shared(Contribution):
    """A tensor used by several layers: their gradients are added before the norm, cross terms and all."""

    def __init__(self, parts: Sequence[Contribution]) -> None:
        total = parts[0].values()
        for part in parts[1:]:
            total = total + part.values()
        self._sum = Values(total)
        self.squared, self.held = self._sum.squared, self._sum.held

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution."""
        self._sum.weighted_sum(factors, out)

    def values(self) -> Tensor:
        """See Contribution."""
        return self._sum.values()


# (layer, its live tensors by parameter name, its calls in this pass, the kernel or None) -> contributions by parameter name.
Rule = Callable[[nn.Module, Mapping[str, LiveTensor], Sequence[Call], Kernel | None], dict[str, Contribution]]


def on_device(live: LiveTensor, device: torch.device) -> Tensor:
    """The live positions as an index tensor, made once per support and device."""
    key = ("positions", str(device))
    if key not in live.cache:
        live.cache[key] = torch.tensor(live.positions, device=device)
    found: Tensor = live.cache[key]
    return found


def pick(values: Tensor, live: LiveTensor) -> Tensor:
    """The live columns of (n, size), shape (n, m)."""
    return values if live.full else values.index_select(1, on_device(live, values.device))
