"""A picture of a partition: one bar per client, stacked by class. Imports matplotlib when it draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Okabe and Ito's colours for all kinds of colour vision, then the same again with a hatch.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
HATCHES = ("", "//", "..", "xx")
NAMED_CLASSES = 20
NAMED_CLIENTS = 40


def counts(parts: list[NDArray[np.int64]], y: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Rows of each class that each client holds, shape (clients, classes)."""
    return np.stack([np.bincount(y[part], minlength=classes) for part in parts])


def draw(parts: list[NDArray[np.int64]], y: NDArray[np.int64], classes: int, path: Path, title: str = "") -> None:
    """Write the picture; the suffix of `path` sets the format (.png, .svg, .pdf).

    Args:
        parts: Sorted row numbers of each client.
        y: Training labels, shape (N,).
        classes: Number of classes.
        path: File to write.
        title: Above the axes, for example the partition and its alpha.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = counts(parts, y, classes)
    figure = Figure(figsize=(min(12.0, 3.5 + 0.3 * len(parts)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bottom = np.zeros(len(parts), dtype=np.int64)
    for label in range(classes):
        colour, hatch = COLOURS[label % len(COLOURS)], HATCHES[label // len(COLOURS) % len(HATCHES)]
        bars = axes.bar(np.arange(len(parts)), table[:, label], bottom=bottom, label=str(label), color=colour)
        for bar in bars:
            bar.set(hatch=hatch, edgecolor="white", linewidth=0.5)
        bottom += table[:, label]
    axes.set_xlabel("client")
    axes.set_ylabel("training examples")
    axes.set_title(title)
    if len(parts) <= NAMED_CLIENTS:
        axes.set_xticks(np.arange(len(parts)))
    if classes <= NAMED_CLASSES:
        handles, names = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], names[::-1], title="class", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
