"""Data sets by name: one file each, imported only when asked for.

A new data set is one file with `load(data, seed)` and `labels(data, seed)`, and one line in TABLE. A name that is not in
the table may be a .npz file, a folder of images, or a dotted path to a user's own loader.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from fed_dpprune import config, dotted
from fed_dpprune.data import public
from fed_dpprune.data.dataset import Dataset, Labels
from fed_dpprune.errors import ConfigError, DataError

TORCHVISION = (
    "cifar10", "cifar100", "kmnist", "qmnist", "emnist-balanced", "emnist-letters", "emnist-digits", "usps", "svhn", "stl10",
    "pcam", "gtsrb", "food101", "flowers102", "dtd", "imagenette",
)  # fmt: skip

TABLE: dict[str, str] = {
    "digits": "digits",
    "adult": "adult",
    "heart-disease": "heart_disease",
    "mnist": "mnist",
    "fashion-mnist": "fashion_mnist",
    "cifar10-jpeg": "cifar10_jpeg",
    **dict.fromkeys(TORCHVISION, "torchvision_sets"),
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
    elif dotted.is_path(name):
        file = "loader"
    elif Path(name).expanduser().is_dir():
        file = "folder"
    else:
        near = difflib.get_close_matches(name, TABLE, n=1)
        kinds = "a .npz file, a folder of images, package.module:function, or one of " + ", ".join(TABLE)
        raise ConfigError("data.dataset", f"{name!r} is not a data set", f"did you mean {near[0]!r}?" if near else f"use {kinds}")
    return importlib.import_module(f"fed_dpprune.data.{file}")


def load(data: config.Data, seed: int) -> Dataset:
    """The data set that `data.dataset` names, without the rows that `data.public` takes out of it.

    Args:
        data: The [data] table; `test_fraction` matters only for sets without a test split of their own.
        seed: The run's root seed (stream "test-split").

    Raises:
        ConfigError: Unknown name, or a `data.public` that leaves nothing private.
        DataError: Files missing, damaged or of the wrong shape.
    """
    return public.without_public(data, _module(data.dataset).load(data, seed))


def labels(data: config.Data, seed: int) -> Labels:
    """Labels and shapes only, of the same rows in the same order as `load`; no features, no scikit-learn, no torch."""
    return public.labels_without_public(data, _module(data.dataset).labels(data, seed))


def absolute(data: config.Data) -> config.Data:
    """The same table with paths that mean the same in any working directory (worker processes may have another)."""
    if data.dataset in TABLE or dotted.is_path(data.dataset):
        return data
    return data.model_copy(update={"dataset": str(Path(data.dataset).expanduser().resolve())})


@dataclass(frozen=True)
class Found:
    """Whether a data set is at hand, for `doctor`.

    Attributes:
        name: As in `data.dataset`.
        here: Loads without a network.
        text: Where it lies, or what to put where.
    """

    name: str
    here: bool
    text: str


def inventory() -> Iterator[Found]:
    """Every data set of TABLE that is looked for by file; torch is not imported."""
    from fed_dpprune.data import adult, cached, cifar10_jpeg, digits, fashion_mnist, heart_disease, idx, mnist, torchvision_sets

    def of_file(name: str, path: Path | None, wanted: str) -> Found:
        unpacked = cached.path(name)
        path = path or (unpacked if unpacked.exists() else None)
        return Found(name, path is not None, str(path) if path else wanted)

    try:
        yield of_file("digits", digits.path(), "")
    except DataError as error:
        yield Found("digits", False, error.fix)
    yield of_file("adult", adult.find("data") and adult.find("test"), adult.WANTED)
    hospitals = [heart_disease.find(name) for name in heart_disease.HOSPITALS]
    yield of_file("heart-disease", hospitals[0] if all(hospitals) else None, heart_disease.WANTED)
    for source in (mnist.SOURCE, fashion_mnist.SOURCE):
        files = [source.find(file) for file in idx.FILES.values()]
        yield of_file(source.name, files[0] if all(files) else None, source.wanted)
    yield of_file("cifar10-jpeg", cifar10_jpeg.source(), cifar10_jpeg.WANTED)
    for name in torchvision_sets.TABLE:
        yield of_file(name, torchvision_sets.find(name), torchvision_sets.wanted(name) + " (or have a network)")
