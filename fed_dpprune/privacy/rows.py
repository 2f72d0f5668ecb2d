"""The rows of a ledger: what is stored, what is asked for and what is answered; plain values, no file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fed_dpprune.privacy.history import Entry

SCHEMA = 2  # 2: the accountant is fixed with the file
SIMULATION, DEPLOYMENT = "simulation", "deployment"
Mode = Literal["simulation", "deployment"]
TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE charges (
    number INTEGER PRIMARY KEY CHECK (number >= 1),
    client TEXT NOT NULL,
    request_key TEXT NOT NULL UNIQUE CHECK (length(request_key) >= 16),
    run TEXT NOT NULL,
    round INTEGER NOT NULL CHECK (round >= 1),
    purpose TEXT NOT NULL,
    entries TEXT NOT NULL,
    steps INTEGER NOT NULL CHECK (steps >= 1),
    accountant TEXT NOT NULL,
    rule TEXT NOT NULL CHECK (rule IN ('schedule', 'filter')),
    epsilon REAL CHECK (epsilon >= 0),
    run_epsilon REAL CHECK (run_epsilon >= 0),
    max_epsilon REAL CHECK (max_epsilon > 0),
    declaration TEXT,
    previous TEXT NOT NULL,
    digest TEXT NOT NULL
);
CREATE INDEX charges_by_client ON charges (client, number);
CREATE TABLE replies (
    request_key TEXT PRIMARY KEY REFERENCES charges (request_key),
    round INTEGER NOT NULL,
    digest TEXT NOT NULL,
    reply BLOB
);
CREATE TRIGGER charges_stay BEFORE UPDATE ON charges BEGIN SELECT RAISE(ABORT, 'charges are append-only'); END;
CREATE TRIGGER charges_last BEFORE DELETE ON charges BEGIN SELECT RAISE(ABORT, 'charges are append-only'); END;
CREATE TRIGGER meta_stays BEFORE UPDATE ON meta BEGIN SELECT RAISE(ABORT, 'meta is fixed'); END;
CREATE TRIGGER meta_lasts BEFORE DELETE ON meta BEGIN SELECT RAISE(ABORT, 'meta is fixed'); END;
CREATE TRIGGER replies_last BEFORE DELETE ON replies BEGIN SELECT RAISE(ABORT, 'replies are kept or blanked'); END;
CREATE TRIGGER replies_stay BEFORE UPDATE ON replies
    WHEN NEW.reply IS NOT NULL OR NEW.digest IS NOT OLD.digest OR NEW.request_key IS NOT OLD.request_key
    BEGIN SELECT RAISE(ABORT, 'replies are kept or blanked'); END;
"""
FIELDS = (
    "number",
    "client",
    "request_key",
    "run",
    "round",
    "purpose",
    "entries",
    "steps",
    "accountant",
    "rule",
    "epsilon",
    "run_epsilon",
    "max_epsilon",
    "declaration",
    "previous",
)
COLUMNS = ", ".join((*FIELDS, "digest"))


@dataclass(frozen=True)
class Request:
    """One client's part of a round that is to be charged.

    Args:
        client: The client's name in this ledger (its partition id in a simulation).
        request_key: Digest of the whole request, in hex; the same request has the same one.
        run: The run's identity.
        round: Counts from 1.
        entries: What the round spends: its private steps, and each privatised side release.
        rounds: Rounds that the run declares; a client's first charge fixes its schedule with it.
        purpose: In a word, for the reader of the ledger.

    Raises:
        ValueError: A key that is no digest, a count below 1, no entries.
    """

    client: str
    request_key: str
    run: str
    round: int
    entries: tuple[Entry, ...]
    rounds: int = 1
    purpose: str = "train"

    def __post_init__(self) -> None:
        if len(self.request_key) < 16 or not set(self.request_key) <= set("0123456789abcdef"):
            raise ValueError(f"a request's key is a digest in hex, not {self.request_key!r}")
        if self.round < 1 or self.rounds < 1:
            raise ValueError("rounds count from 1")
        if not self.entries:
            raise ValueError("a charge needs at least one entry")


@dataclass(frozen=True)
class Charge:
    """A charge that is committed.

    Attributes:
        number: Its place in the ledger, from 1.
        status: "new", or "replay" when this request was charged before.
        epsilon: The client's cumulative epsilon after it.
        reply: For a replay, the stored reply; None when none was stored, which means that none was sent.
    """

    number: int
    status: Literal["new", "replay"]
    epsilon: float
    reply: bytes | None = None


@dataclass(frozen=True)
class RunSpent:
    """What one client spent in one run; `epsilon` is that of the run alone."""

    run: str
    rounds: int
    steps: int
    entries: tuple[Entry, ...]
    epsilon: float


@dataclass(frozen=True)
class ClientSpent:
    """What one client spent in all. `limit` is the one in force at the last charge, None when there was none."""

    client: str
    epsilon: float
    rule: str
    accountant: str
    limit: float | None
    entries: tuple[Entry, ...]
    runs: tuple[RunSpent, ...]


@dataclass(frozen=True)
class Head:
    """Where the chain ends: number of charges, and the digest of the last."""

    count: int
    digest: str


def digest(values: Sequence[Any]) -> str:
    """SHA-256 of the values as canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(list(values), separators=(",", ":")).encode()).hexdigest()


def to_disk(value: float) -> float | None:
    """SQLite and JSON have no infinity; none is what no finite figure looks like on disk."""
    return value if math.isfinite(value) else None


def from_disk(value: float | None) -> float:
    """The way back."""
    return math.inf if value is None else value
