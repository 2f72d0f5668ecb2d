"""Flower records to our types and back. One array a message, one record of terms, nothing else.

The allow-lists below are the whole vocabulary: a field that is not named here neither leaves a client nor is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fed_dpprune.errors import WireError

TRAIN, QUERY = "train", "query"
NPY_HEADER = 128  # the array container's own bytes: part of the message, not of the payload

REQUEST_FIELDS = ("kind", "base", "odds")
REPLY_FIELDS = ("status", "request", "round", "digest", "fingerprint")
HELLO_FIELDS = ("status", "partition-id", "nominal-size", "ledger", "fingerprint", "config")
SIMULATION = "simulation"  # a record that a simulated client adds and its host takes off: seconds of computing


@dataclass(frozen=True)
class Reply:
    """What a client sent back: `status` is a word of REPLY_CODES or a policy code; the payload is empty unless "ok"."""

    status: str
    request: str
    round: int
    digest: str
    fingerprint: str
    payload: bytes = b""


def read_request(content: RecordDict) -> tuple[str, str, tuple[int, ...]]:
    """Kind, base and missed odds of a request.

    Raises:
        WireError: A field is missing, unknown or of the wrong type.
    """
    values = config_of(content, "request")
    kind, base, odds = values.get("kind"), values.get("base"), values.get("odds", [])
    if not isinstance(kind, str) or not isinstance(base, str) or set(values) - set(REQUEST_FIELDS):
        raise WireError("request", "fields are not those of the protocol")
    if not isinstance(odds, list) or not all(type(o) is int for o in odds):
        raise WireError("request", "odds are not whole numbers")
    return kind, base, tuple(odds)


def _array(blob: bytes) -> ArrayRecord:
    return ArrayRecord({"payload": Array(np.frombuffer(blob, dtype=np.uint8))})


def payload_of(content: RecordDict, name: str) -> bytes:
    """The payload bytes under record `name`; empty when there is none.

    Raises:
        WireError: The record is not one flat array of bytes in numpy's container.
    """
    if name not in content:
        return b""
    record = content[name]
    if not isinstance(record, ArrayRecord) or list(record) != ["payload"]:
        raise WireError("message", f"record {name!r} is not one array")
    array = record["payload"]
    if array.dtype != "uint8" or array.stype != "numpy.ndarray" or len(array.shape) != 1:
        raise WireError("message", f"record {name!r} is not an array of bytes")
    if len(array.data) != NPY_HEADER + array.shape[0]:
        raise WireError("message", f"record {name!r} does not have its declared size")
    return array.data[NPY_HEADER:]


def config_of(content: RecordDict, name: str) -> dict[str, Any]:
    """The values under config record `name`.

    Raises:
        WireError: There is no such record.
    """
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise WireError("message", f"record {name!r} is missing")
    return dict(record)


def train_request(terms: dict[str, Any], kind: str, base: str, payload: bytes, odds: tuple[int, ...] = ()) -> RecordDict:
    """A round's request: terms, how the payload brings the model up to date, and the payload.

    Args:
        terms: `RoundTerms.to_wire()`.
        kind: "start", "join", "sync" or "resync"; see `comm/downlink.py`.
        base: Digest of the model that the payload builds on; empty for start, join and resync.
        payload: Encoded bytes; no array travels when empty.
        odds: Inclusion odds of the rounds that the client missed, one after the other, where supports are drawn by them.
    """
    request: dict[str, Any] = {"kind": kind, "base": base}
    if odds:
        request["odds"] = list(odds)
    records: dict[str, Any] = {"terms": ConfigRecord(terms), "request": ConfigRecord(request)}
    if payload:
        records["model"] = _array(payload)
    return RecordDict(records)


def train_reply(reply: Reply) -> RecordDict:
    """A client's reply: status and echoes, and the payload when there is one."""
    head: dict[str, Any] = {
        "status": reply.status,
        "request": reply.request,
        "round": reply.round,
        "digest": reply.digest,
        "fingerprint": reply.fingerprint,
    }
    records: dict[str, Any] = {"reply": ConfigRecord(head)}
    if reply.payload:
        records["update"] = _array(reply.payload)
    return RecordDict(records)


def read_reply(content: RecordDict) -> Reply:
    """Read a reply strictly.

    Raises:
        WireError: A record or field that the allow-list does not name, or one of another type.
    """
    extra = set(content) - {"reply", "update"}
    if extra:
        raise WireError("reply", f"unknown records {sorted(extra)}")
    head = config_of(content, "reply")
    if set(head) != set(REPLY_FIELDS) or type(head["round"]) is not int:
        raise WireError("reply", "fields are not those of the protocol")
    if not all(isinstance(head[name], str) for name in REPLY_FIELDS if name != "round"):
        raise WireError("reply", "a field has the wrong type")
    return Reply(payload=payload_of(content, "update"), **head)


def add_seconds(content: RecordDict, seconds: float) -> None:
    """A simulated client notes its computing time; the host takes the record off before anything is measured."""
    content[SIMULATION] = ConfigRecord({"compute-s": struct.pack("<d", seconds)})


def take_seconds(content: RecordDict) -> float | None:
    """Take a simulated client's computing time off its reply."""
    record = content.pop(SIMULATION, None)
    blob = record.get("compute-s") if isinstance(record, ConfigRecord) else None
    return float(struct.unpack("<d", blob)[0]) if isinstance(blob, bytes) and len(blob) == 8 else None


def _tree_bytes(item: Any) -> int:
    """Serialised bytes of a Flower object and everything below it."""
    return len(item.deflate()) + sum(_tree_bytes(child) for child in (item.children or {}).values())


@lru_cache(maxsize=1024)
def _array_bytes(size: int) -> int:
    """The serialised bytes of our one-array record: they depend on the array's size alone, never on its values."""
    return _tree_bytes(_array(bytes(size)))


@lru_cache(maxsize=64)
def _envelope_bytes(names: tuple[str, ...]) -> int:
    """The serialised bytes of the outer record: names and references of fixed length (a SHA-256 in hex each)."""
    return len(RecordDict({name: ConfigRecord({"place": index}) for index, name in enumerate(names)}).deflate())


def message_bytes(content: RecordDict) -> int:
    """Bytes of the serialised content: every object that Flower would store and send for it.

    Equal to the summed `deflate()` of the whole tree (a test holds it to that), without hashing payloads each time.
    """
    total = _envelope_bytes(tuple(content))
    for record in content.values():
        if isinstance(record, ArrayRecord) and list(record) == ["payload"]:
            total += _array_bytes(record["payload"].shape[0])
        else:
            total += _tree_bytes(record)
    return total


def freeze(content: RecordDict) -> bytes:
    """A reply as bytes for the ledger's store; `thaw` gives back an equal record."""
    reply = read_reply(content)
    head = train_reply(Reply(reply.status, reply.request, reply.round, reply.digest, reply.fingerprint))["reply"].deflate()
    return struct.pack("<I", len(head)) + head + reply.payload


def thaw(blob: bytes) -> RecordDict:
    """The stored reply, byte for byte what was sent the first time."""
    (size,) = struct.unpack_from("<I", blob)
    head = ConfigRecord.inflate(blob[4 : 4 + size])
    return train_reply(Reply(payload=blob[4 + size :], **dict(head)))  # type: ignore[arg-type]
