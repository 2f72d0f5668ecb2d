"""Figures kept between processes: an epsilon is computed once per distinct history, not once per command or client.

One small JSON file per family of figures in `accounting/` under `places.cache_root()`. It may be deleted at any time. A
file that cannot be read, does not match its own checksum, or could have been written by somebody else is ignored; a
directory that cannot be written is too. Values are Python floats, which JSON carries to the last bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fed_dpprune import places


def _checksum(family: str, values: Mapping[str, float]) -> str:
    return hashlib.sha256(json.dumps([family, dict(values)], sort_keys=True).encode()).hexdigest()


class Figures:
    """The files of one directory.

    Args:
        directory: Where they lie; by default `accounting` under the cache. It is made with mode 0700.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    def _path(self, family: str) -> Path:
        directory = self._directory if self._directory is not None else places.cache_root() / "accounting"
        return directory / f"{hashlib.sha256(family.encode()).hexdigest()[:32]}.json"

    def read(self, family: str) -> dict[str, float]:
        """All figures of a family; empty when there are none that can be trusted."""
        path = self._path(family)
        try:
            # A smaller epsilon in a forged file would be a larger budget: what others may write is not read.
            places.require_alone(path.parent)
            content: Any = json.loads(places.read_alone(path))
            values = content["values"]
            if content["family"] != family or content["checksum"] != _checksum(family, values):
                return {}
            return {str(key): float(value) for key, value in values.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def add(self, family: str, values: Mapping[str, float]) -> None:
        """Add figures to a family, in one atomic replacement; silently nothing when that is impossible."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        merged = {**self.read(family), **finite}
        path = self._path(family)
        content = {"family": family, "values": merged, "checksum": _checksum(family, merged)}
        with contextlib.suppress(OSError):
            places.private_folder(path.parent)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".figures-")
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file)
                os.replace(temporary, path)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
