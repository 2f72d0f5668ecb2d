"""What a data set is: rows kept as they were stored, turned into numbers only when taken. numpy only.

Images stay uint8 (often memory-mapped, so that several processes share the pages); `Examples.take` makes float32 of the
rows it is asked for. The constants of that map are public: they never come from the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.errors import DataError


@dataclass(frozen=True)
class Scale:
    """The affine map (x - center) / half_range, by public constants; [0, 255] goes to [-1, 1] exactly with PIXELS."""

    center: float
    half_range: float


PIXELS = Scale(127.5, 127.5)


@dataclass(frozen=True)
class Examples:
    """Rows and their labels.

    Attributes:
        x: Shape (N, *shape), uint8 or float32; images are channels first. May be a memory map.
        y: Shape (N,), int64, in 0..classes-1.
        scale: Applied when rows are taken; None leaves the values as they are.
    """

    x: NDArray[np.uint8] | NDArray[np.float32]
    y: NDArray[np.int64]
    scale: Scale | None = None

    def __post_init__(self) -> None:
        """Check types and lengths once.

        Raises:
            DataError: x is neither uint8 nor float32, y is not int64 of shape (N,), or the lengths differ.
        """
        if self.x.dtype not in (np.uint8, np.float32):
            raise DataError("examples", f"features of type {self.x.dtype}", "use uint8 or float32")
        if self.y.dtype != np.int64 or self.y.shape != self.x.shape[:1]:
            raise DataError("examples", f"labels of type {self.y.dtype} and shape {self.y.shape}", "use int64, one per row")

    def __len__(self) -> int:
        return int(self.y.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.x.shape[1:])

    def take(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The rows at `indices` (any order, repeats allowed, none at all is fine).

        Returns:
            Features, shape (n, *shape), float32, C-contiguous and owned by the caller; labels, shape (n,), int64.
        """
        rows = np.ascontiguousarray(self.x[indices]).astype(np.float32)
        if self.scale is not None:
            rows -= np.float32(self.scale.center)
            rows /= np.float32(self.scale.half_range)
        return rows, self.y[indices]


@dataclass(frozen=True)
class Dataset:
    """A data set with its test split.

    Attributes:
        name: As in `data.dataset`.
        train: The private rows that clients share out among themselves.
        test: Held-out rows; no client ever holds one.
        classes: Number of classes, at least 2.
        input_shape: Shape of one example: (features,) or (channels, height, width).
        natural: The client of each training row, shape (N,), ids 0..clients-1, where the data set knows one; else None.
        notes: What a reader of results must be told (lossy pixels, rows left out, ...).
    """

    name: str
    train: Examples
    test: Examples
    classes: int
    input_shape: tuple[int, ...]
    natural: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the parts fit together.

        Raises:
            DataError: Empty split, shapes that differ, a label outside 0..classes-1, fewer than two classes, or a
                client column of another length.
        """
        for part, examples in (("training", self.train), ("test", self.test)):
            if not len(examples):
                raise DataError(self.name, f"has no {part} rows")
            if examples.shape != self.input_shape:
                raise DataError(self.name, f"{part} rows have shape {examples.shape}, not {self.input_shape}")
            low, high = int(examples.y.min()), int(examples.y.max())
            if low < 0 or high >= self.classes:
                raise DataError(self.name, f"a {part} label is outside 0..{self.classes - 1}")
        if self.classes < 2:
            raise DataError(self.name, "has a single class", "a classifier needs two at least")
        if self.natural is not None and self.natural.shape != self.train.y.shape:
            raise DataError(self.name, "the client column and the training rows differ in length")

    def labels(self) -> Labels:
        """What `plan` may read of it."""
        return Labels(self.train.y, self.classes, self.input_shape, self.natural, len(self.test))


@dataclass(frozen=True)
class Labels:
    """All that `plan` may read: labels and shapes, no features.

    Attributes:
        y: Training labels, shape (N,), int64.
        classes: Number of classes.
        input_shape: Shape of one example.
        natural: As in Dataset.
        test_size: Number of test rows.
    """

    y: NDArray[np.int64]
    classes: int
    input_shape: tuple[int, ...]
    natural: NDArray[np.int64] | None
    test_size: int
