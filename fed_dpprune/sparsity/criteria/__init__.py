"""Who is important: one criterion per file, each giving every coordinate a score (larger = keep).

A criterion states NAME, NEEDS, PROVENANCE and `scores(context)`; `table.py` lists them and imports a file only when its
criterion is asked for, so that random and magnitude need no torch. Counting and choosing is `sparsity.prune`, not here.
Read first: `table.py`, then `magnitude.py`, the shortest.
"""
