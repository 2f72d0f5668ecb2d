"""Layouts and work of torchvision's nets, remembered as JSON in FED_DPPRUNE_CACHE: the second `plan` needs no torch.

The key holds the versions of the libraries that make the net, so an upgrade makes a new entry. A cache that is damaged, that
cannot be written or that others can write (`places`) is no error: the layout is made again. A net that does not fit its
input is remembered too, by each process for itself: to find that out again and again takes what building the net takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from fed_dpprune.errors import ConfigError
from fed_dpprune.models.flat import Tensor, Work
from fed_dpprune.models.spec import ModelSpec
from fed_dpprune.places import cache_root, private_folder, read_alone, require_alone
from fed_dpprune.records import write_atomically

MAKERS = ("torch", "torchvision", "opacus", "fed-dpprune")


Parts = tuple[tuple[Tensor, ...], Work | None]
T = TypeVar("T")
REMEMBERED = 256  # a name is one of torchvision's, but a process may meet many shapes

_counts: dict[Path, int] = {}
_misfits: dict[Path, tuple[str, str, str]] = {}


def counted(spec: ModelSpec, count: Callable[[], int]) -> int:
    """The number of a net's coordinates: remembered by this process, or of a layout in the cache, or from `count`.

    Raises:
        ConfigError: What `count` raised, now or the first time.
    """
    key = _path(spec)
    if key not in _counts:
        known = _stored(key)
        _keep(_counts, key, sum(tensor.size for tensor in known[0]) if known else _or_misfit(key, count))
    return _counts[key]


def _or_misfit(key: Path, make: Callable[[], T]) -> T:
    """What `make` gives, or its refusal, remembered."""
    if key in _misfits:
        raise ConfigError(*_misfits[key])
    try:
        return make()
    except ConfigError as error:
        _keep(_misfits, key, (error.what, error.why, error.fix))
        raise


def _keep(known: dict[Path, T], key: Path, value: T) -> None:
    known[key] = value
    while len(known) > REMEMBERED:
        del known[next(iter(known))]


def parts(spec: ModelSpec, make: Callable[[], Parts]) -> Parts:
    """The tensors of a net (none frozen) and its work, from the cache or from `make`.

    Raises:
        ConfigError: What `make` raised, now or the first time.
    """
    path = _path(spec)
    known = _stored(path)
    if known is not None:
        return known
    made = _or_misfit(path, make)
    tensors, work = made
    row = {"tensors": [asdict(tensor) for tensor in tensors], "work": None if work is None else asdict(work)}
    with contextlib.suppress(OSError):
        private_folder(path.parent)
        write_atomically(path, json.dumps(row))
    return made


def _stored(path: Path) -> Parts | None:
    """What the cache holds under this name; None where it cannot be read or believed."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        require_alone(path.parent)
        return _read(json.loads(read_alone(path)))
    return None


def _read(row: Any) -> Parts:
    tensors = tuple(Tensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in row["tensors"])
    return tensors, None if row["work"] is None else Work(**row["work"])


def _path(spec: ModelSpec) -> Path:
    key = json.dumps([spec.name, spec.input_shape, spec.classes, [_version(maker) for maker in MAKERS]])
    return cache_root() / "layouts" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
