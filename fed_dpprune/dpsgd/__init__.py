"""One private step: per-example gradients on a support, clipped, summed, noised.

Lives here: layer rules (`grad_sample/`), their backends and the compiled kernel, clipping, noise, the drop-in engine.
Not here: which coordinates live (`sparsity`), what a step costs (`privacy`), the loop over steps (`federation`).
Read first: `gradient.py` (PrivateGradient, the one interface), then `clipping.py` and `grad_sample/table.py`.
"""
