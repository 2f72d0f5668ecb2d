"""What lives, and when it changes: supports, pruning, freezing, dropping, their schedules and controls.

Here: which coordinates of the flat vector a round and a step may move, and the provenance of that choice. Not here:
privacy (a support buys no epsilon), the wire (`comm` packs supports), the nets. Everything but scoring a net is numpy.
Read first: `support.py` (the type), `recipe.py` (a round's support from public terms), `schedule.py` (how many live).
"""
