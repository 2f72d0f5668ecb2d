"""How our figures look: a palette for colour-blind readers, sizes for print, one way to write a PNG.

matplotlib is imported inside functions only. Figures are drawn on their own Agg canvas: no window system, no global state.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fed_dpprune.records import write_atomically

# Okabe and Ito's palette, in an order whose greys differ as well (Color Universal Design, 2008).
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
GREY = "#555555"
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 150
MOST_MARKERS = 25

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


@contextmanager
def canvas(width: float, height: float) -> Iterator[Any]:
    """A matplotlib Figure of `width` by `height` inches in our style, whatever the user's matplotlibrc says."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def write(figure: Any, path: Path) -> None:
    """Write the figure as a PNG in one step. Same figure, same bytes: no date goes in."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    write_atomically(path, image.getvalue())


def byte_scale(largest: float) -> tuple[float, str]:
    """(divisor, unit) that keep numbers up to `largest` bytes short; powers of 1000."""
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= divisor:
            return divisor, unit
    return 1.0, "bytes"


def mark_every(points: int) -> int:
    """Stride of the markers of a line with this many points."""
    return max(1, -(-points // MOST_MARKERS))
