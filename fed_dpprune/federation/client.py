"""A client: checks the terms, charges its ledger, trains on the support, sends the values on it and nothing else.

`ClientRuntime.train` is the whole of a round on this side, in numbered steps. Everything before the charge reads public
facts only: a refusal leaves before any private example has been looked at. After the charge there is one outcome, a
release: whatever goes wrong with the data, the net or the arithmetic becomes a release of noise, of the same status and
length, stored under the request before it leaves (invariant 15).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.comm.masks import unpack_positions
from fed_dpprune.errors import ClientFault, LedgerError, WireError
from fed_dpprune.federation import broadcast, messages, uplink
from fed_dpprune.federation.broadcast import Parcel
from fed_dpprune.federation.fingerprint import fingerprint
from fed_dpprune.federation.local_train import Share, noise_alone, train
from fed_dpprune.federation.messages import Reply
from fed_dpprune.federation.model_store import ModelStore, model_digest
from fed_dpprune.federation.start import Start, Vector
from fed_dpprune.federation.supports import (
    Supports,
    best_claim,
    changes_follow,
    draws_each,
    follows_from_clients,
    shipped_part,
    unpack_clients,
)
from fed_dpprune.federation.terms import RoundTerms, config_digest, from_wire
from fed_dpprune.models.flat import Layout
from fed_dpprune.plan import sample_rate
from fed_dpprune.sparsity.criteria.table import CriterionContext
from fed_dpprune.sparsity.prune import pre_prune
from fed_dpprune.sparsity.recipe import RoundSupport
from fed_dpprune.sparsity.support import PROVENANCES, Support, union, weakest

if TYPE_CHECKING:
    from fed_dpprune.federation.secrets import Secrets
    from fed_dpprune.federation.workbench import Workbench

_log = logging.getLogger(__name__)


class _Work:
    """One request at a time in a process: clients of a process share their engine, whose weights and support are set.

    With two at once, norms could be taken at one request's weights and sums at the other's. Entered again by the same
    thread it does not wait; a forked child has a lock of its own.
    """

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = threading.RLock()


_work = _Work()


class Guard(Protocol):
    """Who decides whether a request may be answered, and remembers what was."""

    def screen(self, terms: RoundTerms) -> None:
        """Refuse, by raising ClientFault, what public limits forbid: before anything is built, drawn or opened for it."""

    def admit(self, terms: RoundTerms) -> bytes | None:
        """Charge the request, or give back the reply stored for it; raises ClientFault to refuse."""

    def keep(self, terms: RoundTerms, reply: bytes) -> bytes:
        """Store the reply before it leaves; gives back what may leave: one reply a request, whoever was first."""


class HostGuard:
    """For clients whose host has admitted and charged the request already (`federation/host.py`)."""

    def screen(self, terms: RoundTerms) -> None:
        """Within the limits."""

    def admit(self, terms: RoundTerms) -> bytes | None:
        """Admitted."""
        return None

    def keep(self, terms: RoundTerms, reply: bytes) -> bytes:
        """The host stores it."""
        return reply


class Received:
    """The newest models that a process has unpacked, for its simulated clients: all of them are sent the same bytes.

    A model is found only by everything that it was made from, the payload's bytes included, and only after its digest
    was checked; so a client gets what it would have unpacked itself.
    """

    KEPT = 2

    def __init__(self) -> None:
        self._known: dict[object, Start] = {}

    def get(self, key: object) -> Start | None:
        """What was unpacked for `key`."""
        return self._known.get(key)

    def put(self, key: object, begin: Start) -> None:
        """Remember what was unpacked and checked; the oldest goes."""
        self._known[key] = begin
        while len(self._known) > self.KEPT:
            del self._known[next(iter(self._known))]


@dataclass
class ClientSetup:
    """What makes a client this client.

    Attributes:
        config: The shared config.
        partition: Its number.
        nominal_size: N_c, declared by whoever runs the client.
        bench: Its net and engine, built when first needed.
        share: Its private data, loaded when first needed.
        secrets: Where batches and noise come from.
        store: Where it keeps the model between rounds.
        guard: Its ledger and policy.
        ledger: "own", or "host" when `guard` is the host's.
        note_seconds: Add the computing time to the reply, for the host to take off; simulations only.
        received: Models that clients of this process have already unpacked and checked.
    """

    config: cfg.Config
    partition: int
    nominal_size: int
    bench: Callable[[], Workbench]
    share: Callable[[], Share]
    secrets: Secrets
    store: ModelStore
    guard: Guard
    ledger: str = "host"
    note_seconds: bool = False
    received: Received = field(default_factory=lambda: Received())


class ClientRuntime:
    """Answers the messages of one client. Holds no state of its own between messages."""

    def __init__(self, setup: ClientSetup) -> None:
        self._setup = setup

    def hello(self, content: RecordDict) -> RecordDict:
        """Say who this is: partition id, nominal size, who holds the ledger, which code runs. All public."""
        setup = self._setup
        head: dict[str, int | str] = {
            "status": "ok",
            "partition-id": setup.partition,
            "nominal-size": setup.nominal_size,
            "ledger": setup.ledger,
            "fingerprint": fingerprint(),
            "config": config_digest(setup.config),
        }
        return RecordDict({"hello": ConfigRecord(dict(head))})

    def train(self, content: RecordDict) -> RecordDict:
        """Answer one round's request; never raises, and a failure leaves as one word."""
        started = time.perf_counter()
        terms: RoundTerms | None = None
        try:
            terms = from_wire(messages.config_of(content, "terms"))
            with _work.lock:
                reply = self._answer(terms, content)
        except ClientFault as fault:
            _log.warning("client %d: %s %s", self._setup.partition, fault.code, fault.detail)
            reply = self._refusal(terms, fault.code)
        except WireError as error:
            _log.warning("client %d: %s", self._setup.partition, error)
            reply = self._refusal(terms, "malformed-terms")
        except LedgerError as error:
            _log.error("client %d: %s", self._setup.partition, error)
            reply = self._refusal(terms, "ledger-failed")
        except Exception:
            _log.exception("client %d failed", self._setup.partition)
            reply = self._refusal(terms, "internal-error")
        if self._setup.note_seconds:
            messages.add_seconds(reply, time.perf_counter() - started)
        return reply

    def _refusal(self, terms: RoundTerms | None, code: str) -> RecordDict:
        key, round, digest = (terms.key, terms.round, terms.digest) if terms else ("", 0, "")
        return messages.train_reply(Reply(code, key, round, digest, fingerprint()))

    def _answer(self, terms: RoundTerms, content: RecordDict) -> RecordDict:
        setup = self._setup
        # 1. The terms must be meant for this client, under this code and this config.
        self._check(terms)
        # They must be within the operator's limits too, before their rounds, steps and supports cost time and memory.
        setup.guard.screen(terms)
        # 2. Bring the model up to date; both ends must hold it to the bit.
        bench = setup.bench()
        parcel = messages.read_request(content)
        count, size = parcel.shipped
        if size > len(parcel.payload):
            raise WireError("request", "the payload is shorter than the support in it")
        begin = self._receive(terms, parcel, parcel.payload[size:], bench)
        if begin.survivors.k != terms.survivor_count:
            raise ClientFault("digest-mismatch", "survivors")
        # 3. Recompute the round's support from public terms, or unpack what the server alone can choose.
        live = self._support(terms, begin, (count, parcel.payload[:size]), bench.layout)
        # 4. Everything that can fail for a public reason has its chance before the charge: the share, the way to encode.
        share = setup.share()
        self._encode(terms, np.zeros(live.support.k))
        # 5. Policy and ledger: refuse, or give back what was sent before, or charge. Committed before step 6.
        stored = setup.guard.admit(terms)
        if stored is not None:
            return messages.thaw(stored)
        # 6. The private work, and its values on the support, encoded: always a release, always of this length.
        payload = self._release(terms, live, begin, bench, share)
        reply = messages.train_reply(Reply("ok", terms.key, terms.round, terms.digest, fingerprint(), payload))
        # 7. Stored before it leaves; where another process was first, what it stored is what leaves.
        made = messages.freeze(reply)
        kept = setup.guard.keep(terms, made)
        return reply if kept == made else messages.thaw(kept)

    def _encode(self, terms: RoundTerms, values: NDArray[np.float64]) -> bytes:
        wire = self._setup.config.wire
        return uplink.encode(wire, values, uplink.dither(wire, terms.seed, "up", terms.round, terms.client))

    def _release(self, terms: RoundTerms, live: RoundSupport, begin: Start, bench: Workbench, share: Share) -> bytes:
        """The charged request's payload. It always exists: each fallback knows less of the data than the one before it.

        The engine raises for no data; what may still come up (no memory, a user's net) is logged here and shows nowhere.
        """
        setup = self._setup
        work = (setup.config, terms, live)
        attempts: tuple[Callable[[], NDArray[np.float64]], ...] = (
            lambda: train(*work, begin.survivors, begin.model, bench.gradient, share, setup.secrets),
            lambda: noise_alone(*work, begin.model, bench.layout, share.nominal_size, setup.secrets),
        )
        for attempt in attempts:
            try:
                return self._encode(terms, attempt())
            except Exception:
                _log.exception("client %d failed in a charged round; less than its work leaves", setup.partition)
        return self._encode(terms, np.zeros(live.support.k))  # no noise to be had either: a constant tells nothing

    def _check(self, terms: RoundTerms) -> None:
        setup = self._setup
        if terms.fingerprint != fingerprint():
            raise ClientFault("code-mismatch", terms.fingerprint)
        if terms.config != config_digest(setup.config) or terms.client != setup.partition:
            raise ClientFault("config-mismatch", terms.config)
        planned = setup.config.federation
        if (terms.rounds, terms.steps) != (planned.rounds, planned.local_steps):
            raise ClientFault("config-mismatch", f"{terms.rounds} rounds of {terms.steps} steps")
        if terms.sample_rate != sample_rate(setup.config.privacy, setup.nominal_size):
            raise ClientFault("sample-rate-mismatch", repr(terms.sample_rate))
        if terms.provenance not in PROVENANCES or weakest(terms.provenance, best_claim(setup.config)) != terms.provenance:
            raise ClientFault("config-mismatch", f"supports of this config are not {terms.provenance!r}")

    def _receive(self, terms: RoundTerms, parcel: Parcel, payload: bytes, bench: Workbench) -> Start:
        """The round's model and the survivors, checked by digest and kept for the next round."""
        if terms.layout != bench.layout.digest:
            raise ClientFault("config-mismatch", "layout")
        whose = 0 if self._setup.config.sparsity.shared else terms.client
        key = (terms.config, terms.layout, terms.seed, terms.survivors, terms.model, terms.round, terms.odds, whose, parcel)
        known = self._setup.received.get(key)
        if known is not None and (not parcel.base or self._setup.store.load(parcel.base) is not None):
            self._setup.store.save(terms.model, known, terms.round - 1)
            return known
        if parcel.kind in ("sync", "replay"):
            begin = self._update(terms, parcel, payload, bench)
        else:
            with_values = parcel.kind != "start" or bool(self._setup.config.model.weights)
            begin = broadcast.receive_start(
                self._setup.config,
                bench.layout,
                terms.seed,
                terms.survivor_count,
                lambda weights: self._draw_survivors(weights, terms.seed, bench),
                payload,
                with_values=with_values,
            )
        if model_digest(begin.model) != terms.model or begin.survivors.digest != terms.survivors:
            raise ClientFault("digest-mismatch", "model or survivors")
        if not np.isfinite(begin.model).all():
            raise ClientFault("model-not-finite", terms.model)
        self._setup.received.put(key, begin)
        self._setup.store.save(terms.model, begin, terms.round - 1)
        return begin

    def _draw_survivors(self, weights: Vector, seed: int, bench: Workbench) -> Support:
        from fed_dpprune.models import registry

        context = CriterionContext(
            layout=bench.layout,
            weights=weights,
            build=lambda: registry.build(bench.spec),
            input_shape=bench.spec.input_shape,
            seed=seed,
        )
        sparsity = self._setup.config.sparsity
        return pre_prune(sparsity.prune, context, sparsity.granularity)

    def _update(self, terms: RoundTerms, parcel: Parcel, payload: bytes, bench: Workbench) -> Start:
        """Play the missed rounds' changes on the model this client holds."""
        held = self._setup.store.load(parcel.base)
        if held is None:
            raise ClientFault("need-resync", parcel.base)
        begin, version = held
        rounds = range(version + 1, terms.round)
        if version >= terms.round:
            raise ClientFault("older-round", f"holds version {version}")
        if len(rounds) * draws_each(self._setup.config) > broadcast.MOST_DRAWS:
            raise ClientFault("need-resync", f"missed {len(rounds)} rounds")
        if not changes_follow(self._setup.config.sparsity, len(rounds)) and rounds:
            count, size = parcel.changed
            changed = inside(begin.survivors, unpack_positions(payload[:size], begin.survivors.k, count))
            return Start(broadcast.receive_sync(begin.model, changed, payload[size:]), begin.survivors)
        told, payload = payload[: parcel.answered[1]], payload[parcel.answered[1] :]
        missed = self._missed(rounds, terms, parcel, told, begin, bench.layout)
        if parcel.kind == "replay":
            return Start(broadcast.receive_replay(self._setup.config, begin.model, missed, payload), begin.survivors)
        nothing = Support(np.zeros(0, dtype=np.int64), bench.layout.d)
        return Start(broadcast.receive_sync(begin.model, union(missed) if missed else nothing, payload), begin.survivors)

    def _missed(
        self, rounds: range, terms: RoundTerms, parcel: Parcel, told: bytes, begin: Start, layout: Layout
    ) -> list[Support]:
        """What each missed round moved, drawn from public terms and, where supports are not shared, from who answered."""
        odds, width = parcel.odds, len(layout.tensors) if terms.odds else 0
        if len(odds) != width * len(rounds):
            raise WireError("request", "odds do not fit the missed rounds")
        each = len(told) // len(rounds) if rounds else 0
        wanted = follows_from_clients(self._setup.config.sparsity, len(rounds))
        everyone, most = self._setup.config.federation.clients, broadcast.MOST_DRAWS // draws_each(self._setup.config)
        if bool(told) != wanted or each * len(rounds) != len(told) or each > (everyone + 7) // 8:
            raise WireError("request", "who answered does not fit the missed rounds")
        supports = Supports(self._setup.config, layout, begin.survivors, terms.seed)
        found, drawn = [], 0
        for place, round in enumerate(rounds):
            clients = unpack_clients(told[place * each : (place + 1) * each]) if told else (terms.client,)
            if not clients or clients[-1] >= max(everyone, terms.client + 1) or drawn + len(clients) > most:
                raise WireError("request", "nobody, or nobody of this run, or too many answered a missed round")
            drawn += len(clients)
            found.append(supports.moved(round, clients, begin.model, odds=odds[place * width : (place + 1) * width]))
        return found

    def _support(self, terms: RoundTerms, begin: Start, shipped: tuple[int, bytes], layout: Layout) -> RoundSupport:
        """The round's support, equal to the server's by digest."""
        supports = Supports(self._setup.config, layout, begin.survivors, terms.seed)
        sent = None
        if shipped_part(self._setup.config.sparsity):
            positions = unpack_positions(shipped[1], begin.survivors.k, shipped[0])
            sent = inside(begin.survivors, positions, best_claim(self._setup.config))
        live = supports.of(terms.round, terms.client, begin.model, odds=terms.odds, shipped=sent)
        if live.support.digest != terms.digest or live.support.k != terms.live:
            raise ClientFault("digest-mismatch", "support")
        return live


def inside(outer: Support, positions: NDArray[np.int64], provenance: str = "data-free") -> Support:
    """The coordinates at `positions` of `outer.indices`."""
    return Support(outer.indices[positions], outer.d, weakest(outer.provenance, provenance))
