"""Nets by name, the flat order of their coordinates, their first weights, and how well they do.

Lives here: one file per net, `layers.py` (a net as a plain list, so that shapes need no torch), `flat.py` (coordinate
order), `initial.py` and `weights.py` (first values), `vector.py` (net <-> flat vector), `evaluate.py`. Does not live here:
training, supports, anything private. Read first: `flat.py`, then `registry.py`.
"""
