"""Flower records to our types and back. One array a message, one record of terms, nothing else.

The allow-lists below are the whole vocabulary: a field that is not named here neither leaves a client nor is read.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fed_dpprune.errors import WireError
from fed_dpprune.federation.broadcast import KINDS, Parcel

MOST_INT = (1 << 63) - 1  # of a record on the wire; in one process a whole number could be longer
TRAIN, QUERY = "train", "query"
NPY_HEADER = 128  # the array container's own bytes: part of the message, not of the payload

REQUEST_FIELDS = ("kind", "base", "odds", "shipped", "changed", "answered")
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


def read_request(content: RecordDict) -> Parcel:
    """What a request brings.

    Raises:
        WireError: A record or field is missing, unknown or of the wrong type.
    """
    if set(content) - {"terms", "request", "model"}:
        raise WireError("request", "unknown records")
    values = config_of(content, "request")
    kind, base = values.get("kind"), values.get("base")
    if not isinstance(kind, str) or not isinstance(base, str) or set(values) - set(REQUEST_FIELDS) or kind not in KINDS:
        raise WireError("request", "fields are not those of the protocol")
    return Parcel(
        kind,
        base,
        payload_of(content, "model"),
        tuple(_whole_numbers(values, "odds")),
        _pair(values, "shipped"),
        _pair(values, "changed"),
        _pair(values, "answered"),
    )


def _whole_numbers(values: Mapping[str, Any], name: str) -> list[int]:
    found = values.get(name, [])
    if not isinstance(found, list) or not all(type(v) is int and 0 <= v <= MOST_INT for v in found):
        raise WireError("request", f"{name} are not whole numbers")
    return found


def _pair(values: Mapping[str, Any], name: str) -> tuple[int, int]:
    found = _whole_numbers(values, name) or [0, 0]
    if len(found) != 2:
        raise WireError("request", f"{name} is not a count and a size")
    return found[0], found[1]


@lru_cache(maxsize=64)
def _npy_header(size: int) -> bytes:
    """What numpy's container puts before `size` bytes."""
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    return buffer.getvalue()


def _array(blob: bytes) -> ArrayRecord:
    """One flat array of bytes, as `Array(np.frombuffer(blob, np.uint8))` makes it, with a single copy."""
    size = len(blob)
    return ArrayRecord({"payload": Array("uint8", (size,), "numpy.ndarray", _npy_header(size) + blob)})


@lru_cache(maxsize=2)
def _sent_to_many(blob: bytes) -> ArrayRecord:
    """The record of a payload that many clients of a round get: made once, read by all, changed by nobody."""
    return _array(blob)


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
    if array.shape[0] < 0 or len(array.data) != NPY_HEADER + array.shape[0]:
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


def train_request(terms: dict[str, Any], parcel: Parcel) -> RecordDict:
    """A round's request: terms, how the payload brings the client up to date, and the payload.

    Args:
        terms: `RoundTerms.to_wire()`.
        parcel: From the server's `Broadcast`; no array travels when its payload is empty.
    """
    request: dict[str, Any] = {"kind": parcel.kind, "base": parcel.base}
    pairs = {"shipped": parcel.shipped, "changed": parcel.changed, "answered": parcel.answered}
    for name, value in {"odds": parcel.odds, **pairs}.items():
        if any(value):
            request[name] = list(value)
    records: dict[str, Any] = {"terms": ConfigRecord(terms), "request": ConfigRecord(request)}
    if parcel.payload:
        records["model"] = _sent_to_many(parcel.payload)
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


_config_sizes: dict[Hashable, int] = {}
CONFIG_SIZES = 4096


def _config_bytes(record: ConfigRecord) -> int:
    """The serialised bytes of a record of terms, serialised once for each set of names, types and lengths."""
    shape = tuple((name, *_length(value)) for name, value in record.items())
    size = _config_sizes.get(shape)
    if size is None:
        if len(_config_sizes) >= CONFIG_SIZES:
            _config_sizes.clear()
        size = _config_sizes[shape] = _tree_bytes(record)
    return size


def _length(value: Any) -> tuple[Hashable, ...]:
    """What a value's serialised length depends on: whole numbers take more bytes the larger they are, fractions always eight."""
    if isinstance(value, bool | float):
        return (isinstance(value, bool),)
    if isinstance(value, int):
        return int, value < 0, max(value, ~value).bit_length()  # zigzag: -64 is as short as 63, -65 is not
    if isinstance(value, str):
        return str, len(value.encode())
    return (bytes, len(value)) if isinstance(value, bytes) else (list, *map(_length, value))


def foreign_bytes(content: RecordDict) -> int:
    """`message_bytes` of what `read_reply` refused: nothing that it declares of itself is believed."""
    return _tree_bytes(content)


def message_bytes(content: RecordDict) -> int:
    """Bytes of the serialised content: every object that Flower would store and send for it.

    Equal to the summed `deflate()` of the whole tree (a test holds it to that), without hashing payloads each time.
    """
    total = _envelope_bytes(tuple(content))
    for record in content.values():
        if isinstance(record, ArrayRecord) and list(record) == ["payload"]:
            total += _array_bytes(record["payload"].shape[0])
        elif isinstance(record, ConfigRecord):
            total += _config_bytes(record)
        else:
            total += _tree_bytes(record)
    return total


def freeze(content: RecordDict) -> bytes:
    """A reply as bytes for the ledger's store; `thaw` gives back an equal record."""
    reply = read_reply(content)
    head = content["reply"].deflate()
    return struct.pack("<I", len(head)) + head + reply.payload


def thaw(blob: bytes) -> RecordDict:
    """The stored reply, byte for byte what was sent the first time."""
    (size,) = struct.unpack_from("<I", blob)
    head = ConfigRecord.inflate(blob[4 : 4 + size])
    return train_reply(Reply(payload=blob[4 + size :], **dict(head)))  # type: ignore[arg-type]
