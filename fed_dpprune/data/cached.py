"""Data sets unpacked once into FED_DPPRUNE_CACHE, as uncompressed .npz files that every process maps.

A file appears complete or not at all (written beside its place, then renamed), so several processes may make it at once.
One that somebody else could have written is made again; a cache that others can write is refused (`places`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.errors import DataError
from fed_dpprune.places import cache_root, private_folder, why_not_alone

Arrays = Mapping[str, NDArray[Any]]
FORMAT = 1  # raise it when what is unpacked changes; old files are then left alone and may be deleted


def path(name: str) -> Path:
    """Where the unpacked form of `name` lies, or will lie."""
    return cache_root() / "data" / f"{name}.v{FORMAT}.npz"


def npz(name: str, make: Callable[[], Arrays]) -> Path:
    """The unpacked form of `name`, made by `make` (x_train, y_train, x_test, y_test) when it is not there yet.

    Raises:
        DataError: The cache is not this user's alone or cannot be written; and whatever `make` raises, with nothing left behind.
    """
    target = path(name)
    if _stands(target):
        return target
    arrays = make()
    try:
        private_folder(target.parent)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{name}.", suffix=".tmp")
    except OSError as error:
        raise _unwritable(error) from None
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, target)
    except OSError as error:
        raise _unwritable(error) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _stands(target: Path) -> bool:
    """Whether it is there and nobody else's work. Nobody else can change it afterwards, so it may be mapped by its name."""
    try:
        return not why_not_alone(target)
    except OSError:
        return False


def _unwritable(error: OSError) -> DataError:
    return DataError(str(cache_root()), f"the cache cannot be written ({error})", "set FED_DPPRUNE_CACHE to a writable folder")
