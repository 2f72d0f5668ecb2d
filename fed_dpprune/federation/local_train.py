"""One client's private work of one round: local DP-SGD steps on the round's support.

Everything that depends on private examples passes through `_clipped_sum`, and from there through the noise of `_descent`;
the optimiser sees released values only, so momentum and weight decay are post-processing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.data.sampling import poisson
from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.descent import Descent
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


def _clipped_sum(
    gradient: PrivateGradient, share: Share, terms: RoundTerms, step: int, clipping: Clipping, secrets: Secrets
) -> NDArray[Any]:
    """The clipped sum of one step's Poisson batch on the live coordinates; nothing but noise may be done with it."""
    batch = share.indices[poisson(len(share.indices), terms.sample_rate, secrets.uniforms(terms, step))]
    x, y = share.examples.take(batch)
    return gradient.clipped_sum(x, y, clipping)


def _descent(config: cfg.Config, terms: RoundTerms, share: Share, support: Support) -> Descent:
    """The release (clipped sum + noise) / (q N_c), and the step along it.

    The noise: standard deviation sigma * C on the sum at every live coordinate, whatever the batch holds, an empty one
    too. Source: methods 1, steps 1 to 6 (arXiv 1607.00133, Algorithm 1, with mask before clip from arXiv 2112.00845).
    """
    return Descent(
        noise_scale=terms.noise_multiplier * terms.clip_norm,
        divisor=terms.sample_rate * share.nominal_size,
        rescale=support.d / support.k if config.sparsity.rescale == "d-over-k" and support.k else 1.0,
        rate=terms.learning_rate,
        decay=config.client.weight_decay,
        momentum=config.client.momentum,
    )


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
    velocity = np.zeros(live.support.k) if config.client.momentum else None
    gradient.set_weights(weights)  # once: what no step moves stands still
    for step in range(terms.steps):
        support = live.steps(step)
        gradient.set_support(support, norm_over=wide)
        place = slice(None) if support is live.support else support.within(live.support)
        speed = None if velocity is None else velocity[place]
        total = _clipped_sum(gradient, share, terms, step, clipping, secrets)
        with gradient.live_values() as values:
            _descent(config, terms, share, support).step(values, total, secrets.noise(terms, step), speed)
        if velocity is not None and support is not live.support:
            velocity[place] = speed
    after = gradient.weights_on(live.support)
    return after.astype(np.float64) - weights[live.support.indices].astype(np.float64)
