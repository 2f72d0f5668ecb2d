"""torchvision's image classification sets by name: found under FED_DPPRUNE_DATA, else downloaded where there is a network.

Read once through torchvision (which verifies its checksums) into an uncompressed .npz in the cache; after that neither
torch nor torchvision is imported. Nothing is ever written under FED_DPPRUNE_DATA.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.data import cached, npz
from fed_dpprune.data.dataset import Dataset, Labels
from fed_dpprune.errors import DataError
from fed_dpprune.places import cache_root, data_root, make_folder, private_folder, require_alone

COLOURS = (1, 3)
PICKLED = ("CIFAR10", "CIFAR100")  # classes of torchvision's that unpickle what they read
PATIENCE_S = 30.0  # a network that does not answer is no network
SMALL = 64  # pixels: what sets with images of many sizes are resized to, after a square crop


@dataclass(frozen=True)
class Entry:
    """How to ask torchvision for one set.

    Attributes:
        cls: Class in torchvision.datasets.
        train: Arguments of the training part.
        test: Arguments of the test part.
        files: What torchvision looks for in its root, for the line that says what is missing.
        resize: Whether images come in many sizes.
    """

    cls: str
    train: dict[str, Any] = field(default_factory=lambda: {"train": True})
    test: dict[str, Any] = field(default_factory=lambda: {"train": False})
    files: tuple[str, ...] = ()
    resize: bool = False


def _split(cls: str, files: tuple[str, ...], resize: bool = False) -> Entry:
    return Entry(cls, {"split": "train"}, {"split": "test"}, files, resize)


def _emnist(split: str) -> Entry:
    return Entry("EMNIST", {"split": split, "train": True}, {"split": split, "train": False}, ("EMNIST/raw/",))


TABLE: dict[str, Entry] = {
    "cifar10": Entry("CIFAR10", files=("cifar-10-python.tar.gz", "cifar-10-batches-py/")),
    "cifar100": Entry("CIFAR100", files=("cifar-100-python.tar.gz", "cifar-100-python/")),
    "kmnist": Entry("KMNIST", files=("KMNIST/raw/",)),
    "qmnist": Entry("QMNIST", files=("QMNIST/raw/",)),
    "emnist-balanced": _emnist("balanced"),
    "emnist-letters": _emnist("letters"),
    "emnist-digits": _emnist("digits"),
    "usps": Entry("USPS", files=("usps.bz2", "usps.t.bz2")),
    "svhn": _split("SVHN", ("train_32x32.mat", "test_32x32.mat")),
    "stl10": _split("STL10", ("stl10_binary.tar.gz", "stl10_binary/")),
    "pcam": _split("PCAM", ("pcam/",)),
    "gtsrb": _split("GTSRB", ("gtsrb/",), resize=True),
    "food101": _split("Food101", ("food-101/",), resize=True),
    "flowers102": _split("Flowers102", ("flowers-102/",), resize=True),
    "dtd": _split("DTD", ("dtd/",), resize=True),
    "imagenette": Entry("Imagenette", {"split": "train"}, {"split": "val"}, ("imagenette2/",), resize=True),
}


def load(data: config.Data, seed: int) -> Dataset:
    """The data set with torchvision's own test split."""
    name = data.dataset
    notes = (f"images cropped to a square and resized to {SMALL} x {SMALL}",) if TABLE[name].resize else ()
    return npz.load_file(cached.npz(name, lambda: _arrays(name)), name, notes)


def labels(data: config.Data, seed: int) -> Labels:
    """Labels and shapes; the first call unpacks the set."""
    return npz.labels_file(cached.npz(data.dataset, lambda: _arrays(data.dataset)))


def downloads() -> Path:
    """Where torchvision's own files go when they are fetched."""
    return cache_root() / "torchvision"


def find(name: str) -> Path | None:
    """One of the set's files under FED_DPPRUNE_DATA or among earlier downloads; None when there is none."""
    for root in (data_root(), downloads()):
        for word in TABLE[name].files:
            if root is not None and (root / word).exists():
                return root / word
    return None


def wanted(name: str) -> str:
    """What to put where, in one phrase."""
    return f"put torchvision's files ({', '.join(TABLE[name].files)}) into FED_DPPRUNE_DATA"


def download(name: str, cls: str, advice: str) -> None:
    """Let torchvision fetch the files of one of its classes that has a `train` argument.

    Raises:
        DataError: Offline, or the checksum does not fit.
    """
    for train in (True, False):
        _open(name, cls, downloads(), {"train": train, "download": True}, advice)


def _open(name: str, cls: str, root: Path, arguments: dict[str, Any], advice: str) -> Any:
    """One of torchvision's data sets, its chatter silenced, its errors in one line."""
    from torchvision import datasets

    patience = socket.getdefaulttimeout()
    try:
        if root == downloads():
            private_folder(root)
        if "download" in arguments:
            socket.setdefaulttimeout(PATIENCE_S)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return getattr(datasets, cls)(str(root), **arguments)
    except (RuntimeError, OSError, ImportError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"data.dataset = {name}", f"not found, and not downloaded ({reason})", advice) from None
    finally:
        socket.setdefaulttimeout(patience)


def _arrays(name: str) -> dict[str, NDArray[Any]]:
    """All four arrays, from the user's folder where it holds them, else from a download."""
    entry = TABLE[name]
    root = data_root()
    if root is not None:
        with contextlib.suppress(DataError):
            _refuse_pickles_of_others(name, entry, root)
            return dict(_parts(name, entry, root, {}))
        _bring_archives(entry, root)
    return dict(_parts(name, entry, downloads(), _fetching(entry)))


def _refuse_pickles_of_others(name: str, entry: Entry, root: Path) -> None:
    """Torchvision unpickles some sets, which runs what is in them: not from a folder that others can write.

    The packed file is still used then: it is copied into the cache, and its checksum decides.

    Raises:
        DataError: A file or folder is not this user's alone.
    """
    try:
        for folder in (root / word for word in entry.files if entry.cls in PICKLED and (root / word).is_dir()):
            for path in (folder, *folder.iterdir()):
                require_alone(path)
    except OSError as error:
        raise DataError(f"data.dataset = {name}", f"is not unpickled: {error}", wanted(name)) from None


def _fetching(entry: Entry) -> dict[str, Any]:
    import inspect

    from torchvision import datasets

    accepted = inspect.signature(getattr(datasets, entry.cls)).parameters
    return {"download": True} if {"download", "kwargs"} & set(accepted) else {}


def _bring_archives(entry: Entry, root: Path) -> None:
    """Packed files alone suffice: copy them to where torchvision may unpack them."""
    for word in entry.files:
        named = root / word
        for source in named.glob("*") if word.endswith("raw/") else [named]:
            target = downloads() / source.relative_to(root)
            if source.is_file() and not target.exists():
                make_folder(target.parent)
                shutil.copyfile(source, target)


def _parts(name: str, entry: Entry, root: Path, extra: dict[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    for part, arguments in (("train", entry.train), ("test", entry.test)):
        opened = _open(name, entry.cls, root, {**arguments, **extra}, wanted(name))
        x, y = _images(opened, entry.resize, name)
        yield f"x_{part}", x
        yield f"y_{part}", y - y.min() if name == "emnist-letters" else y  # its labels run from 1


def _images(opened: Any, resize: bool, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images, shape (N, H, W) or (N, H, W, C), and labels, shape (N,)."""
    stored = getattr(opened, "data", None)
    targets = next((getattr(opened, key) for key in ("targets", "labels") if hasattr(opened, key)), None)
    if stored is not None and targets is not None and np.asarray(stored).dtype == np.uint8:
        x, y = np.asarray(stored), np.asarray(targets)
        y = y[:, 0] if y.ndim == 2 else y  # QMNIST keeps writer and place beside the class
        if x.ndim == 4 and x.shape[1] in COLOURS and x.shape[3] not in COLOURS:
            x = x.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(x), y.astype(np.int64)
    rows = [(_pixels(image, resize), int(label)) for image, label in opened]
    if len({pixels.shape for pixels, _ in rows}) != 1:
        raise DataError(f"data.dataset = {name}", "holds images of different sizes", "make an .npz of one size")
    return np.stack([pixels for pixels, _ in rows]), np.array([label for _, label in rows], dtype=np.int64)


def _pixels(image: Any, resize: bool) -> NDArray[np.uint8]:
    picture = image if image.mode == "L" and not resize else image.convert("RGB")
    if resize:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((SMALL, SMALL))
    return np.asarray(picture, dtype=np.uint8)
