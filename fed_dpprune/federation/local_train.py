"""One client's private work of one round: local DP-SGD steps on the round's support.

Everything that depends on private examples passes through `_private_mean`; the optimiser sees released values only, so
momentum and weight decay are post-processing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.data.sampling import poisson
from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.federation.secrets import Secrets
from fed_dpprune.federation.terms import RoundTerms
from fed_dpprune.sparsity.recipe import RoundSupport
from fed_dpprune.sparsity.support import Support

if TYPE_CHECKING:
    from fed_dpprune.data.dataset import Examples
    from fed_dpprune.dpsgd.gradient import PrivateGradient


@dataclass(frozen=True)
class Share:
    """One client's part of the data.

    Attributes:
        examples: The data set's training examples.
        indices: This client's rows, shape (n,); n is private and enters no formula.
        nominal_size: The declared public size N_c, which does.
    """

    examples: Examples
    indices: NDArray[np.int64]
    nominal_size: int


def _private_mean(
    gradient: PrivateGradient,
    share: Share,
    terms: RoundTerms,
    step: int,
    clipping: Clipping,
    secrets: Secrets,
    count: int,
) -> NDArray[np.float64]:
    """The release of one step: (clipped sum + noise) / (q N_c) on `count` live coordinates, shape (count,).

    An empty batch is released like any other: noise alone. Source: methods 1, steps 1 to 6 (arXiv 1607.00133,
    Algorithm 1, with mask before clip from arXiv 2112.00845).
    """
    batch = share.indices[poisson(len(share.indices), terms.sample_rate, secrets.uniforms(terms, step))]
    x, y = share.examples.take(batch)
    total = np.asarray(gradient.clipped_sum(x, y, clipping), dtype=np.float64)
    noise = secrets.noise(terms, step).normal(count)
    total = total + terms.noise_multiplier * terms.clip_norm * noise
    return total / (terms.sample_rate * share.nominal_size)


def train(
    config: cfg.Config,
    terms: RoundTerms,
    live: RoundSupport,
    survivors: Support,
    weights: NDArray[np.float32],
    gradient: PrivateGradient,
    share: Share,
    secrets: Secrets,
) -> NDArray[np.float64]:
    """Run the round's local steps and return what moved.

    Args:
        config: The shared config (momentum, weight decay, order, rescale, clipping).
        terms: The checked and charged terms.
        live: The round's support and that of each step inside it.
        survivors: The support after pre-pruning; the norm's support in the clip-then-mask ablation.
        weights: The round's model, shape (d,); not changed.
        gradient: The gradient engine, whose support and weights are set here.
        share: The client's data.
        secrets: Its batches and noise.

    Returns:
        Local minus global weights on `live.support`, shape (k,). Coordinates that no step touched are exactly 0.
    """
    clipping = Clipping(terms.clip_norm, config.privacy.clipping)
    wide = survivors if config.sparsity.order == "clip-then-mask" else None
    local = weights.copy()
    velocity = np.zeros(live.support.k)
    for step in range(terms.steps):
        support = live.steps(step)
        place = slice(None) if support is live.support else support.within(live.support)
        gradient.set_weights(local)
        gradient.set_support(support, norm_over=wide)
        mean = _private_mean(gradient, share, terms, step, clipping, secrets, support.k)
        if config.sparsity.rescale == "d-over-k" and support.k:
            mean *= support.d / support.k
        now = local[support.indices].astype(np.float64)
        velocity[place] = config.client.momentum * velocity[place] + mean + config.client.weight_decay * now
        local[support.indices] = (now - terms.learning_rate * velocity[place]).astype(np.float32)
    index = live.support.indices
    return local[index].astype(np.float64) - weights[index].astype(np.float64)
