"""Data sets by name, who holds which row, public data, and which rows a step looks at.

Lives here: one file per data set, `registry.py` (name -> file), `partition.py` (clients' rows, drawn once), `public.py`,
`sampling.py` (Poisson batches). Does not live here: nets, anything that learns. Nothing here imports torch at the top.
Read first: `dataset.py` (what a data set is), then `registry.py`.
"""
