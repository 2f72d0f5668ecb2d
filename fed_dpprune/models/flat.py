"""The one definition of coordinate order: parameter names, shapes and offsets in the flat vector. numpy only.

Order is that of the model's `named_parameters()` (C order inside a tensor), each shared tensor once. Everything that
speaks of "coordinate j" (supports, payloads, checkpoints) means this order; its digest travels with the terms.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

KINDS = ("weight", "bias", "norm", "embedding", "other")


@dataclass(frozen=True)
class Tensor:
    """One named parameter tensor.

    Attributes:
        name: As in `named_parameters()`.
        shape: Its shape.
        kind: One of KINDS: `weight` of a linear or convolution layer, `bias` of such a layer, `norm` (weight or bias
            of a normalisation layer), `embedding`, `other`.
        fan_in: Inputs of one output unit (0 where the notion does not apply); sets the scale of the initial draw.
        frozen: Whole tensor held at its value by the user (`model.freeze-layers`).
        head: Belongs to the last (classifier) layer.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "weight"
    fan_in: int = 0
    frozen: bool = False
    head: bool = False

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Work:
    """What the forward pass of one example takes.

    Attributes:
        multiply_adds: Of linear and convolution layers; biases, norms and activations add next to nothing.
        values: Outputs of all layers together, which a backward pass needs again.
    """

    multiply_adds: int
    values: int

    def __add__(self, other: Work) -> Work:
        return Work(self.multiply_adds + other.multiply_adds, self.values + other.values)


@dataclass(frozen=True)
class Layout:
    """All tensors of a model in coordinate order."""

    tensors: tuple[Tensor, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each tensor in the flat vector, and d at the end; len(tensors) + 1 entries."""
        total, offsets = 0, [0]
        for tensor in self.tensors:
            total += tensor.size
            offsets.append(total)
        return tuple(offsets)

    @property
    def d(self) -> int:
        """Length of the flat vector."""
        return self.offsets[-1]

    @cached_property
    def digest(self) -> str:
        """32 hex digits: equal if and only if names, shapes and order are equal."""
        text = ";".join(f"{t.name}{list(t.shape)}" for t in self.tensors)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def spans(self) -> Iterator[tuple[Tensor, slice]]:
        """Each tensor with its slice of the flat vector."""
        for tensor, start, end in zip(self.tensors, self.offsets, self.offsets[1:], strict=False):
            yield tensor, slice(start, end)

    def split(self, vector: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Views of a flat vector of shape (d,), by tensor name and in the tensor's shape."""
        return {t.name: vector[s].reshape(t.shape) for t, s in self.spans()}

    def counts(self, indices: NDArray[np.int64]) -> list[int]:
        """How many of the sorted flat `indices` fall into each tensor."""
        edges = np.searchsorted(indices, np.asarray(self.offsets))
        return [int(n) for n in np.diff(edges)]
