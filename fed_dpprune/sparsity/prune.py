"""Pre-pruning: once, before training, down to an exact count (arXiv 2306.11754). torch only where a criterion needs it.

The server prunes once and ships the support packed; `none` and `random` can be drawn anywhere. Exact counts come from
ordering with ties to the lower position, never from a threshold, which prunes every tied score at once.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config
from fed_dpprune.errors import ConfigError
from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.sparsity import files, groups
from fed_dpprune.sparsity.criteria.table import Criterion, CriterionContext, criterion
from fed_dpprune.sparsity.support import Support, from_mask, frozen_count, largest, weakest

EXEMPT_WORDS = ("bias", "norm", "embedding", "other", "head")


def _mask(layout: Layout, wanted: list[bool]) -> NDArray[np.bool_]:
    """Shape (d,), True on the tensors wanted."""
    return np.repeat(np.asarray(wanted, dtype=np.bool_), [t.size for t in layout.tensors])


def _prunable_tensor(tensor: Tensor, exempt: tuple[str, ...]) -> bool:
    return not (tensor.frozen or tensor.kind in exempt or (tensor.head and "head" in exempt))


def trainable(layout: Layout) -> Support:
    """Every coordinate but those of tensors that the user froze by name."""
    return from_mask(_mask(layout, [not t.frozen for t in layout.tensors]))


def prunable(layout: Layout, exempt: tuple[str, ...]) -> NDArray[np.bool_]:
    """Shape (d,), True where pruning may remove.

    Args:
        layout: Coordinate order of the net.
        exempt: Words of EXEMPT_WORDS: kinds of tensors, and `head` for the classifier's weight and bias.

    Raises:
        ConfigError: An unknown word.
    """
    for word in exempt:
        if word not in EXEMPT_WORDS:
            raise ConfigError("sparsity.prune.exempt", f"{word!r} is no group of tensors", f"use {', '.join(EXEMPT_WORDS)}")
    return _mask(layout, [_prunable_tensor(t, exempt) for t in layout.tensors])


def _pools(layout: Layout, scope: str, candidates: Support) -> list[Support]:
    """The supports that each get a budget of their own: all at once, or tensor by tensor."""
    if scope == "global":
        return [candidates]
    edges = np.searchsorted(candidates.indices, np.asarray(layout.offsets))
    return [Support(candidates.indices[a:b].copy(), candidates.d) for a, b in pairwise(edges) if b > a]


def _candidates(prune: config.Prune, layout: Layout) -> Support:
    mask = prunable(layout, prune.exempt)
    if prune.rate > 0 and not mask.any():
        raise ConfigError("sparsity.prune.exempt", "no tensor of this net is left to prune", "exempt less")
    return from_mask(mask)


def survivors_count(prune: config.Prune, layout: Layout, granularity: str = "element") -> int:
    """How many coordinates survive, without scoring: exact, but for groups of unequal sizes the largest it can be.

    Raises:
        ConfigError: See `prunable`, and for method `file` see `files.load`.
    """
    living = trainable(layout)
    if prune.method == "none":
        return living.k
    if prune.method == "file":
        return from_file(prune, layout).k
    lost = 0
    for pool in _pools(layout, prune.scope, _candidates(prune, layout)):
        sizes = np.sort(groups.items(pool, layout, granularity).sizes)
        lost += int(sizes[: frozen_count(prune.rate, sizes.size)].sum())
    return living.k - lost


def from_file(prune: config.Prune, layout: Layout) -> Support:
    """The support of a file, without what the user froze by name; a `private` one is refused.

    Raises:
        ConfigError: The file is missing, damaged, of another net, or its support was learnt from private data.
    """
    support = files.load(Path(prune.file), layout)
    _refuse_private(support, "sparsity.prune.file")
    both = support.mask & trainable(layout).mask
    return from_mask(both, support.provenance)


def _refuse_private(support: Support, key: str) -> None:
    if support.provenance == "private":
        raise ConfigError(
            key, "the support was chosen by private data, which nobody charged", "use public data or a data-free criterion"
        )


def _keep(scores: NDArray[np.float64], pools: list[groups.Items], rate: float) -> NDArray[np.bool_]:
    """Shape (d,), True on what each pool keeps when `rate` of its items goes."""
    mask = np.zeros(scores.size, dtype=np.bool_)
    for pool in pools:
        count = pool.count - frozen_count(rate, pool.count)
        mask[pool.take(largest(pool.sums(scores[pool.outer.indices]), count), "random").indices] = True
    return mask


def _iterate(
    judge: Criterion, context: CriterionContext, pools: list[groups.Items], candidates: Support, rate: float
) -> NDArray[np.bool_]:
    """Keep (1 - rate)^(t / n) of the items after iteration t of n, each among the last one's survivors.

    Cumulative: what is out has score 0 and, with -1 here, stays behind every survivor of score 0 too.
    """
    if judge.scorer is None:
        return _keep(judge.scores(context), pools, rate)
    score, live, kept = judge.scorer(context), np.ones(context.layout.d, dtype=np.bool_), candidates.mask
    for step in range(1, context.iterations + 1):
        share = rate if step == context.iterations else 1 - (1 - rate) ** (step / context.iterations)
        kept = _keep(np.where(live, score(live), -1.0), pools, share)
        live = kept | ~candidates.mask
    score(live)  # refuses a net that the last iteration cut
    return kept


def pre_prune(prune: config.Prune, context: CriterionContext, granularity: str = "element") -> Support:
    """What survives pre-pruning: the chosen coordinates of the prunable tensors, and all exempt ones.

    Exactly floor(rate * n) of the n prunable items go, over all of them (`global`) or in each tensor (`layer`).

    Args:
        prune: The config's `sparsity.prune`.
        context: What criteria may look at; `prune.iterations` replaces the context's.
        granularity: The config's `sparsity.granularity`; the score of a group is the sum of its coordinates'.

    Returns:
        A support with the weakest provenance among the criterion's and, where it read weights, the weights'.

    Raises:
        ConfigError: Labelled scores without public data, weights learnt from private data, nothing to prune, a criterion
            that prunes step by step cut the net, or a bad file.
    """
    layout = context.layout
    if prune.method == "none":
        return trainable(layout)
    if prune.method == "file":
        return from_file(prune, layout)
    judge = criterion(prune.method)
    context = replace(context, iterations=prune.iterations)
    candidates = _candidates(prune, layout)
    pools = [groups.items(pool, layout, granularity) for pool in _pools(layout, prune.scope, candidates)]
    kept = _iterate(judge, context, pools, candidates, prune.rate)
    reads_weights = judge.needs != "nothing"
    provenance = weakest(judge.provenance, context.weights_provenance) if reads_weights else judge.provenance
    survivors = from_mask((kept & candidates.mask) | (trainable(layout).mask & ~candidates.mask), provenance)
    _refuse_private(survivors, "model.weights")
    return survivors


def drawn(prune: config.Prune, layout: Layout, seed: int, granularity: str = "element") -> Support:
    """What survives the methods `none` and `random`, which need nothing but shapes and the public seed.

    Raises:
        ConfigError: See `pre_prune`.
        ValueError: Another method.
    """
    if prune.method not in ("none", "random"):
        raise ValueError(f"method {prune.method!r} scores a net")
    return pre_prune(prune, CriterionContext.without_net(layout, seed), granularity)


def pruned(survivors: Support, layout: Layout) -> Support:
    """What pruning removed: trainable coordinates that do not survive (set to zero when `inactive = "zero"`)."""
    return from_mask(trainable(layout).mask & ~survivors.mask, survivors.provenance)


def emptied(survivors: Support, layout: Layout) -> list[str]:
    """Names of trainable tensors of which nothing survives: worth a note, and fatal unless another branch goes around."""
    counts = zip(layout.tensors, layout.counts(survivors.indices), strict=True)
    return [tensor.name for tensor, live in counts if tensor.size and not tensor.frozen and not live]
