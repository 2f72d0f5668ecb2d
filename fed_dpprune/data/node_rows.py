"""A deployed node's own rows, read against what its operator declared: shape and classes.

Every decision is about one row and reads nothing but that row: a row that does not fit the declaration counts as absent,
and no other row's values, label or place among the nodes depend on it. So adding or removing one example moves exactly
one row of exactly one node, which is what an epsilon speaks of. There is no test split here: a node trains on all rows
that are its own. Statistics over rows (scaling, vocabularies, codes by sort order) do not exist here; constants are
public or the operator's. numpy only.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config, dotted
from fed_dpprune.data import registry
from fed_dpprune.data.dataset import PIXELS, Examples, Scale
from fed_dpprune.errors import ConfigError, DataError

CHANNELS = (1, 2, 3, 4)
CHUNK = 4096  # rows looked at at once: bounds the memory
# Public on purpose: nodes that share a file must agree on who owns a row, and nothing about a row is learnt from the key.
PLACE_KEY = b"fed-dpprune: rows of nodes, 1"
_SHAPE = re.compile(r"[1-9]\d*(x[1-9]\d*){0,2}")


@dataclass(frozen=True)
class Declared:
    """What the operator says of every row.

    Attributes:
        shape: Of one example as the net sees it: (features,) or (channels, height, width).
        classes: Number of classes, at least 2.
        names: The classes' folder names in the order of their numbers, for a folder of images; empty where folders are
            named by number and where there are none.
    """

    shape: tuple[int, ...]
    classes: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """The rows of a node's data.

    Attributes:
        examples: All rows, also those that do not fit (their features are never taken).
        fitting: Numbers of the rows that fit, ascending, int64.
    """

    examples: Examples
    fitting: NDArray[np.int64]

    @property
    def total(self) -> int:
        """Rows in the file; private, for the operator's eyes alone."""
        return len(self.examples)


def parse_shape(value: object) -> tuple[int, ...]:
    """The operator's `shape`: "13" features, "28x28" grey pixels, "32x32x3" pixels with the channels last.

    Returns:
        The shape of one example as the net sees it, channels first.

    Raises:
        ConfigError: Anything else.
    """
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not _SHAPE.fullmatch(text):
        advice = 'write "13" for 13 features, "28x28" for grey images, "32x32x3" for coloured ones'
        raise ConfigError("node-config shape", f"{value!r} is not a shape", advice)
    sizes = tuple(int(part) for part in text.split("x"))
    if len(sizes) == 3 and sizes[2] not in CHANNELS:
        raise ConfigError("node-config shape", f"{text} has {sizes[2]} channels", "put 1 to 4 channels last: 32x32x3")
    return sizes if len(sizes) == 1 else (sizes[2] if len(sizes) == 3 else 1, sizes[0], sizes[1])


def shape_text(shape: tuple[int, ...]) -> str:
    """The inverse of `parse_shape`."""
    if len(shape) == 1:
        return str(shape[0])
    channels, height, width = shape
    return f"{height}x{width}" + ("" if channels == 1 else f"x{channels}")


def check_name(data: str) -> None:
    """Whether the operator's `data` reads as something to open; nothing is opened.

    Raises:
        ConfigError: Neither a data set by name, a .npz file, a folder with its whole path, nor package.module:function.
    """
    path = Path(data).expanduser()
    if not (data in registry.TABLE or data.endswith(".npz") or dotted.is_path(data) or path.is_absolute()):
        kinds = "a .npz file, a folder of images by its whole path, package.module:function, or one of "
        raise ConfigError("node-config data", f"{data!r} names no data", "use " + kinds + ", ".join(registry.TABLE))


def read(data: str, declared: Declared) -> Rows:
    """All rows of a node's data, and which of them fit.

    Args:
        data: The operator's: a name of `data.registry`, a .npz with x_train and y_train, a folder of images with one
            folder per class in train/, or package.module:function (see `data/loader.py`).
        declared: What every row must be.

    Raises:
        DataError: The data cannot be read at all.
        ConfigError: `data` names nothing.
    """
    check_name(data)
    if data.endswith(".npz"):
        x, y, scale = _npz(Path(data).expanduser())
    elif data == "adult":
        from fed_dpprune.data import adult

        x, y, scale = (*adult.node_rows(), None)
    elif data == "heart-disease":
        from fed_dpprune.data import heart_disease

        x, y, scale = (*heart_disease.node_rows(), None)
    elif data == "digits":
        from fed_dpprune.data import digits

        x, y, scale = (*digits.node_rows(), digits.GREYS)
    elif data in registry.TABLE:  # files with a published checksum: they hold the same rows everywhere, or are refused
        train = registry.load(config.Data(dataset=data), 0).train
        x, y, scale = train.x, train.y, train.scale
    elif dotted.is_path(data):
        from fed_dpprune.data import loader

        own = loader.examples(data)
        x, y, scale = own.x, own.y, own.scale
    else:
        from fed_dpprune.data import folder

        x, y, scale = (*folder.node_rows(Path(data).expanduser(), declared.shape, declared.names), PIXELS)
    return fit(x, y, scale, declared)


def _npz(path: Path) -> tuple[NDArray[Any], NDArray[Any], Scale | None]:
    """x, y, scale of a node's own file: x_train and y_train, channels first; the rest of the file is not looked at."""
    from fed_dpprune.data import npz

    x, y = npz.channels_first(npz.read_member(path, "x_train"), "x_train", str(path)), npz.read_member(path, "y_train")
    return x, y, PIXELS if x.dtype == np.uint8 else None


def fit(x: NDArray[Any], y: NDArray[Any], scale: Scale | None, declared: Declared) -> Rows:
    """Which rows fit: decided from the declaration and the row itself, for each row alone.

    A whole file of another row shape, or of a type that is neither uint8 nor floating point, has no row that fits: what
    the type of the array is belongs to the file's format, as its suffix does, and not to a row.

    Args:
        x: Shape (N, *any), any type.
        y: Shape (N,), whole numbers, or floats that are whole numbers.
        scale: Of uint8 values, a public constant.
        declared: The operator's.

    Raises:
        DataError: Features and labels of different numbers: then it cannot be told which label belongs to which row.
    """
    if y.ndim != 1 or x.shape[:1] != y.shape:
        raise DataError("data", f"features {x.shape} and labels {y.shape} do not belong together", "one label per row")
    labels, good = _labels(y, declared.classes)
    if x.shape[1:] != declared.shape or (x.dtype != np.uint8 and x.dtype.kind != "f"):
        nothing = Examples(np.zeros((y.size, *declared.shape), dtype=np.uint8), labels, scale)
        return Rows(nothing, np.zeros(0, dtype=np.int64))
    if x.dtype != np.uint8:
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 is infinite, and absent
            x = x.astype(np.float32, copy=False)
        for start in range(0, y.size, CHUNK):
            part = slice(start, start + CHUNK)
            good[part] &= np.isfinite(x[part]).reshape(good[part].size, -1).all(axis=1)
    return Rows(Examples(x, labels, scale), np.flatnonzero(good).astype(np.int64, copy=False))


def _labels(y: NDArray[Any], classes: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Labels as int64, 0 where they do not fit; and whether each fits."""
    if y.dtype.kind not in "iuf":
        return np.zeros(y.size, dtype=np.int64), np.zeros(y.size, dtype=np.bool_)
    good: NDArray[np.bool_] = (y >= 0) & (y < classes)  # a NaN is neither
    if y.dtype.kind == "f":
        good &= np.floor(y) == y
    return np.where(good, y, 0).astype(np.int64), good


def owned(rows: Rows, partition: int, partitions: int) -> NDArray[np.int64]:
    """The rows of one of several nodes that share this data: by a hash of each row's own content.

    Equal rows go to one node, and no row's place depends on another row.

    Args:
        rows: Of the shared data.
        partition: This node's, 0..partitions-1.
        partitions: How many nodes share it.
    """
    if partitions == 1:
        return rows.fitting
    mine = [row for row in rows.fitting.tolist() if place(rows.examples, row, partitions) == partition]
    return np.array(mine, dtype=np.int64)


def place(examples: Examples, row: int, partitions: int) -> int:
    """Which of `partitions` nodes owns a row."""
    content = hashlib.blake2b(digest_size=16, key=PLACE_KEY)
    content.update(int(examples.y[row]).to_bytes(8, "little"))
    content.update(np.ascontiguousarray(examples.x[row]).tobytes())
    return int.from_bytes(content.digest(), "little") % partitions


def nothing(declared: Declared) -> Examples:
    """No rows at all, of the declared shape."""
    return Examples(np.zeros((0, *declared.shape), dtype=np.float32), np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class Description:
    """What data look like, for the operator who writes a declaration from them; private until that is published.

    Attributes:
        declared: The shape and classes that most rows have.
        rows: How many fit that.
        total: How many there are.
    """

    declared: Declared
    rows: int
    total: int


def describe(data: str) -> Description:
    """Look at the data and propose their declaration: what a node's operator runs once, before the node serves.

    Raises:
        ConfigError: `data` names nothing.
        DataError: Nothing can be read, or fewer than two classes are found.
    """
    check_name(data)
    if data in registry.TABLE:
        whole = registry.load(config.Data(dataset=data), 0)
        declared = Declared(whole.input_shape, whole.classes)
    elif data.endswith(".npz") or dotted.is_path(data):
        declared = _described(data)
    else:
        from fed_dpprune.data import folder

        declared = Declared(*folder.describe(Path(data).expanduser()))
    if declared.classes < 2:
        raise DataError(data, f"has {declared.classes} class", "a classifier needs two; declare more by hand if others have them")
    found = read(data, declared)
    return Description(declared, int(found.fitting.size), found.total)


def _described(data: str) -> Declared:
    if dotted.is_path(data):
        from fed_dpprune.data import loader

        own = loader.examples(data)
        x, y = own.x, own.y
    else:
        x, y, _ = _npz(Path(data).expanduser())
    if y.ndim != 1 or y.dtype.kind not in "iuf" or (x.dtype != np.uint8 and x.dtype.kind != "f"):
        why = f"features of type {x.dtype}, labels of type {y.dtype} and shape {y.shape}"
        raise DataError(data, why, "save uint8 or floating-point features and one whole number as label per row")
    known = y[np.isfinite(y) & (y >= 0)]
    return Declared(tuple(x.shape[1:]), int(known.max(initial=-1)) + 1)
