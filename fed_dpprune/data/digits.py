"""scikit-learn's bundled handwritten digits: 1,797 images of 8 x 8, 10 classes, as 64 features.

Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998), test part, in scikit-learn's wheel.
Read from the file itself: importing scikit-learn takes longer than all the rest of `plan`.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.data import split
from fed_dpprune.data.dataset import Dataset, Examples, Labels, Scale
from fed_dpprune.errors import DataError

FEATURES = 64
ROWS = 1797
GREYS = Scale(8.0, 8.0)  # pixels are counts 0..16


def path() -> Path:
    """The file inside the installed scikit-learn.

    Raises:
        DataError: scikit-learn, or the file in it, is not there.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return file
    raise DataError("data.dataset = digits", "scikit-learn's digits.csv.gz is not installed", "pip install scikit-learn")


def _table() -> NDArray[np.uint8]:
    """All rows, shape (1797, 65): 64 pixels and the label."""
    text = gzip.decompress(path().read_bytes())
    try:
        table = np.array(text.replace(b"\n", b",").strip(b",").split(b","), dtype=np.float32).astype(np.uint8)
        return table.reshape(ROWS, FEATURES + 1)
    except ValueError as error:
        raise DataError(str(path()), f"is not the digits table ({error})", "reinstall scikit-learn") from None


def load(data: config.Data, seed: int) -> Dataset:
    """The data set with a stratified test split of `data.test-fraction`."""
    table = _table()
    y = table[:, FEATURES].astype(np.int64)
    train, test = split.stratified(y, data.test_fraction, seed)
    x = np.ascontiguousarray(table[:, :FEATURES])
    return Dataset("digits", Examples(x[train], y[train], GREYS), Examples(x[test], y[test], GREYS), 10, (FEATURES,))


def node_rows() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All rows and labels, for a node: no split, so that no row's part depends on another row."""
    table = _table()
    return np.ascontiguousarray(table[:, :FEATURES]), table[:, FEATURES].astype(np.int64)


def labels(data: config.Data, seed: int) -> Labels:
    """Labels and shapes; the file is so small that reading it whole is the quickest way."""
    return load(data, seed).labels()
