"""What a layer rule hands back for one parameter tensor: norms now, the weighted sum once all layers are in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fed_dpprune.dpsgd.compiled import Kernel
from fed_dpprune.dpsgd.live import LiveTensor

PADDING = 16  # the most lanes the kernel has


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


class Contribution(ABC):
    """Per-example gradients of one tensor on its m live positions, in whatever form is cheapest.

    Attributes:
        squared: Squared norms, shape (n,), float64.
        held: Bytes kept per example until the sum, beyond what the layer's input and output gradient take.
    """

    squared: Tensor
    held: int = 0

    @abstractmethod
    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """Write the sum over examples of factor times gradient into `out`, shape (m,), contiguous.

        `factors` has n entries and zeros after them up to a multiple of PADDING, which the kernel reads.
        """

    @abstractmethod
    def values(self) -> Tensor:
        """The gradients themselves, shape (n, m); for tensors that several layers share."""


class Values(Contribution):
    """Gradients kept as a matrix of shape (n, m)."""

    def __init__(self, values: Tensor) -> None:
        self._values, self.held = values, 4 * values.shape[1]
        self.squared = values.square().double().sum(1)

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution."""
        torch.mv(self._values.T, factors[: len(self._values)], out=out)

    def values(self) -> Tensor:
        """See Contribution."""
        return self._values


class Blocks(Contribution):
    """Gradients as the compiled kernel writes them: shape (groups, m, lanes), examples side by side."""

    def __init__(self, kernel: Kernel, n: int, blocks: Tensor, squared: Tensor | None = None) -> None:
        self._kernel, self._n, self._blocks, self.held = kernel, n, blocks, 4 * blocks.shape[1]
        if squared is None:
            squared = torch.empty(blocks.shape[0] * kernel.lanes, dtype=torch.float64)
            kernel.library.squared_values(blocks.shape[0], blocks.shape[1], blocks.data_ptr(), squared.data_ptr())
        self.squared = squared[:n]

    def weighted_sum(self, factors: Tensor, out: Tensor) -> None:
        """See Contribution."""
        groups, live, _ = self._blocks.shape
        self._kernel.library.weighted_values(groups, live, self._blocks.data_ptr(), factors.data_ptr(), out.data_ptr())

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
