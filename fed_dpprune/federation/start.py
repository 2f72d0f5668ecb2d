"""The model a run starts from, and how much of it a client can make itself.

Initial weights come from our own public stream and random supports too: both ends make them and nothing is sent. Scores
that depend on floating point (SynFlow, SNIP, magnitudes of pretrained weights) differ between machines, so the server
computes the support once and ships it packed; weights read from a file are shipped as values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.models import initial
from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.prune import pruned, trainable
from fed_dpprune.sparsity.support import Support

Vector = NDArray[np.float32]


def mask_is_public(config: cfg.Config) -> bool:
    """Whether a client can recompute the support after pre-pruning from public terms."""
    return config.sparsity.prune.method in ("none", "random")


def weights_are_public(config: cfg.Config) -> bool:
    """Whether a client can recompute the initial weights from public terms."""
    return not config.model.weights


def starting_model(config: cfg.Config, layout: Layout, weights: Vector, survivors: Support) -> Vector:
    """Initial weights with what pre-pruning removed set to zero, or held, as `prune.inactive` says; shape (d,)."""
    if config.sparsity.prune.inactive == "hold":
        return weights
    model = weights.copy()
    model[pruned(survivors, layout).indices] = 0.0
    return model


def join_carries_all(config: cfg.Config, layout: Layout) -> bool:
    """Whether a join needs the values of every coordinate: the client can make neither the weights nor what is held."""
    held = config.sparsity.prune.inactive == "hold" or trainable(layout).k < layout.d
    return held and not weights_are_public(config)


def join_positions(config: cfg.Config, layout: Layout, survivors: Support) -> NDArray[np.int64]:
    """Coordinates whose values a join carries, ascending."""
    return np.arange(layout.d, dtype=np.int64) if join_carries_all(config, layout) else survivors.indices


@dataclass(frozen=True)
class Start:
    """The beginning of a run on one end.

    Attributes:
        model: Shape (d,), pruned.
        survivors: What pre-pruning left, without tensors that the user froze whole: all that may ever move.
    """

    model: Vector
    survivors: Support


def public_weights(layout: Layout, seed: int) -> Vector:
    """The initial weights that both ends draw, shape (d,)."""
    return initial.draw(layout, seed)
