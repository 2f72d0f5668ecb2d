"""CIFAR-10 as JPEG of quality 75: lossy, so a result on it is called "CIFAR-10 (JPEG q75)", never CIFAR-10.

Made from FED_DPPRUNE_DATA/cifar10-jpeg, which holds either `cifar10_jpegq75.bin` (one file: b"C10J", header length and
image count, the JPEG header that all images share, labels, scan lengths, scans; the first 50,000 are for training), or
folders train/ and test/ with one folder of images per class.
"""

from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.data import cached, folder, npz
from fed_dpprune.data.dataset import Dataset, Labels
from fed_dpprune.errors import DataError
from fed_dpprune.places import data_root

NOTE = "CIFAR-10 (JPEG q75): lossy pixels, not comparable with CIFAR-10"
FILE = "cifar10_jpegq75.bin"
MD5 = "a5928d9be631f9581e2cbd9095b0fa5a"
MAGIC = b"C10J"
TRAINING_IMAGES = 50_000
SIDE = 32
WANTED = f"put {FILE}, or folders train/ and test/ of images, into FED_DPPRUNE_DATA/cifar10-jpeg"


def load(data: config.Data, seed: int) -> Dataset:
    """The data set with its own test split, memory-mapped from the cache."""
    return npz.load_file(make_npz(), "cifar10-jpeg", (NOTE,))


def labels(data: config.Data, seed: int) -> Labels:
    """Labels and shapes; the first call unpacks the images (some twenty seconds)."""
    return npz.labels_file(make_npz())


def make_npz() -> Path:
    """The .npz in FED_DPPRUNE_CACHE, made when it is not there yet."""
    return cached.npz("cifar10-jpeg", _arrays)


def source() -> Path | None:
    """The packed file or the folder it is made from, None when there is none."""
    root = data_root()
    home = None if root is None else root / "cifar10-jpeg"
    if home is not None and (home / FILE).is_file():
        return home / FILE
    return home if home is not None and (home / "train").is_dir() else None


def _arrays() -> dict[str, NDArray[Any]]:
    found = source()
    if found is None:
        raise DataError("data.dataset = cifar10-jpeg", "not found", WANTED)
    if found.is_dir():
        return folder.arrays(found)
    blob = found.read_bytes()
    if hashlib.md5(blob, usedforsecurity=False).hexdigest() != MD5:
        raise DataError(str(found), "has the wrong checksum, it is damaged or another file", "fetch it again")
    return unpack(blob, TRAINING_IMAGES)


def unpack(blob: bytes, training: int) -> dict[str, NDArray[Any]]:
    """The four arrays of the packed form; the first `training` images are the training part.

    Raises:
        DataError: Not that form.
    """
    from PIL import Image

    if blob[:4] != MAGIC:
        raise DataError(FILE, "is not the packed form of CIFAR-10")
    header_length, count = struct.unpack_from("<HI", blob, 4)
    at = 10 + header_length
    header = blob[10:at]
    y = np.frombuffer(blob, np.uint8, count, at)
    ends = np.cumsum(np.frombuffer(blob, "<u2", count, at + count)) + at + 3 * count
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for row, (start, end) in enumerate(zip([at + 3 * count, *ends.tolist()], ends.tolist(), strict=False)):
        images[row] = np.asarray(Image.open(io.BytesIO(header + blob[start:end])).convert("RGB"))
    return {"x_train": images[:training], "y_train": y[:training], "x_test": images[training:], "y_test": y[training:]}
