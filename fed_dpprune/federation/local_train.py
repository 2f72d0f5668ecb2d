"""One client's private work of one round: local DP-SGD steps on the round's support.

Everything that depends on private examples passes through `_clipped_sum`, and from there through the noise of `_descent`;
the optimiser sees released values only, so momentum and weight decay are post-processing. Weights that leave float32's
range are post-processing too: nothing here fails for them, and whoever encodes the result saturates it.
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
from fed_dpprune.models.flat import Layout
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


def _descent(config: cfg.Config, terms: RoundTerms, sensitivity: float, nominal_size: int, support: Support) -> Descent:
    """The release (clipped sum + noise) / (q N_c), and the step along it.

    The noise: standard deviation sigma times the sensitivity that the clipping declares, on the sum at every live
    coordinate, whatever the batch holds, an empty one too. Source: methods 1, steps 1 to 6 (arXiv 1607.00133, Algorithm 1,
    with mask before clip from arXiv 2112.00845).
    """
    return Descent(
        noise_scale=terms.noise_multiplier * sensitivity,
        divisor=terms.sample_rate * nominal_size,
        rescale=support.d / support.k if config.sparsity.rescale == "d-over-k" and support.k else 1.0,
        rate=terms.learning_rate,
        decay=config.client.weight_decay,
        momentum=config.client.momentum,
    )


@np.errstate(all="ignore")  # what leaves float32's range goes on as it is; it is noised already
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
        Local minus global weights on `live.support`, shape (k,); not finite where weights left float32's range.
        Coordinates that no step touched are exactly 0.
    """
    clipping = Clipping(terms.clip_norm, config.privacy.clipping)
    wide = survivors if config.sparsity.order == "clip-then-mask" else None
    velocity = np.zeros(live.support.k) if config.client.momentum else None
    sensitivity = clipping.sensitivity(gradient.layout)
    gradient.set_weights(weights)  # once: what no step moves stands still
    for step in range(terms.steps):
        support = live.steps(step)
        gradient.set_support(support, norm_over=wide)
        place = slice(None) if support is live.support else support.within(live.support)
        speed = None if velocity is None else velocity[place]
        total = _clipped_sum(gradient, share, terms, step, clipping, secrets)
        with gradient.live_values() as values:
            descent = _descent(config, terms, sensitivity, share.nominal_size, support)
            descent.step(values, total, secrets.noise(terms, step), speed)
        if velocity is not None and support is not live.support:
            velocity[place] = speed
    after = gradient.weights_on(live.support)
    return after.astype(np.float64) - weights[live.support.indices].astype(np.float64)


def noise_alone(
    config: cfg.Config,
    terms: RoundTerms,
    live: RoundSupport,
    weights: NDArray[np.float32],
    layout: Layout,
    nominal_size: int,
    secrets: Secrets,
) -> NDArray[np.float64]:
    """What `train` returns when every batch is empty, without engine or data: the release of a round that failed.

    Args:
        config: As in `train`, and the next three.
        terms: The checked and charged terms.
        live: The round's support and that of each step inside it.
        weights: The round's model, shape (d,); not changed.
        layout: Coordinate order.
        nominal_size: The declared public size N_c.
        secrets: The client's noise.

    Returns:
        Shape (k,), as `train`.
    """
    sensitivity = Clipping(terms.clip_norm, config.privacy.clipping).sensitivity(layout)
    before = weights[live.support.indices]
    after, velocity = before.copy(), np.zeros(live.support.k)
    with np.errstate(all="ignore"):
        for step in range(terms.steps):
            support = live.steps(step)
            place = np.arange(live.support.k) if support is live.support else support.within(live.support)
            values, speed = after[place], velocity[place]
            descent = _descent(config, terms, sensitivity, nominal_size, support)
            descent.step([values], np.zeros(support.k), secrets.noise(terms, step), speed)
            after[place], velocity[place] = values, speed
        return after.astype(np.float64) - before.astype(np.float64)
