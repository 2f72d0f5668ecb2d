"""Fashion-MNIST's training rows as a data set of their own: tune on it, and the test images stay unseen.

Of the 60,000 training rows 2,000, drawn from the seed with the classes in proportion, take the place of the test images;
the other 58,000 are private. `data.dataset = "configs.studies.fashion_mnist_validation:load"`, run where configs/ lies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.data import fashion_mnist, split
from fed_dpprune.data.dataset import Dataset, Examples, Labels

VALIDATION_ROWS = 2_000


def _split(y: NDArray[np.int64], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return split.stratified(y, VALIDATION_ROWS / y.size, seed)


def load(data: config.Data, seed: int) -> Dataset:
    """Both parts from the training files; the test files' images are read by nobody."""
    whole = fashion_mnist.load(data, seed)
    private, validation = _split(whole.train.y, seed)

    def rows(chosen: NDArray[np.int64]) -> Examples:
        return Examples(whole.train.x[chosen], whole.train.y[chosen], whole.train.scale)

    note = f"accuracy is on {VALIDATION_ROWS:,} held-out training images, not on test images"
    return replace(whole, name="fashion-mnist (validation)", train=rows(private), test=rows(validation), notes=(note,))


def labels(data: config.Data, seed: int) -> Labels:
    """The same rows without images."""
    whole = fashion_mnist.labels(data, seed)
    private, validation = _split(whole.y, seed)
    return replace(whole, y=whole.y[private], test_size=int(validation.size))


_quick: Any = load
_quick.labels = labels
