"""The IDX files of MNIST and its relatives, from their .gz or unpacked, with known checksums.

Format: two zero bytes, type 8 (unsigned byte), number of dimensions, each size as big-endian uint32, then the bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.data import cached, npz, torchvision_sets
from fed_dpprune.data.dataset import Dataset, Labels
from fed_dpprune.errors import DataError
from fed_dpprune.places import data_root

FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
UNSIGNED_BYTE = 8


@dataclass(frozen=True)
class Source:
    """One such data set.

    Attributes:
        name: As in `data.dataset`.
        folder: torchvision's folder, under which `raw/` holds the files.
        md5: For each file without its suffix: md5 of the .gz, md5 unpacked.
    """

    name: str
    folder: str
    md5: dict[str, tuple[str, str]]

    def load(self) -> Dataset:
        """The data set, its images memory-mapped from the cache."""
        return npz.load_file(cached.npz(self.name, self._arrays), self.name)

    def labels(self) -> Labels:
        """Labels straight from their small files, else from the cache (made or downloaded when missing)."""
        files = {key: self.find(FILES[key]) for key in ("y_train", "y_test")}
        if not cached.path(self.name).exists() and all(files.values()):
            y_train, y_test = (self._read(key).astype(np.int64) for key in files)
            return Labels(y_train, 10, (1, 28, 28), None, int(y_test.size))
        return npz.labels_file(cached.npz(self.name, self._arrays))

    def find(self, file: str) -> Path | None:
        """The file under FED_DPPRUNE_DATA or among earlier downloads, packed or unpacked; None when there is none."""
        for root in (data_root(), torchvision_sets.downloads()):
            for name in (f"{file}.gz", file):
                path = None if root is None else root / self.folder / "raw" / name
                if path is not None and path.is_file():
                    return path
        return None

    @property
    def wanted(self) -> str:
        """What to put where, in one phrase."""
        return f"put {', '.join(f + '.gz' for f in FILES.values())} into FED_DPPRUNE_DATA/{self.folder}/raw"

    def _arrays(self) -> dict[str, NDArray[np.uint8]]:
        if not all(self.find(file) for file in FILES.values()):
            torchvision_sets.download(self.name, self.folder, self.wanted)
        return {key: self._read(key) for key in FILES}

    def _read(self, key: str) -> NDArray[np.uint8]:
        """One file, its checksum verified."""
        path = self.find(FILES[key])
        if path is None:
            raise DataError(f"data.dataset = {self.name}", f"{FILES[key]} is missing", self.wanted)
        packed, unpacked = self.md5[FILES[key]]
        blob = path.read_bytes()
        if hashlib.md5(blob, usedforsecurity=False).hexdigest() != (packed if path.suffix == ".gz" else unpacked):
            raise DataError(str(path), "has the wrong checksum, it is damaged or another file", "fetch it again")
        return parse(gzip.decompress(blob) if path.suffix == ".gz" else blob, str(path))


def parse(blob: bytes, where: str) -> NDArray[np.uint8]:
    """The array of an IDX file's bytes, read-only; raises DataError when they are not one."""
    dimensions = blob[3] if len(blob) > 3 and blob[:3] == bytes((0, 0, UNSIGNED_BYTE)) else 0
    start = 4 + 4 * dimensions
    shape: tuple[Any, ...] = tuple(np.frombuffer(blob[4:start], ">u4").tolist()) if len(blob) >= start else ()
    if not dimensions or len(shape) != dimensions or len(blob) - start != math.prod(shape):
        raise DataError(where, "is not an IDX file of bytes, or is cut short", "fetch it again")
    return np.frombuffer(blob, np.uint8, offset=start).reshape(shape)
