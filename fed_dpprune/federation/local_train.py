"""One client's private work of one round: local DP-SGD steps on the round's support.

Everything that depends on private examples passes through `_release`; the optimiser sees released values only, so
momentum and weight decay are post-processing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.data.sampling import poisson
from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.descent import blocks, descend, noised_mean
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


def _release(
    gradient: PrivateGradient,
    share: Share,
    terms: RoundTerms,
    step: int,
    clipping: Clipping,
    secrets: Secrets,
    count: int,
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """The release of one step: (clipped sum + noise) / (q N_c) on `count` live coordinates, block by block: (place, values).

    Every live coordinate gets its own noise, drawn in float64, of standard deviation sigma * C on the sum. An empty batch is
    released like any other: noise alone. Source: methods 1, steps 1 to 6 (arXiv 1607.00133, Algorithm 1, with mask before
    clip from arXiv 2112.00845).
    """
    batch = share.indices[poisson(len(share.indices), terms.sample_rate, secrets.uniforms(terms, step))]
    x, y = share.examples.take(batch)
    total = gradient.clipped_sum(x, y, clipping)
    source = secrets.noise(terms, step)
    scale = terms.noise_multiplier * terms.clip_norm
    divisor = terms.sample_rate * share.nominal_size
    for block in blocks(count):
        noise = source.normal(block.stop - block.start)
        yield block, noised_mean(total[block], noise, scale, divisor)


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
    before = weights[live.support.indices]
    values, velocity = before.copy(), np.zeros(live.support.k) if config.client.momentum else None
    gradient.set_weights(weights)  # once: what a step does not move stands still
    for step in range(terms.steps):
        support = live.steps(step)
        place = None if support is live.support else support.within(live.support)
        now = values if place is None else values[place]
        speed = velocity if place is None or velocity is None else velocity[place]
        gradient.set_support(support, norm_over=wide)
        for block, mean in _release(gradient, share, terms, step, clipping, secrets, support.k):
            if config.sparsity.rescale == "d-over-k":
                mean *= support.d / support.k
            moving = None if speed is None else speed[block]
            descend(now[block], mean, terms.learning_rate, config.client.weight_decay, config.client.momentum, moving)
        gradient.set_live(now)
        if place is not None:
            values[place] = now
            if velocity is not None:
                velocity[place] = speed
    return values.astype(np.float64) - before.astype(np.float64)
