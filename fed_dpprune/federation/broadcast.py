"""The downlink: what each client is sent so that it holds, to the bit, the model that the server holds.

A client is sent the start of the run once (`start`: what it cannot make itself), later only the values that changed
since the round it last saw (`sync`), and the whole pruned model when it is new (`join`) or has lost its state
(`resync`). Both ends recompute which coordinates changed; no index travels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.comm.codecs.table import codec
from fed_dpprune.comm.downlink import decode_sync, encode_join, encode_sync
from fed_dpprune.comm.masks import unpack_positions
from fed_dpprune.errors import WireError
from fed_dpprune.federation import start
from fed_dpprune.federation.model_store import model_digest
from fed_dpprune.federation.start import Vector
from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.support import Support, union

KINDS = ("start", "join", "sync", "resync")
METERED = {"start": "join", "join": "join", "sync": "sync", "resync": "resync"}


@dataclass(frozen=True)
class Parcel:
    """One client's downlink of one round: how, on what it builds, the missed rounds' inclusion odds, and the bytes."""

    kind: str
    base: str
    payload: bytes
    odds: tuple[int, ...] = ()


class Broadcast:
    """The server's side: which version each client holds, and the payload that brings it up to date.

    Version v is the model after v aggregated rounds; version 0 is the pruned start.
    """

    def __init__(self, config: cfg.Config, layout: Layout, begin: start.Start) -> None:
        self._config, self._layout = config, layout
        self._survivors = begin.survivors
        self.model = begin.model
        self.version = 0
        self.digests = [model_digest(begin.model)]
        self._changes: dict[int, tuple[Support, tuple[int, ...]]] = {}
        self.held: dict[int, int] = {}

    @property
    def digest(self) -> str:
        """Digest of the newest model."""
        return self.digests[-1]

    def advance(self, model: Vector, changed: Support, odds: tuple[int, ...] = ()) -> None:
        """A round was aggregated: `model` is the newest version, differing from the last on `changed` only.

        Args:
            model: Shape (d,).
            changed: The round's support.
            odds: The inclusion odds that the support was drawn by, if any.
        """
        self.version += 1
        self.model = model
        self.digests.append(model_digest(model))
        self._changes[self.version] = (changed, odds)
        oldest = min(self.held.values(), default=self.version)
        for version in [v for v in self._changes if v <= oldest]:
            del self._changes[version]

    def acknowledged(self, client: int, version: int) -> None:
        """The client answered from `version`, so it holds it."""
        self.held[client] = version

    def parcel(self, client: int, *, resync: bool = False) -> Parcel:
        """What `client` must be sent to hold the newest model."""
        base = self.held.get(client)
        if base is not None and not resync and self._recomputable(base):
            odds = tuple(o for v in range(base + 1, self.version + 1) for o in self._changes[v][1])
            return Parcel("sync", self.digests[base], self._sync(base), odds)
        if self.version == 0 and not resync:
            return Parcel("start", "", self._join(values=not start.weights_are_public(self._config)))
        return Parcel("resync" if resync else "join", "", self._join(values=True))

    def _recomputable(self, base: int) -> bool:
        """Whether a client at version `base` can redraw the supports of all rounds since.

        Supports by magnitude follow from the weights of their own round; a client that missed two rounds lacks those of
        the second.
        """
        sparsity = self._config.sparsity
        by_weights = "magnitude" in (sparsity.freeze.method, sparsity.drop.method)
        return self.version - base <= 1 or not by_weights

    def _sync(self, base: int) -> bytes:
        if base == self.version:
            return b""
        changed = union([self._changes[v][0] for v in range(base + 1, self.version + 1)])
        return encode_sync(self.model[changed.indices], codec("float32"))

    def _join(self, *, values: bool) -> bytes:
        mask = None if start.mask_is_public(self._config) else self._survivors.indices
        positions = start.join_positions(self._config, self._layout, self._survivors)
        blob = encode_join(mask, self._layout.d, None, codec("float32"))
        return blob + (encode_sync(self.model[positions], codec("float32")) if values else b"")

    def versions_held(self) -> set[str]:
        """Digests of every version that a client holds or is about to be given."""
        return {self.digests[v] for v in self.held.values()} | {self.digest}

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """For the checkpoint."""
        arrays: dict[str, NDArray[Any]] = {"model": self.model}
        for version, (support, _) in self._changes.items():
            arrays[f"changed-{version}"] = support.indices
        head = {
            "version": self.version,
            "digests": self.digests,
            "held": {str(client): version for client, version in self.held.items()},
            "odds": {str(version): list(odds) for version, (_, odds) in self._changes.items()},
        }
        return head, arrays

    def restore(self, head: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Continue from a checkpoint."""
        self.version, self.digests = head["version"], list(head["digests"])
        self.held = {int(client): version for client, version in head["held"].items()}
        self.model = arrays["model"]
        self._changes = {
            int(version): (Support(arrays[f"changed-{version}"], self._layout.d), tuple(odds))
            for version, odds in head["odds"].items()
        }


def receive_start(
    config: cfg.Config,
    layout: Layout,
    seed: int,
    survivor_count: int,
    recompute: Callable[[Vector], Support],
    blob: bytes,
    *,
    with_values: bool,
) -> start.Start:
    """The client's side of `start`, `join` and `resync`.

    Args:
        config: The shared config.
        layout: Coordinate order.
        seed: Root of the public streams.
        survivor_count: Size of the support after pre-pruning.
        recompute: Draws that support from public terms and the initial weights, where it is not sent.
        blob: The payload: packed mask where it is sent, then values where they are.
        with_values: Whether values are sent.

    Raises:
        WireError: The payload does not fit the config.
    """
    weights = start.public_weights(layout, seed) if start.weights_are_public(config) else np.zeros(layout.d, dtype=np.float32)
    plain = codec("float32")
    sent = layout.d if start.join_carries_all(config, layout) else survivor_count
    split = len(blob) - (plain.size(sent) if with_values else 0)
    with_mask = not start.mask_is_public(config)
    if split < 0 or (split and not with_mask):
        raise WireError("payload", "wrong-length")
    if with_mask:
        survivors = Support(unpack_positions(blob[:split], layout.d, survivor_count), layout.d, "data-free")
    else:
        survivors = recompute(weights)
    model = start.starting_model(config, layout, weights, survivors)
    if with_values:
        index = start.join_positions(config, layout, survivors)
        model = model.copy()
        model[index] = decode_sync(blob[split:], index.size, plain)
    return start.Start(model, survivors)


def receive_sync(weights: Vector, changed: Support, blob: bytes) -> Vector:
    """The client's side of `sync`: the newest model, shape (d,).

    Raises:
        WireError: The payload does not hold one value for each changed coordinate.
    """
    model = weights.copy()
    model[changed.indices] = decode_sync(blob, changed.k, codec("float32"))
    return model
