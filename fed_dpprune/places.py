"""Where files are looked for and where what can be made again is kept. Standard library only.

`FED_DPPRUNE_DATA` is the root of the user's data sets (torchvision-style); it is only ever read. `FED_DPPRUNE_CACHE` holds
what may be deleted at any time: unpacked data, calibrations, compiled kernels; its default is `~/.cache/fed-dpprune`.
"""

from __future__ import annotations

import os
from pathlib import Path


def data_root() -> Path | None:
    """The folder that `FED_DPPRUNE_DATA` names, or None when it is unset."""
    root = os.environ.get("FED_DPPRUNE_DATA", "")
    return Path(root).expanduser() if root else None


def cache_root() -> Path:
    """The folder that `FED_DPPRUNE_CACHE` names, else `~/.cache/fed-dpprune`; it may not exist yet."""
    root = os.environ.get("FED_DPPRUNE_CACHE", "")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "fed-dpprune"
