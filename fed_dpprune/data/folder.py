"""A folder of images: train/<class>/* and test/<class>/*, all of one size, all grey or all coloured.

Classes are the sorted names of the folders in train/. Unpacked once into the cache; a change of names, sizes or times
makes a new copy. A file is opened as a picture only where it is a regular file of a bounded size, and decoded only where its
header names a shape that is wanted: one file cannot make a node wait, or take memory by its own choice.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.data import cached, npz
from fed_dpprune.data.dataset import Dataset, Labels
from fed_dpprune.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
GREY = ("1", "L", "LA", "I", "I;16", "F")
# Those of SUFFIXES. Pillow goes by the content, and some of its other formats (EPS) start programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
HEADERS = 2**24  # bytes of a file beside its pixels: colour profiles, camera data
LARGEST = 2**28  # values of one picture where no shape is declared
WIDEST_TILE = 2**12  # a TIFF names the size of its tiles apart from its own
_TILES = (322, 323)  # TIFF 6.0, TileWidth and TileLength
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)  # a pipe would make it wait


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


def node_rows(root: Path, shape: tuple[int, ...], names: tuple[str, ...]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images of train/ for a node, each decided by itself, unlike `arrays`.

    One that cannot be read, or of another size or colour than declared, is left out; a folder that is not one of `names`
    is no class.

    Args:
        root: Holds train/<class>/.
        shape: Of one example, channels first.
        names: The classes' folders in the order of their numbers; empty where folders are named 0, 1, 2, ...

    Returns:
        Images, shape (N, *shape), and labels; -1 for a folder whose name is no number.

    Raises:
        DataError: There is no folder train/.
    """
    if not (root / "train").is_dir():
        raise DataError(str(root), "has no folder train", "make train/<class>/ with images")
    listing = hashlib.blake2b(repr((str(root.resolve()), shape, names)).encode(), digest_size=8)
    files = [path for path in sorted((root / "train").glob("*/*")) if path.suffix.lower() in SUFFIXES]
    for path in files:
        with contextlib.suppress(OSError):  # a link to nothing is an image that cannot be read
            status = path.stat()
            listing.update(f"{path.relative_to(root)} {status.st_size} {status.st_mtime_ns}\n".encode(errors="replace"))
    made = cached.npz(f"node-folder-{listing.hexdigest()}", lambda: _fitting(files, shape, names))
    return npz.channels_first(npz.read_member(made, "x_train"), "x_train", str(root)), npz.read_member(made, "y_train")


def describe(root: Path) -> tuple[tuple[int, ...], int, tuple[str, ...]]:
    """(most frequent shape of an image, channels first; number of classes; their names unless they are 0, 1, 2, ...).

    Raises:
        DataError: No folder train/, or no image in it that can be read.
    """
    names = sorted(path.name for path in (root / "train").glob("*/") if path.is_dir())
    shapes: Counter[tuple[int, ...]] = Counter()
    for path in (root / "train").glob("*/*"):
        if path.suffix.lower() in SUFFIXES:
            with contextlib.suppress(Exception), _picture(path, LARGEST) as image:  # as in `_fitting`
                shapes[_shape(image)] += 1
    if not shapes:
        raise DataError(str(root), "has no folder train/<class>/ with images that can be read", "see README.md for the form")
    numbered = all(_NUMBER.fullmatch(name) for name in names)
    classes = 1 + max(map(int, names)) if numbered else len(names)
    return shapes.most_common(1)[0][0], classes, () if numbered else tuple(names)


def _fitting(files: list[Path], shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """x_train, shape (N, height, width, channels), and y_train of the images that have the declared shape."""
    code = {name: label for label, name in enumerate(names)}
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for path in files:
        folder = path.parent.name
        label = code.get(folder, -1) if names else int(folder) if _NUMBER.fullmatch(folder) else -1
        try:
            image = _pixels(path, shape)
        except Exception:  # whatever a damaged file makes its decoder raise, it is one image that is absent
            continue
        image = image if image.ndim == 3 else image[:, :, None]
        if image.transpose(2, 0, 1).shape == shape:
            images.append(image)
            labels.append(label)
    empty = np.zeros((0, *shape[1:], shape[0]) if len(shape) == 3 else (0, 1, 1, 1), dtype=np.uint8)
    return {"x_train": np.stack(images) if images else empty, "y_train": np.array(labels, dtype=np.int64)}


def _pixels(path: Path, shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """Shape (H, W) where the file is grey, else (H, W, 3).

    Args:
        path: The file.
        shape: The one it must have, channels first; a picture of another is not decoded. None takes any up to LARGEST.

    Raises:
        DataError: No regular file, one that is too large, of another shape, or damaged.
    """
    with _picture(path, LARGEST if shape is None else math.prod(shape)) as image:
        if shape is not None and _shape(image) != shape:
            raise DataError(str(path), f"is a picture of shape {_shape(image)}, not {shape}", "make all images alike")
        return np.asarray(image.convert("L" if image.mode in GREY else "RGB"))


def _shape(image: Image) -> tuple[int, int, int]:
    """Of a picture whose header was read, channels first."""
    return (1 if image.mode in GREY else 3, image.height, image.width)


@contextlib.contextmanager
def _picture(path: Path, values: int) -> Iterator[Image]:
    """A picture of at most so many values, its header read and its pixels not yet.

    Raises:
        DataError: As `_pixels`; also what decoding inside the block raises.
    """
    from PIL import Image

    try:
        with open(os.open(path, _OPEN), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is no regular file")
            if found.st_size > HEADERS + 8 * values:  # no format of ours takes more for a value
                raise ValueError(f"{found.st_size} bytes are more than a picture of {values} values takes")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is `values`
                image = Image.open(file, formats=FORMATS)
            tiles = getattr(image, "tag_v2", {})
            if math.prod(_shape(image)) > values or any(tiles.get(tag, 0) > WIDEST_TILE for tag in _TILES):
                raise ValueError(f"{image.width} x {image.height} pixels are more than {values} values")
            yield image
    except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise DataError(str(path), f"is not a readable image ({error})") from None
