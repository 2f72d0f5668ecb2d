"""Layouts and work of torchvision's nets, remembered as JSON in FED_DPPRUNE_CACHE: the second `plan` needs no torch.

The key holds the versions of the libraries that make the net, so an upgrade makes a new entry. A cache that is damaged, that
cannot be written or that others can write (`places`) is no error: the layout is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from fed_dpprune.models.flat import Tensor, Work
from fed_dpprune.models.spec import ModelSpec
from fed_dpprune.places import cache_root, private_folder, read_alone, require_alone
from fed_dpprune.records import write_atomically

MAKERS = ("torch", "torchvision", "opacus", "fed-dpprune")


Parts = tuple[tuple[Tensor, ...], Work | None]


def parts(spec: ModelSpec, make: Callable[[], Parts]) -> Parts:
    """The tensors of a net (none frozen) and its work, from the cache or from `make`."""
    path = _path(spec)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        require_alone(path.parent)
        return _read(json.loads(read_alone(path)))
    made = make()
    tensors, work = made
    row = {"tensors": [asdict(tensor) for tensor in tensors], "work": None if work is None else asdict(work)}
    with contextlib.suppress(OSError):
        private_folder(path.parent)
        write_atomically(path, json.dumps(row))
    return made


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
