"""The downlink: what each client is sent so that it holds, to the bit, the model that the server holds.

A client is sent the start of the run once (`start`: what it cannot make itself), later only what changed since the round
it last saw: the values on the changed coordinates (`sync`), or the missed rounds' quantised releases one after the other
(`replay`), or the whole pruned model (`newest`), whichever is smallest; and the whole pruned model when it is new (`join`)
or has lost its state (`resync`).
Which coordinates changed is recomputed by the client wherever it can be (from who answered, a bit for each client, where
supports are not shared); else their positions travel, packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.comm.codecs.table import codec
from fed_dpprune.comm.downlink import MOST_KEPT, decode_sync, encode_join, encode_sync, join_replay, split_replay
from fed_dpprune.comm.feedback import Downlink
from fed_dpprune.comm.masks import pack_positions, unpack_positions
from fed_dpprune.errors import WireError
from fed_dpprune.federation import start
from fed_dpprune.federation.model_store import model_digest
from fed_dpprune.federation.start import Vector
from fed_dpprune.federation.supports import changes_follow, draws_each, follows_from_clients, pack_clients
from fed_dpprune.federation.uplink import dither
from fed_dpprune.models.flat import Layout
from fed_dpprune.sparsity.support import Support, union

KINDS = ("start", "join", "sync", "replay", "newest", "resync")
METERED = {"start": "join", "join": "join", "sync": "sync", "replay": "sync", "newest": "sync", "resync": "resync"}
PLAIN = "float32"
MOST_DRAWS = 4096  # supports that a client draws to play back what it missed; who needs more is sent the newest model


@dataclass(frozen=True)
class Parcel:
    """One client's downlink of one round.

    Attributes:
        kind: One of KINDS.
        base: Digest of the model that it builds on; empty where it builds on none.
        payload: The bytes: the shipped support where there is one, who answered, positions of what changed where they travel,
            values.
        odds: Inclusion odds of the missed rounds, one after the other.
        shipped: (coordinates, bytes) of the shipped support.
        changed: (coordinates, bytes) of the packed positions of what changed.
        answered: (missed rounds, bytes) of who answered in them; each round's part is of the same length.
    """

    kind: str
    base: str = ""
    payload: bytes = b""
    odds: tuple[int, ...] = ()
    shipped: tuple[int, int] = (0, 0)
    changed: tuple[int, int] = (0, 0)
    answered: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Change:
    """What one aggregated round moved: the coordinates, the odds they were drawn by, the quantised release, who answered."""

    support: Support
    odds: tuple[int, ...]
    blob: bytes
    clients: tuple[int, ...] = ()


@dataclass
class Broadcast:
    """The server's side: which version each client holds, and the payload that brings it up to date.

    Version v is the model after v aggregated rounds; version 0 is the pruned start.

    Attributes:
        config: The shared config.
        layout: Coordinate order.
        begin: The pruned start.
        model: The newest version, as every client will hold it.
        version: Its number.
        digests: Of all versions.
        held: The version that each client is known to hold.
    """

    config: cfg.Config
    layout: Layout
    begin: start.Start
    version: int = 0
    held: dict[int, int] = field(default_factory=dict)
    changes: dict[int, Change] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = self.begin.model
        self.digests = [model_digest(self.model)]
        self._made: dict[int, tuple[str, bytes, tuple[int, int]]] = {}
        wire = self.config.wire
        exact = wire.downlink == PLAIN
        self._release = None if exact else Downlink(codec(wire.downlink), self.layout.d, error_feedback=wire.error_feedback)

    @property
    def digest(self) -> str:
        """Digest of the newest model."""
        return self.digests[-1]

    def advance(self, wanted: Vector, support: Support, odds: tuple[int, ...] = (), clients: tuple[int, ...] = ()) -> None:
        """A round was aggregated. With a lossy downlink the server adopts what its clients will decode, nothing else.

        Args:
            wanted: The model that the optimiser arrived at, shape (d,).
            support: The coordinates that it moved.
            odds: The inclusion odds that they were drawn by, if any.
            clients: Whose updates were aggregated; needed where supports are not shared.
        """
        blob = b""
        if self._release is None:
            model = wanted
        else:
            index = support.indices
            bits = dither(self.config.wire, self.config.seed, "down", self.version)
            blob, applied = self._release.release(index, wanted[index] - self.model[index], bits=bits)
            model = self.model.copy()
            model[index] += applied
        self.version += 1
        self.model = model
        self._made.clear()
        self.digests.append(model_digest(model))
        self.changes[self.version] = Change(support, odds, blob, clients)
        self._forget(min(self.held.values(), default=self.version))

    def _forget(self, oldest: int) -> None:
        """Drop the changes that every client has, and the first ones beyond `MOST_KEPT`: a client may never come back."""
        for version in [v for v in self.changes if v <= oldest]:
            del self.changes[version]
        kept = sum(change.support.k for change in self.changes.values())
        for version in sorted(self.changes):
            if kept <= MOST_KEPT * self.begin.survivors.k:
                break
            kept -= self.changes.pop(version).support.k

    def acknowledged(self, client: int, version: int) -> None:
        """The client answered from `version`, so it holds it."""
        self.held[client] = version

    def parcel(self, client: int, *, shipped: Support | None = None, resync: bool = False) -> Parcel:
        """What `client` must be sent to hold the newest model and, where it cannot draw it, the round's support."""
        mask = b"" if shipped is None else pack_positions(shipped.within(self.begin.survivors), self.begin.survivors.k)
        size = (0, 0) if shipped is None else (shipped.k, len(mask))
        base = self.held.get(client)
        if base is not None and not resync:
            if base < self.version and (base + 1 not in self.changes or self._draws(base) > MOST_DRAWS):
                return Parcel("newest", "", mask + self._join(values=True), (), size)
            kind, body, positions = self._update(base)
            odds = tuple(o for v in self._missed(base) for o in self.changes[v].odds)
            told = self._told(base) if follows_from_clients(self.config.sparsity, len(self._missed(base))) else b""
            answered = (len(self._missed(base)) if told else 0, len(told))
            if len(told) + len(body) > self._whole:  # a mask of many missed rounds, or who answered in them, can be longer
                return Parcel("newest", "", mask + self._join(values=True), (), size)
            return Parcel(kind, self.digests[base], mask + told + body, odds, size, positions, answered)
        if self.version == 0 and not resync:
            return Parcel("start", "", mask + self._join(values=not start.weights_are_public(self.config)), (), size)
        return Parcel("resync" if resync else "join", "", mask + self._join(values=True), (), size)

    def _missed(self, base: int) -> range:
        return range(base + 1, self.version + 1)

    def _draws(self, base: int) -> int:
        """How many supports a client must draw to know what it missed."""
        each = [len(self.changes[v].clients) for v in self._missed(base)]
        drawn = sum(each) if follows_from_clients(self.config.sparsity, len(each)) else len(each)
        return drawn * draws_each(self.config)

    def _told(self, base: int) -> bytes:
        """Who answered in each missed round, every round's bits in the same number of bytes."""
        parts = [pack_clients(self.changes[v].clients) for v in self._missed(base)]
        width = max((len(part) for part in parts), default=0)
        return b"".join(part.ljust(width, b"\0") for part in parts)

    def _update(self, base: int) -> tuple[str, bytes, tuple[int, int]]:
        """(kind, bytes, packed positions) from version `base` to the newest: made once for all clients that hold `base`."""
        if base not in self._made:
            self._made[base] = self._make_update(base)
        return self._made[base]

    def _make_update(self, base: int) -> tuple[str, bytes, tuple[int, int]]:
        """The smaller of values and releases."""
        missed = [self.changes[v] for v in self._missed(base)]
        if not missed:
            return "sync", b"", (0, 0)
        changed = union([change.support for change in missed])
        follows = changes_follow(self.config.sparsity, len(missed))
        survivors = self.begin.survivors
        positions = b"" if follows else pack_positions(changed.within(survivors), survivors.k)
        values = encode_sync(self.model[changed.indices], codec(PLAIN))
        if self._release is not None and follows:
            replay = join_replay([change.blob for change in missed])
            if len(replay) < len(values):
                return "replay", replay, (0, 0)
        return "sync", positions + values, (0, 0) if follows else (changed.k, len(positions))

    @cached_property
    def _whole(self) -> int:
        """Bytes of the newest model, packed: the same in every round."""
        return len(self._join(values=True))

    def _join(self, *, values: bool) -> bytes:
        mask = None if start.mask_is_public(self.config) else self.begin.survivors.indices
        blob = encode_join(mask, self.layout.d, None, codec(PLAIN))
        index = start.join_positions(self.config, self.layout, self.begin.survivors)
        return blob + (encode_sync(self.model[index], codec(PLAIN)) if values else b"")

    def versions_held(self) -> set[str]:
        """Digests of every version that a client holds or is about to be given."""
        return {self.digests[v] for v in self.held.values()} | {self.digest}

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """For the checkpoint."""
        arrays: dict[str, NDArray[Any]] = {"model": self.model}
        for version, change in self.changes.items():
            arrays[f"changed-{version}"] = change.support.indices
            arrays[f"release-{version}"] = np.frombuffer(change.blob, dtype=np.uint8)
        if self._release is not None and self._release.residual is not None:
            arrays["residual"] = self._release.residual
        head = {
            "version": self.version,
            "digests": self.digests,
            "held": {str(client): version for client, version in self.held.items()},
            "odds": {str(version): list(change.odds) for version, change in self.changes.items()},
            "clients": {str(version): list(change.clients) for version, change in self.changes.items()},
        }
        return head, arrays

    def restore(self, head: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Continue from a checkpoint."""
        self.version, self.digests = head["version"], list(head["digests"])
        self.held = {int(client): version for client, version in head["held"].items()}
        self.model = arrays["model"]
        self._made.clear()
        if self._release is not None and "residual" in arrays:
            self._release.residual = arrays["residual"].copy()
        self.changes = {
            int(version): Change(
                Support(arrays[f"changed-{version}"], self.layout.d),
                tuple(odds),
                arrays[f"release-{version}"].tobytes(),
                tuple(head["clients"][version]),
            )
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
        blob: Packed mask where it is sent, then values where they are.
        with_values: Whether values are sent.

    Raises:
        WireError: The payload does not fit the config.
    """
    weights = start.public_weights(layout, seed) if start.weights_are_public(config) else np.zeros(layout.d, dtype=np.float32)
    plain = codec(PLAIN)
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
    model[changed.indices] = decode_sync(blob, changed.k, codec(PLAIN))
    return model


def receive_replay(config: cfg.Config, weights: Vector, missed: list[Support], blob: bytes) -> Vector:
    """The client's side of `replay`: every missed round's release applied in order; the newest model, shape (d,).

    Raises:
        WireError: The payload does not hold one release for each missed round.
    """
    lossy = codec(config.wire.downlink)
    model = weights.copy()
    for support, part in zip(missed, split_replay(blob, [lossy.size(s.k) for s in missed]), strict=True):
        model[support.indices] += decode_sync(part, support.k, lossy)
    return model
