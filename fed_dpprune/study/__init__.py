"""Looking at runs: many of one design (sweep), side by side (compare), as pictures (figures).

Reads run directories and the records in them, never models or data; runs are started through a function handed in.
Not here: how a run works (federation), what its files hold (records).
Read first: `compare.read_run`, the one place where a run directory becomes numbers.
"""
