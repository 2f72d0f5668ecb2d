"""Layouts of torchvision's nets, remembered as JSON in FED_DPPRUNE_CACHE: the second `plan` needs no torch.

The key holds the versions of the libraries that make the net, so an upgrade makes a new entry. A damaged or unwritable
cache is no error: the layout is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from fed_dpprune.models.flat import Tensor
from fed_dpprune.models.spec import ModelSpec
from fed_dpprune.places import cache_root
from fed_dpprune.records import write_atomically

MAKERS = ("torch", "torchvision", "opacus", "fed-dpprune")


def tensors(spec: ModelSpec, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The tensors of a net (none frozen), from the cache or from `make`."""
    path = _path(spec)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return tuple(Tensor(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(path.read_text(encoding="utf-8")))
    made = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps([asdict(tensor) for tensor in made]))
    return made


def _path(spec: ModelSpec) -> Path:
    key = json.dumps([spec.name, spec.input_shape, spec.classes, [_version(maker) for maker in MAKERS]])
    return cache_root() / "layouts" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
