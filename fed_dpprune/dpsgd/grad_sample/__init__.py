"""One layer rule per file: from a layer's input and the gradient of its output to per-example gradients on the support.

Lives here: the rules, the table from layer type to rule, the fallback for every other layer, what a rule hands back.
Not here: hooks and the order of things (`layered.py`), clipping, noise.
Read first: `contribution.py` (what a rule hands back), then `table.py`, then `linear.py`.
"""
