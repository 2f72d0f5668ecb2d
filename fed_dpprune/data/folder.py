"""A folder of images: train/<class>/* and test/<class>/*, all of one size, all grey or all coloured.

Classes are the sorted names of the folders in train/. Unpacked once into the cache; a change of names, sizes or times
makes a new copy.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.data import cached, npz
from fed_dpprune.data.dataset import Dataset, Labels
from fed_dpprune.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
GREY = ("1", "L", "LA", "I", "I;16", "F")


def load(data: config.Data, seed: int) -> Dataset:
    """The images of the folder that `data.dataset` names, relative to the working directory."""
    return npz.load_file(_npz(data), data.dataset)


def labels(data: config.Data, seed: int) -> Labels:
    """Labels and shapes; the first call unpacks the images."""
    return npz.labels_file(_npz(data))


def _npz(data: config.Data) -> Path:
    root = Path(data.dataset).expanduser()
    listing = hashlib.blake2b(str(root.resolve()).encode(), digest_size=8)
    for part in ("train", "test"):
        for path, _ in _files(root, part):
            status = path.stat()
            listing.update(f"{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return cached.npz(f"folder-{listing.hexdigest()}", lambda: arrays(root))


def _classes(root: Path) -> list[str]:
    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise DataError(str(root), "has no folders train and test", "make train/<class>/ and test/<class>/")
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    others = {path.name for path in (root / "test").iterdir() if path.is_dir()} - set(classes)
    if others:
        raise DataError(str(root), f"test/ has a class that train/ lacks: {min(others)}", "name the folders alike")
    return classes


def _files(root: Path, part: str) -> list[tuple[Path, int]]:
    """Every image of one part with its label, in sorted order."""
    return [
        (path, label)
        for label, name in enumerate(_classes(root))
        for path in sorted((root / part / name).glob("*"))
        if path.suffix.lower() in SUFFIXES
    ]


def arrays(root: Path) -> dict[str, NDArray[Any]]:
    """x_train, y_train, x_test, y_test of the folder.

    Raises:
        DataError: No images, an unreadable one, or images of different sizes or colours.
    """
    found: dict[str, NDArray[Any]] = {}
    for part in ("train", "test"):
        files = _files(root, part)
        if not files:
            raise DataError(str(root / part), "holds no images", f"put files into {part}/<class>/")
        images = [_pixels(path) for path, _ in files]
        for (path, _), image in zip(files, images, strict=True):
            if image.shape != images[0].shape:
                raise DataError(str(path), f"has shape {image.shape}, not {images[0].shape}", "make all images alike")
        found[f"x_{part}"], found[f"y_{part}"] = np.stack(images), np.array([label for _, label in files])
    return found


def _pixels(path: Path) -> NDArray[np.uint8]:
    """Shape (H, W) where the file is grey, else (H, W, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L" if image.mode in GREY else "RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(str(path), f"is not a readable image ({error})") from None
