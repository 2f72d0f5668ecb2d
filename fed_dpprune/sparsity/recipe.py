"""A round's support from public terms: the same function on the server and on every client. numpy only.

Freeze first (random freeze, arXiv 2112.00845; parameter freezing, 2303.04612), then drop inside it, step by step
(parameter selection, 2303.04612; gradient dropping, 2306.11754). A support changes between optimiser steps only. The
round's support is the union of its steps' supports: nothing else can have moved, so it bounds the uplink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config, randomness
from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity import groups
from fed_dpprune.sparsity.schedule import freeze_rate, steps_differ
from fed_dpprune.sparsity.support import Support, draw_positions, frozen_count, largest, union, weakest

KEPT_STEPS = 8


@dataclass(frozen=True)
class RoundSupport:
    """What a round may move.

    Attributes:
        support: The round's support: what the uplink carries values for.
        steps: The support of local step 0, 1, ...; each lies inside `support`.
    """

    support: Support
    steps: Callable[[int], Support]


def fixed(support: Support) -> RoundSupport:
    """One support for every step: a shipped one, or a run without freeze and drop."""
    return RoundSupport(support, lambda step: support)


def recomputable(sparsity: config.Sparsity) -> bool:
    """Whether a client can make the round's support itself (index-free), given the current released weights.

    False when scores of public data choose, or the weights at the start of the run do: a client need not hold them, so
    the server ships the support packed.
    """
    freeze, drop = sparsity.freeze, sparsity.drop
    by_start_weights = freeze.method == "magnitude" and freeze.refresh == "run"
    return not {"public", "change"} & {freeze.method, drop.method} and not by_start_weights


def group(sparsity: config.Sparsity, client: int) -> int:
    """Whose support a client has where supports are not shared: its own, or that of all ids equal modulo the groups."""
    return client % sparsity.groups if sparsity.groups else client


def tensor_quotas(sizes: list[int], odds: list[int], keep: int, word: int) -> list[int]:
    """How many of `keep` items each tensor gets when an item's chance of inclusion is proportional to its tensor's odds.

    Expected counts are keep * size * odds / total, cut at the size (a tensor that would get more is taken whole and the
    rest is shared anew). They are rounded by systematic sampling (Madow 1949): one uniform start, then one item at every
    whole number of the running sum. So the total is exact, each quota is its expectation rounded up or down, and its mean
    over starts is the expectation: a bias of ten entries at an expected 0.2 lives in every fifth draw, not never.
    Integers throughout: equal on every machine.

    Args:
        sizes: Items per tensor.
        odds: Positive integers, one per tensor.
        keep: 0..sum(sizes).
        word: A uniform 64-bit integer, the start.
    """
    quotas = [0] * len(sizes)
    active = [t for t, size in enumerate(sizes) if size]
    while True:
        total = sum(sizes[t] * odds[t] for t in active)
        full = [t for t in active if keep * odds[t] >= total]
        if not full:
            break
        for t in full:
            quotas[t] = sizes[t]
            keep -= sizes[t]
        active = [t for t in active if t not in full]
    start, running, before = (word * total) >> 64, 0, 0
    for t in active:
        running += keep * sizes[t] * odds[t]
        upto = (running + start) // total
        quotas[t], before = upto - before, upto
    return quotas


def _draw_with_odds(
    items: groups.Items, keep: int, layout: Layout, odds: NDArray[np.int64], seed: int, stream: tuple[int | str, ...]
) -> NDArray[np.int64]:
    """`keep` items, uniform inside each tensor, with `tensor_quotas` between tensors; sorted."""
    members = items.by_tensor(layout)
    purpose, *ids = stream
    word = int(randomness.raw_u64(1, seed, str(purpose), *ids, "quotas")[0])
    quotas = tensor_quotas([m.size for m in members], [int(o) for o in odds], keep, word)
    parts = [
        place[draw_positions(place.size, quota, seed, str(purpose), *ids, tensor)]
        for tensor, (place, quota) in enumerate(zip(members, quotas, strict=True))
    ]
    return np.sort(np.concatenate(parts))


@dataclass(frozen=True)
class _Chooser:
    """Reduces a support by one rate; holds the public terms that all choices of a round share."""

    layout: Layout
    granularity: str
    seed: int
    client: int | None
    public_scores: NDArray[np.float64] | None

    def stream(self, *ids: int | str) -> tuple[int | str, ...]:
        return ("support", *ids) if self.client is None else ("client-support", self.client, *ids)

    def scores(self, method: str, outer: Support, weights: NDArray[np.float32] | None) -> tuple[NDArray[np.floating], str]:
        """Scores of the coordinates of `outer` and their provenance."""
        found = weights if method == "magnitude" else self.public_scores
        if found is None or found.shape != (outer.d,):
            wanted = "the released weights" if method == "magnitude" else "the server's scores"
            raise ValueError(f"method {method!r} needs {wanted}, shape ({outer.d},)")
        inside = found[outer.indices]
        return (
            (np.abs(inside), "data-free") if method == "magnitude" else (inside, "data-free" if method == "change" else "public")
        )

    def reduce(
        self,
        outer: Support,
        part: config.Freeze | config.Drop,
        rate: float,
        ids: tuple[int | str, ...],
        weights: NDArray[np.float32] | None,
        odds: NDArray[np.int64] | None = None,
    ) -> Support:
        """What lives of `outer` when `rate` of its items is taken away: an exact count of items."""
        method = part.method
        if method == "none":
            return outer
        among = groups.items(outer, self.layout, self.granularity)
        keep = among.count - frozen_count(rate, among.count)
        if method != "random":
            scores, provenance = self.scores(method, outer, weights)
            return among.take(largest(among.sums(scores), keep), weakest(outer.provenance, provenance))
        purpose, *rest = self.stream(*ids)
        if odds is None:
            return among.take(draw_positions(among.count, keep, self.seed, str(purpose), *rest), outer.provenance)
        chosen = _draw_with_odds(among, keep, self.layout, odds, self.seed, (purpose, *rest))
        return among.take(chosen, outer.provenance)


def _check_odds(odds: NDArray[np.int64] | None, sparsity: config.Sparsity, layout: Layout) -> NDArray[np.int64] | None:
    if sparsity.freeze.odds == "uniform" or sparsity.freeze.method != "random":
        return None
    if odds is None or odds.shape != (len(layout.tensors),) or odds.dtype.kind not in "iu" or bool(np.any(odds < 1)):
        raise ValueError(f"layer-energy odds must be {len(layout.tensors)} positive integers, one per tensor")
    return odds


def round_support(
    sparsity: config.Sparsity,
    survivors: Support,
    layout: Layout,
    seed: int,
    round: int,
    rounds: int,
    *,
    local_steps: int = 1,
    client: int | None = None,
    weights: NDArray[np.float32] | None = None,
    start_weights: NDArray[np.float32] | None = None,
    odds: NDArray[np.int64] | None = None,
    public_scores: NDArray[np.float64] | None = None,
) -> RoundSupport:
    """The support of a round and of each of its local steps, from public terms alone.

    Random choices use the stream `support` with ids (freeze | drop, round, step), those that do not apply being 0:
    `refresh = "run"` keeps one order of importance, so that a ramp gives nested supports; `round` and `step` draw from
    scratch. `magnitude` keeps the largest absolute released weights, compared exactly, ties to the lower position.

    Args:
        sparsity: The config's `sparsity`.
        survivors: What pre-pruning left; freeze and drop pool all of it.
        layout: Coordinate order of the net.
        seed: The run's PUBLIC seed.
        round: 1..rounds.
        rounds: Rounds of the run.
        local_steps: Local steps of the round.
        client: The client's number, required when `sparsity.shared` is false and ignored otherwise.
        weights: Released weights at the start of the round, shape (d,), for `magnitude`.
        start_weights: Released weights at the start of the run, shape (d,), for a `magnitude` freeze with
            `refresh = "run"`.
        odds: Positive integers per tensor, shape (tensors,), for `odds = "layer-energy"` (`sparsity.odds` makes them).
        public_scores: Scores from public data, shape (d,), for `public`; the server only.

    Raises:
        ValueError: Something that the config's methods need is missing or has the wrong shape.
    """
    if survivors.d != layout.d:
        raise ValueError(f"the survivors are of {survivors.d} coordinates, the layout has {layout.d}")
    if not sparsity.shared and client is None:
        raise ValueError("supports per client need the client's number")
    freeze, drop = sparsity.freeze, sparsity.drop
    own = None if sparsity.shared or client is None else group(sparsity, client)
    chooser = _Chooser(layout, sparsity.granularity, seed, own, public_scores)
    rate, tensor_odds = freeze_rate(freeze, round, rounds), _check_odds(odds, sparsity, layout)

    @lru_cache(maxsize=1)
    def frozen(slot: int, step: int) -> Support:
        scored = start_weights if freeze.refresh == "run" else weights
        return chooser.reduce(survivors, freeze, rate, ("freeze", slot, step), scored, tensor_odds)

    @lru_cache(maxsize=KEPT_STEPS)
    def step_support(step: int) -> Support:
        if not 0 <= step < local_steps:
            raise ValueError(f"step {step} is outside 0..{local_steps - 1}")
        slot = 0 if freeze.refresh == "run" else round
        outer = frozen(slot, step if freeze.refresh == "step" else 0)
        return chooser.reduce(outer, drop, drop.rate, ("drop", round, step), weights)

    if not steps_differ(sparsity):
        return fixed(step_support(0))
    if local_steps == 1:
        return RoundSupport(step_support(0), step_support)
    return RoundSupport(union(step_support(step) for step in range(local_steps)), step_support)


def drawn_live_by_round(
    sparsity: config.Sparsity, survivors: Support, layout: Layout, seed: int, rounds: int, local_steps: int
) -> list[int]:
    """The exact k of every round by drawing its support; for shared random supports with uniform odds only.

    Raises:
        ValueError: The supports depend on weights, public data, odds or the client, which are not known beforehand.
    """
    methods = {sparsity.freeze.method, sparsity.drop.method}
    if not sparsity.shared or sparsity.freeze.odds != "uniform" or methods - {"none", "random"}:
        raise ValueError("these supports are not known before the run")
    return [
        round_support(sparsity, survivors, layout, seed, round, rounds, local_steps=local_steps).support.k
        for round in range(1, rounds + 1)
    ]
