"""fed-dpprune: federated learning in which every update is private and sparse.

Lives here: the rooms of docs/architecture.md. Nothing heavy is imported at this level, so that `--help` and
a bad config answer at once. Read first: `plan.py` (every number known beforehand), then
`federation/strategy.py` (the round, server side) and `federation/local_train.py` (the round, client side).
"""

__version__ = "0.1.0"
