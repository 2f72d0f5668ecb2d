"""Which coordinates live in a round, for both ends: what they recompute, and what has to be shipped.

Random supports, and those by magnitude of the released weights, follow from public terms; the client draws them itself.
Scores of public data are known to the server alone, and so is how far the model has come since its start: the support
they choose is shipped packed, and priced.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from fed_dpprune import config as cfg
from fed_dpprune.federation.start import Vector
from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.recipe import RoundSupport, fixed, group, round_support
from fed_dpprune.sparsity.schedule import steps_differ
from fed_dpprune.sparsity.support import Support, union, weakest

NOT_SHIPPED, OUTER, WHOLE = "", "outer", "whole"


def shipped_part(sparsity: cfg.Sparsity) -> str:
    """What of a round's support the server must send: nothing, the frozen support that drops are drawn in, or all of it."""
    if sparsity.drop.method == "public":
        return WHOLE
    return OUTER if sparsity.freeze.method in ("public", "change") else NOT_SHIPPED


# What a support made by each method can claim at best; a method without a row is an error, never the best claim. The mask
# of a file is packed into the message, and its word is the server's: a client can look at neither.
_BEST_CLAIM = {
    "none": "random",
    "random": "random",
    "file": "random",
    "magnitude": "data-free",
    "change": "data-free",
    "synflow": "data-free",
    "snip": "public",
    "public": "public",
}


def best_claim(config: cfg.Config) -> str:
    """The strongest provenance that supports of this config can have; terms that claim a stronger one are wrong."""
    sparsity = config.sparsity
    methods = (sparsity.prune.method, sparsity.freeze.method, sparsity.drop.method)
    return weakest(*(_BEST_CLAIM[method] for method in methods))


def changes_follow(sparsity: cfg.Sparsity, missed: int) -> bool:
    """Whether a client that missed `missed` rounds can tell by itself which coordinates they moved.

    Those by magnitude follow from the weights of their own round, which a client that missed two rounds lacks for the
    second. Supports per client follow once it is told who answered: a bit for each client and missed round.
    """
    by_weights = "magnitude" in (sparsity.freeze.method, sparsity.drop.method)
    return not shipped_part(sparsity) and (missed <= 1 or not by_weights)


def follows_from_clients(sparsity: cfg.Sparsity, missed: int) -> bool:
    """Whether it is who answered that tells which coordinates moved."""
    return missed > 0 and not sparsity.shared and changes_follow(sparsity, missed)


def draws_each(config: cfg.Config) -> int:
    """How many supports must be drawn to know what one client, or one round of shared supports, has moved."""
    return config.federation.local_steps if steps_differ(config.sparsity) else 1


def pack_clients(clients: Sequence[int]) -> bytes:
    """Who answered a round, as bits in little order; partition ids of 0 and up."""
    mask = np.zeros(max(clients, default=-1) + 1, dtype=np.uint8)
    mask[list(clients)] = 1
    return np.packbits(mask, bitorder="little").tobytes()


def unpack_clients(blob: bytes) -> tuple[int, ...]:
    """The partition ids, ascending."""
    return tuple(int(c) for c in np.flatnonzero(np.unpackbits(np.frombuffer(blob, dtype=np.uint8), bitorder="little")))


_drawn: OrderedDict[Hashable, RoundSupport] = OrderedDict()
_drawing = Lock()
LEAST, MOST, MOST_BYTES = 4, 64, 2**26  # supports remembered: with one for each client they are many; of a large net, few


def _drawn_once(terms: Hashable, draw: Callable[[], RoundSupport]) -> RoundSupport:
    """A support drawn from public terms, remembered for the other clients of this process (and the server, if it is here)."""
    with _drawing:
        found = _drawn.get(terms)
        if found is None:
            found = _drawn[terms] = draw()
        _drawn.move_to_end(terms)
        each = found.support.d + 8 * found.support.k  # mask and indices
        most = min(MOST, max(LEAST, MOST_BYTES // max(1, each)))
        while len(_drawn) > most:
            _drawn.popitem(last=False)
        return found


@dataclass(frozen=True)
class Supports:
    """The supports of a run.

    Attributes:
        config: The shared config.
        layout: Coordinate order.
        survivors: What pre-pruning left.
        seed: Root of the public streams.
    """

    config: cfg.Config
    layout: Layout
    survivors: Support
    seed: int

    def of(
        self,
        round: int,
        client: int,
        weights: Vector,
        *,
        odds: tuple[int, ...] = (),
        shipped: Support | None = None,
    ) -> RoundSupport:
        """A round's support, as both ends compute it.

        Args:
            round: Counts from 1.
            client: Partition id; matters only where supports are not shared.
            weights: The released model at the start of the round.
            odds: Inclusion odds per tensor, where the draw uses them.
            shipped: What the server sent of it, where `shipped_part` says that it must.
        """
        sparsity, fed = self.config.sparsity, self.config.federation
        part = shipped_part(sparsity)
        if part == WHOLE and shipped is not None:
            return fixed(shipped)
        outer = self.survivors
        if part == OUTER and shipped is not None:
            sparsity, outer = sparsity.model_copy(update={"freeze": cfg.Freeze()}), shipped

        def draw() -> RoundSupport:
            return round_support(
                sparsity,
                outer,
                self.layout,
                self.seed,
                round,
                fed.rounds,
                local_steps=fed.local_steps,
                client=client,
                weights=weights,
                odds=np.asarray(odds, dtype=np.int64) if odds else None,
            )

        if {sparsity.freeze.method, sparsity.drop.method} - {"none", "random"}:
            return draw()
        whose = None if sparsity.shared else group(sparsity, client)
        inside = (outer.digest, outer.provenance, self.layout.digest)
        return _drawn_once((sparsity, *inside, self.seed, round, fed.rounds, fed.local_steps, whose, odds), draw)

    def moved(self, round: int, clients: Collection[int], weights: Vector, *, odds: tuple[int, ...] = ()) -> Support:
        """What the updates of these clients may move together, where supports are not shared and none is shipped."""
        whose = sorted({group(self.config.sparsity, c) for c in clients})
        drawn = (self.of(round, client, weights, odds=odds).support for client in whose)
        return next(drawn) if len(whose) == 1 else union(drawn)

    def ship(self, round: int, weights: Vector, scores: np.ndarray) -> Support:
        """The server's side: what must be sent of a round's support, chosen by its scores, shape (d,)."""
        sparsity, fed = self.config.sparsity, self.config.federation
        if shipped_part(sparsity) == OUTER:
            sparsity = sparsity.model_copy(update={"drop": cfg.Drop()})
        return round_support(
            sparsity,
            self.survivors,
            self.layout,
            self.seed,
            round,
            fed.rounds,
            local_steps=fed.local_steps,
            weights=weights,
            public_scores=scores,
        ).support
