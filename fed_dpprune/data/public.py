"""Data that was declared public: another set, or a slice of the private set's training rows taken out of it.

`data.public` is "<data set>" or "<data set>[a:b]" (training rows a to b-1). A slice of the private set itself is removed
from the private training rows wherever they are loaded, so that no row is both. Test rows are never public.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.data.dataset import Dataset, Examples, Labels
from fed_dpprune.errors import ConfigError, DataError

_SPEC = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<start>\d*):(?P<stop>\d*)\])?")
CHUNK = 4096  # images adapted at once: bounds the memory


@dataclass(frozen=True)
class Public:
    """A parsed `data.public`.

    Attributes:
        dataset: A name as in `data.dataset`.
        start: First training row.
        stop: One past the last training row; None means all.
    """

    dataset: str
    start: int = 0
    stop: int | None = None


def parse(text: str) -> Public:
    """Read `data.public`.

    Raises:
        ConfigError: Not "<data set>" or "<data set>[a:b]" with a < b.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise ConfigError("data.public", f"{text!r} does not read as a data set", 'write "mnist" or "mnist[0:5000]"')
    start, stop = int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    if stop is not None and stop <= start:
        raise ConfigError("data.public", f"{text!r} is an empty range", "the first number must be below the second")
    return Public(match["name"].strip(), start, stop)


def same_set(one: str, other: str) -> bool:
    """Whether two names of `data.dataset` mean the same rows (files and folders by their real place)."""
    if one == other:
        return True
    paths = [Path(name).expanduser() for name in (one, other)]
    return all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve()


def private_rows(data: config.Data, total: int) -> slice | NDArray[np.int64] | None:
    """Which of `total` training rows stay private; None when all do. A slice where the rest is one piece.

    Raises:
        ConfigError: Everything would be public, or the range begins after the last row.
    """
    if not data.public:
        return None
    public = parse(data.public)
    if not same_set(public.dataset, data.dataset):
        return None
    stop = total if public.stop is None else min(public.stop, total)
    if public.start >= total:
        raise ConfigError("data.public", f"{data.public} begins after the last of {total} training rows", "choose a lower range")
    if stop - public.start >= total:
        raise ConfigError(
            "data.public",
            f"{data.public} is all of the private data set",
            "give a range, for example " + f"{data.dataset}[0:100]",
        )
    if public.start == 0:
        return slice(stop, total)
    if stop == total:
        return slice(0, public.start)
    return np.concatenate([np.arange(public.start), np.arange(stop, total)])


def without_public(data: config.Data, dataset: Dataset) -> Dataset:
    """The data set with the rows that `data.public` declares public taken out of the private training rows."""
    rows = private_rows(data, len(dataset.train))
    if rows is None:
        return dataset
    train = Examples(dataset.train.x[rows], dataset.train.y[rows], dataset.train.scale)
    return replace(dataset, train=train, natural=None if dataset.natural is None else dataset.natural[rows])


def labels_without_public(data: config.Data, labels: Labels) -> Labels:
    """The same for what `plan` reads."""
    rows = private_rows(data, int(labels.y.size))
    if rows is None:
        return labels
    return replace(labels, y=labels.y[rows], natural=None if labels.natural is None else labels.natural[rows])


def load_public(text: str, like: Dataset, seed: int, test_fraction: float = 0.25) -> Examples:
    """The public rows, adapted to the shape of the private ones.

    Images are resized (bilinear) and get the private number of channels (grey is repeated, colour is averaged). Features
    that are a square number count as a grey square image when one side of the pair is an image, else lengths must agree.
    Rows of a class that the private task does not have are left out.

    Args:
        text: `data.public`.
        like: The private data set.
        seed: The run's root seed and
        test_fraction: `data.test-fraction`: both decide what the training rows of a set without a test split are.

    Raises:
        ConfigError: `text` cannot be read, or its range begins after the last row.
        DataError: The set is missing, does not fit the private shape, or has no class in common.
    """
    from fed_dpprune.data import registry

    public = parse(text)
    source = registry.load(config.Data(dataset=public.dataset, test_fraction=test_fraction), seed).train
    if public.start >= len(source):
        raise ConfigError("data.public", f"{text} begins after the last of {len(source)} training rows", "choose a lower range")
    rows = slice(public.start, public.stop)
    y = source.y[rows]
    known = np.flatnonzero(y < like.classes)
    if not known.size:
        raise DataError(f"data.public = {text}", f"has no row of the {like.classes} private classes", "choose another set")
    x = source.x[rows] if known.size == y.size else source.x[rows][known]
    return adapt(Examples(x, y[known], source.scale), like.input_shape, text)


def adapt(examples: Examples, shape: tuple[int, ...], name: str) -> Examples:
    """The same rows in another shape; see `load_public`. Values keep their scale and type.

    Raises:
        DataError: Features on one side that are neither of equal number nor a square image.
    """
    if examples.shape == shape:
        return examples
    source, target = _as_image(examples.shape), _as_image(shape)
    if source is None or target is None or len(examples.shape) == len(shape) == 1:
        raise DataError(f"data.public = {name}", f"rows of shape {examples.shape} cannot become {shape}", "choose another set")
    out = np.empty((len(examples), *shape), dtype=examples.x.dtype)
    for start in range(0, len(examples), CHUNK):
        chunk = slice(start, start + CHUNK)
        values = _resize(_channels(examples.x[chunk].reshape(-1, *source).astype(np.float32), target[0]), *target[1:])
        if out.dtype == np.uint8:
            values = np.rint(values).astype(np.float32)
        out[chunk] = values.reshape(-1, *shape)
    return Examples(out, examples.y, examples.scale)


def _as_image(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(channels, height, width), a square number of features as a grey square; else None."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    side = round(shape[0] ** 0.5)
    return (1, side, side) if len(shape) == 1 and side * side == shape[0] else None


def _channels(images: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Shape (n, c, h, w) to (n, count, h, w)."""
    if images.shape[1] == count:
        return images
    grey = images.mean(axis=1, keepdims=True, dtype=np.float32)
    return np.repeat(grey, count, axis=1)


def _resize(images: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Bilinear between pixel centres, the image's edges on each other; shape (n, c, height, width)."""
    rows, columns = _weights(images.shape[2], height), _weights(images.shape[3], width)
    return (rows @ images @ columns.T).astype(np.float32, copy=False)


def _weights(old: int, new: int) -> NDArray[np.float32]:
    """Interpolation matrix, shape (new, old), each row summing to 1."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, old - 1)
    weights = np.zeros((new, old), dtype=np.float32)
    np.add.at(weights, (np.arange(new), low), (1 - (at - low)).astype(np.float32))
    np.add.at(weights, (np.arange(new), high), (at - low).astype(np.float32))
    return weights
