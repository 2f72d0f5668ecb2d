"""Data sets by name: one file each, imported only when asked for.

A new data set is one file with `load` and `labels`, and one line in TABLE.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from fed_dpprune import config
from fed_dpprune.data.dataset import Dataset, Labels
from fed_dpprune.errors import ConfigError

TABLE: dict[str, str] = {
    "digits": "digits",
}


def _module(name: str) -> ModuleType:
    """The file that reads the data set `name`.

    Raises:
        ConfigError: No data set, file or folder of that name.
    """
    if name in TABLE:
        file = TABLE[name]
    elif name.endswith(".npz"):
        file = "npz"
    else:
        raise ConfigError("data.dataset", f"{name!r} is not a data set", f"use one of {', '.join(TABLE)}, or a .npz file")
    return importlib.import_module(f"fed_dpprune.data.{file}")


def load(data: config.Data, seed: int) -> Dataset:
    """The data set that `data.dataset` names.

    Args:
        data: The [data] table; `test_fraction` matters only for sets without a test split of their own.
        seed: The run's root seed (stream "test-split").

    Raises:
        ConfigError: Unknown name.
        DataError: Files missing, damaged or of the wrong shape.
    """
    dataset: Dataset = _module(data.dataset).load(data, seed)
    return dataset


def labels(data: config.Data, seed: int) -> Labels:
    """Labels and shapes only, of the same rows in the same order as `load`; no features, no scikit-learn, no torch."""
    found: Labels = _module(data.dataset).labels(data, seed)
    return found
