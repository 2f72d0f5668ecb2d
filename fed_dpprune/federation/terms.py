"""The public facts of one round for one client, and the digest that names the request.

Whatever enters the privacy charge or the client's arithmetic travels here and nowhere else: a client trains with the
numbers of the terms it has checked and charged, never with numbers from another source.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from fed_dpprune import config as cfg
from fed_dpprune.errors import ClientFault

PROTOCOL = 2
# What no honest server exceeds; checked before anything is made from the numbers.
MOST_ODDS = 1 << 16
MOST_STEPS = 10_000
MOST_INT = (1 << 63) - 1
LEAST_LEARNING_RATE, MOST_LEARNING_RATE = 1e-30, 1e30
DIGESTS = ("run", "fingerprint", "config", "layout", "survivors", "digest", "model")
WORDS = ("provenance", "accountant", "unit")
_DIGEST = re.compile(r"[0-9a-f]{1,64}")
_WORD = re.compile(r"[a-z0-9-]{1,32}")

# What may differ between two runs without changing what is computed, or belongs to one end alone.
_LOCAL_KEYS = (
    "name", "federation.backend", "federation.actors", "federation.ray-address", "federation.reply-timeout",
    "federation.evaluate-every",
)  # fmt: skip
_LOCAL_TABLES = ("policy.", "wire.link", "engine.micro-batch")

# Every status a reply may carry. All that ever leaves a client that does not answer is one of these words.
REPLY_CODES: dict[str, str] = {
    "ok": "an update follows",
    "need-resync": "the client does not hold the model that the message builds on",
    "malformed-terms": "fields are missing, unknown or of the wrong type",
    "protocol-mismatch": "the two ends speak different versions of the protocol",
    "code-mismatch": "the two ends run different sources of fed-dpprune",
    "config-mismatch": "the two ends were started with different configs",
    "digest-mismatch": "model or support do not have the digest that the terms name",
    "sample-rate-mismatch": "the sample rate is not the one that follows from the client's nominal size",
    "model-not-finite": "the model holds values that are not finite numbers",
    "older-round": "the round is older than one that this client has already answered",
    "round-changed": "this round was already answered under other terms",
    "node-not-configured": "the node's operator has not said all that a node needs; its own log names the key",
    "ledger-failed": "the client's ledger cannot be trusted or written",
    "internal-error": "the client failed; its own log says why",
}


def blake(blob: bytes) -> str:
    """32 hex digits of BLAKE2b."""
    return hashlib.blake2b(blob, digest_size=16).hexdigest()


@lru_cache(maxsize=8)
def config_digest(config: cfg.Config) -> str:
    """32 hex digits over the keys that both ends must share (not names, runners, policies or link models).

    Keys at their default are left out, so that a key added by a later version does not change the runs of today.
    """
    shared = {
        key: value
        for key, value in cfg.to_flat(config).items()
        if value != cfg.DEFAULTS_FLAT[key] and key not in _LOCAL_KEYS and not key.startswith(_LOCAL_TABLES)
    }
    return blake(json.dumps(shared, sort_keys=True).encode())


@dataclass(frozen=True)
class RoundTerms:
    """One request to one client. Field names are the wire's (kebab-case there).

    Attributes:
        protocol: Version of the message protocol.
        run: Identity of the run, 32 hex digits.
        round: Counts from 1.
        rounds: Rounds of the whole run.
        fingerprint: Code fingerprint of the sender.
        config: Digest of the shared config keys.
        layout: Digest of tensor names and shapes.
        seed: Root of the public streams (supports, initial weights).
        survivors: Digest of the support after pre-pruning.
        survivor_count: Its size.
        digest: Digest of the round's support.
        live: Its size k.
        provenance: Where the support comes from (DESIGN section 3).
        odds: Inclusion odds per tensor where the support is drawn by them, else empty.
        model: Digest of the model that the round starts from.
        client: Partition id.
        sample_rate: Poisson rate q_c.
        noise_multiplier: Std of the noise on the sum divided by the clip norm.
        clip_norm: C, already scaled where the config says so.
        steps: Local steps, all charged.
        learning_rate: Client rate, already scaled where the config says so.
        delta: The claim's delta.
        accountant: By which the run counts; a client refuses another than its operator's.
        unit: Of the claim.
    """

    run: str
    round: int
    rounds: int
    fingerprint: str
    config: str
    layout: str
    seed: int
    survivors: str
    survivor_count: int
    digest: str
    live: int
    provenance: str
    model: str
    client: int
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    learning_rate: float
    delta: float
    accountant: str
    unit: str
    odds: tuple[int, ...] = ()
    protocol: int = PROTOCOL

    @cached_property
    def key(self) -> str:
        """The request's digest: names the charge, the stored reply and, in a simulation, the noise stream.

        The code fingerprint is checked beside it and stays out, so that a run of one seed keeps its noise when a comment
        of the sources changes.
        """
        named = {name: value for name, value in self._values().items() if name != "fingerprint"}
        return blake(json.dumps(named, sort_keys=True).encode())

    def to_wire(self) -> dict[str, Any]:
        """As ConfigRecord values."""
        return {
            name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
            for name, value in self._values().items()
            if value != ()
        }

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


_TYPES = {"str": str, "int": int, "float": float}


def from_wire(record: Mapping[str, Any]) -> RoundTerms:
    """Read terms strictly.

    Raises:
        ClientFault: `malformed-terms` when a field is missing, unknown, of the wrong type or out of range,
            `protocol-mismatch` when the sender speaks another version.
    """
    if record.get("protocol") != PROTOCOL:
        raise ClientFault("protocol-mismatch" if "protocol" in record else "malformed-terms", "protocol")
    values: dict[str, Any] = {}
    known = {f.name.replace("_", "-"): f for f in fields(RoundTerms)}
    for key, value in record.items():
        field = known.get(key)
        if field is None:
            raise ClientFault("malformed-terms", f"unknown field {key}")
        if field.name == "odds":
            if not isinstance(value, list) or len(value) > MOST_ODDS or not all(_is_odds(v) for v in value):
                raise ClientFault("malformed-terms", "odds")
            value = tuple(value)
        elif type(value) is not _TYPES[str(field.type)]:
            raise ClientFault("malformed-terms", f"type of {key}")
        values[field.name] = value
    try:
        terms = RoundTerms(**values)
    except TypeError:
        raise ClientFault("malformed-terms", "missing fields") from None
    _check_ranges(terms)
    return terms


def _is_odds(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST_INT


def _check_ranges(terms: RoundTerms) -> None:
    """Refuse numbers and words that no server of this project writes; floats of the charge are the policy's to judge."""
    counts = (terms.round, terms.rounds, terms.survivor_count, terms.live, terms.client, terms.steps)
    if not all(0 <= count <= MOST_INT for count in counts) or not -MOST_INT - 1 <= terms.seed <= MOST_INT:
        raise ClientFault("malformed-terms", "counts")
    if not 1 <= terms.round <= terms.rounds or not 1 <= terms.steps <= MOST_STEPS or terms.live > terms.survivor_count:
        raise ClientFault("malformed-terms", "counts")
    if not LEAST_LEARNING_RATE <= terms.learning_rate <= MOST_LEARNING_RATE:
        raise ClientFault("malformed-terms", "learning rate")
    if not all(_DIGEST.fullmatch(getattr(terms, name)) for name in DIGESTS):
        raise ClientFault("malformed-terms", "a digest")
    if not all(_WORD.fullmatch(getattr(terms, name)) for name in WORDS):
        raise ClientFault("malformed-terms", "a word")
