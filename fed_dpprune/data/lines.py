"""The lines of a text file of rows, one at a time and of bounded length: one row takes no memory by its own choice."""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedIOBase

LONGEST = 2**12  # bytes of a line; a row of the data sets that are read here has about 100


def lines(file: BufferedIOBase) -> Iterator[str]:
    """Each line that is not blank, as ASCII with replacement characters; one that is longer than LONGEST is "?".

    A line ends with a line feed and with nothing else, so a row cannot become two.

    Args:
        file: Open for reading bytes; packed ones are unpacked as they are read.
    """
    while start := file.readline(LONGEST + 1):
        rest = start
        while not rest.endswith(b"\n") and len(rest) > LONGEST:
            rest = file.readline(LONGEST + 1)
        line = "?" if rest is not start or len(start) > LONGEST else start.decode("ascii", "replace")
        if line.strip():
            yield line
