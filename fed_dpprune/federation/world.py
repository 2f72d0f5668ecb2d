"""What the server makes before the first message: the pruned model, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.data.dataset import Dataset
from fed_dpprune.data.public import load_public
from fed_dpprune.federation import start
from fed_dpprune.federation.start import Start, Vector
from fed_dpprune.federation.strategy import World
from fed_dpprune.models import registry
from fed_dpprune.models import weights as initial_weights
from fed_dpprune.models.flat import Layout
from fed_dpprune.models.spec import from_config
from fed_dpprune.sparsity.criteria.table import CriterionContext
from fed_dpprune.sparsity.prune import pre_prune


def build_world(config: cfg.Config, layout: Layout, dataset: Dataset) -> World:
    """The run's beginning on the server: initial weights, pre-pruning (scores computed here, once), evaluation.

    One torch thread throughout: sums must not depend on the number of cores.

    Raises:
        ConfigError: Pre-pruning leaves a layer empty, or needs what is not there.
    """
    import torch

    torch.set_num_threads(1)
    spec = from_config(config.model, dataset.input_shape, dataset.classes)
    begun = initial_weights.start(spec, layout, config.seed)
    context = CriterionContext(
        layout=layout,
        weights=begun.vector,
        build=lambda: registry.build(spec),
        input_shape=dataset.input_shape,
        seed=config.seed,
        public=load_public(config.data.public, dataset, config.seed, config.data.test_fraction) if config.data.public else None,
        weights_provenance="public" if config.model.weights else "data-free",
    )
    survivors = pre_prune(config.sparsity.prune, context, config.sparsity.granularity)
    begin = Start(start.starting_model(config, layout, begun.vector, survivors), survivors)
    odds = None
    if config.sparsity.freeze.method == "random" and config.sparsity.freeze.odds == "layer-energy":
        odds = _odds(context)
    by_public = "public" in (config.sparsity.freeze.method, config.sparsity.drop.method)
    scores = _scores(context) if by_public else None
    notes = dataset.notes + tuple(f"{name} starts from a fresh draw" for name in begun.fresh)
    return World(config, layout, begin, _evaluator(config, layout, dataset), odds, scores, notes)


def _odds(context: CriterionContext) -> Callable[[Vector, int], tuple[int, ...]]:
    """Inclusion odds from the released weights of a round; data-free."""
    from fed_dpprune.sparsity.odds import layer_odds

    return lambda weights, round: tuple(int(o) for o in layer_odds(replace(context, weights=weights), round))


def _scores(context: CriterionContext) -> Callable[[Vector], NDArray[np.float64]]:
    """Gradient magnitudes on public data at the released weights of a round."""
    from fed_dpprune.sparsity.criteria.table import criterion

    return lambda weights: criterion("gradient").scores(replace(context, weights=weights))


def _evaluator(config: cfg.Config, layout: Layout, dataset: Dataset) -> Callable[[Vector], tuple[float, float]]:
    from fed_dpprune.models import vector
    from fed_dpprune.models.evaluate import accuracy_and_loss

    module = registry.build(from_config(config.model, dataset.input_shape, dataset.classes))

    def evaluate(weights: Vector) -> tuple[float, float]:
        vector.load(module, layout, weights)
        return accuracy_and_loss(module, dataset.test)

    return evaluate
