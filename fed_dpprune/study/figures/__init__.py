"""One figure per file, each a function `draw(run, path)` listed in table.py.

A figure reads records only and is the same picture, to the byte, for the same records. Axes carry units, epsilon never
stands without its delta, and lines differ in marker or style as well as in colour.
Read first: style.py (palette, sizes, how a picture is written), then curves.py.
"""
