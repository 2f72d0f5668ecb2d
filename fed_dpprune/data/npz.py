"""A user's own `.npz`: x_train, y_train, x_test, y_test. uint8 features are scaled to [-1, 1], floats are taken as they are.

Shapes: N x F, N x H x W, or N x H x W x C. Labels are integers from 0. Members that were stored without compression
(`numpy.savez`) are memory-mapped, so that several processes share the pages. Pickled objects are never loaded. An optional
`classes` (one integer) declares the number of classes: needed where one file, for example a single client's, lacks the last.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.data.dataset import PIXELS, Dataset, Examples, Labels
from fed_dpprune.errors import DataError

KEYS = ("x_train", "y_train", "x_test", "y_test")
CHANNELS = (1, 2, 3, 4)
LOCAL_HEADER = 30  # bytes of a zip member's local header before its name (PKWARE APPNOTE 4.3.7)
PICKLED = "holds pickled objects, which are never loaded"
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def load(data: config.Data, seed: int) -> Dataset:
    """The data set of the file that `data.dataset` names, relative to the working directory."""
    return load_file(data.dataset, data.dataset)


def labels(data: config.Data, seed: int) -> Labels:
    """Labels and shapes; of the features only the header is read."""
    return labels_file(data.dataset)


def load_file(file: str | Path, name: str, notes: tuple[str, ...] = ()) -> Dataset:
    """Read and check one file.

    Raises:
        DataError: The file is missing or not an .npz; a key is missing; a type, shape or label does not fit.
    """
    arrays = {key: read_member(Path(file).expanduser(), key) for key in KEYS}
    train, test = (_examples(arrays, part, str(file)) for part in ("train", "test"))
    classes = _classes(Path(file).expanduser(), max(int(train.y.max()), int(test.y.max())))
    return Dataset(name, train, test, classes, train.shape, notes=notes)


def labels_file(file: str | Path) -> Labels:
    """What `plan` may read of one file. See `load_file` for errors."""
    path = Path(file).expanduser()
    y_train, y_test = (_labels(read_member(path, key), key, str(file)) for key in ("y_train", "y_test"))
    x_train = _blank(path, "x_train")
    shape = tuple(channels_first(x_train, "x_train", str(file)).shape[1:])
    _same_length(x_train, y_train, "train", str(file))
    if not (y_train.size and y_test.size):
        raise DataError(str(file), "has no rows in y_train or y_test")
    classes = _classes(path, int(max(y_train.max(), y_test.max())))
    return Labels(y_train, classes, shape, None, int(y_test.size))


def _classes(path: Path, highest: int) -> int:
    """The number that the file declares, else one more than the highest label it holds."""
    with zipfile.ZipFile(path) as archive:
        if "classes.npy" not in archive.namelist():
            return highest + 1
    declared = read_member(path, "classes")
    if declared.size != 1 or declared.dtype.kind not in "iu" or int(declared.reshape(())) <= highest:
        raise DataError(str(path), f"classes is not a whole number above the highest label {highest}", "save classes=10, say")
    return int(declared.reshape(()))


def read_member(path: Path, key: str) -> NDArray[Any]:
    """One array of the file: a read-only memory map when stored uncompressed, else read into memory."""
    with _opened(path, key) as (archive, member):
        mapped = _map(path, member) if member.compress_type == zipfile.ZIP_STORED else None
        if mapped is not None:
            return mapped
        with archive.open(member) as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _blank(path: Path, key: str) -> NDArray[Any]:
    """An array of the shape and type that the header of a member names, holding nothing."""
    with _opened(path, key) as (archive, member), archive.open(member) as file:
        header = _header(file)
    if header is None:
        return read_member(path, key)
    shape, _, dtype = header
    if dtype.hasobject:
        raise DataError(str(path), f"{key} {PICKLED}", "save plain numbers")
    return np.broadcast_to(np.zeros((), dtype), shape)


@contextlib.contextmanager
def _opened(path: Path, key: str) -> Iterator[tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
    """The archive and the member of one array; whatever goes wrong inside becomes one clear line."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")  # a pipe would make it wait
        with zipfile.ZipFile(path) as archive:
            if f"{key}.npy" not in archive.namelist():
                found = ", ".join(sorted(n.removesuffix(".npy") for n in archive.namelist())) or "nothing"
                raise DataError(str(path), f"holds no {key} (it holds {found})", f"save {', '.join(KEYS)}")
            yield archive, archive.getinfo(f"{key}.npy")
    except FileNotFoundError:
        raise DataError(str(path), "no such file", "paths are relative to the working directory") from None
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        if "pickle" in str(error) or "Object arrays" in str(error):
            raise DataError(str(path), f"{key} {PICKLED}", "save plain numbers") from None
        raise DataError(str(path), f"cannot be read as an .npz ({error})", "write it with numpy.savez") from None


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]] | None:
    """Shape, Fortran order and type of the array that begins here; None where the header is of a newer kind."""
    read = _READ_HEADER.get(np.lib.format.read_magic(file))
    return None if read is None else read(file)


def _map(path: Path, member: zipfile.ZipInfo) -> NDArray[Any] | None:
    """A memory map of an uncompressed member; None where the array has no rows or the header is of a newer kind."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        local = file.read(LOCAL_HEADER)
        name_length, extra_length = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
        file.seek(member.header_offset + LOCAL_HEADER + name_length + extra_length)
        header, offset = _header(file), file.tell()
    if header is None:
        return None
    shape, fortran, dtype = header
    if dtype.hasobject or not all(shape):
        return None  # the plain reader refuses the first and makes an empty array of the second
    if offset + dtype.itemsize * int(np.prod(shape)) > path.stat().st_size:
        raise ValueError("the file is cut short")
    return np.memmap(path, dtype, "r", offset, shape, order="F" if fortran else "C")


def _labels(y: NDArray[Any], key: str, where: str) -> NDArray[np.int64]:
    if y.ndim != 1:
        raise DataError(where, f"{key} has shape {y.shape}", "labels are one integer per row")
    if y.dtype.kind not in "iu":
        raise DataError(where, f"{key} is of type {y.dtype}", "labels are integers from 0")
    numbers = np.asarray(y).astype(np.int64)
    if numbers.size and int(numbers.min()) < 0:
        raise DataError(where, f"{key} holds a negative label", "labels are integers from 0")
    return numbers


def channels_first(x: NDArray[Any], key: str, where: str) -> NDArray[Any]:
    """N x F as it is; N x H x W gets one channel; N x H x W x C a channels-first view."""
    if x.ndim not in (2, 3, 4) or not all(x.shape[1:]):
        raise DataError(where, f"{key} has shape {x.shape}", "use N x F, N x H x W or N x H x W x C")
    if x.ndim == 2:
        return x
    if x.ndim == 3:
        return x[:, None]
    if x.shape[3] not in CHANNELS:
        raise DataError(where, f"{key} has shape {x.shape}, so {x.shape[3]} channels", "put the channels last: N x H x W x C")
    return x.transpose(0, 3, 1, 2)


def _same_length(x: NDArray[Any], y: NDArray[np.int64], part: str, where: str) -> None:
    if x.shape[:1] != y.shape:
        raise DataError(where, f"x_{part} has {x.shape[0]} rows but y_{part} has {y.shape[0]}", "one label per row")


def _examples(arrays: dict[str, NDArray[Any]], part: str, where: str) -> Examples:
    x, y = arrays[f"x_{part}"], _labels(arrays[f"y_{part}"], f"y_{part}", where)
    x = channels_first(x, f"x_{part}", where)
    _same_length(x, y, part, where)
    if not y.size:
        raise DataError(where, f"x_{part} has no rows")
    if x.dtype == np.uint8:
        return Examples(x, y, PIXELS)
    if x.dtype.kind != "f":
        raise DataError(where, f"x_{part} is of type {x.dtype}", "use uint8 (scaled to [-1, 1]) or floats (taken as they are)")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused below
        floats = x.astype(np.float32, copy=False)
    if not np.isfinite(floats).all():
        raise DataError(where, f"x_{part} holds a value that is not finite (NaN, infinite, or beyond float32)", "clean it first")
    return Examples(floats, y)
