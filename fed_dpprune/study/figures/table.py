"""The figures by name. A new one: its file, one line here; the shared test then draws it from a small run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fed_dpprune.study.figures import curves, frontier

FIGURES: Mapping[str, Callable[[Path, Path], None]] = {
    "curves": curves.draw,
    "frontier": frontier.draw,
}
