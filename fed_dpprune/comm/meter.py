"""What travelled: bytes by round, client, direction and kind. Counts only; who measures a message is `federation`.

Three counts for each message. `payload`: the bytes that our codec made. `message`: the serialised content of the whole
record, measured alike by every runner. `dense_float32`: what the same message would have carried as plain float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fed_dpprune.records import Direction

Way = Literal["up", "down"]
Kind = Literal["join", "sync", "resync", "retry", "update"]
WAYS: tuple[Way, ...] = get_args(Way)
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Parcel:
    """One message that travelled.

    Attributes:
        round: Round it belongs to.
        client: Partition id of the client.
        direction: "up" (client to server) or "down".
        kind: "join" (first model), "sync" (changes), "resync" (a model again), "retry" (sent again) or "update" (a
            client's values).
        payload: Bytes that the codec made, its header included.
        message: Bytes of the serialised record.
        dense_float32: Bytes that the payload would have had as dense float32.
    """

    round: int
    client: int
    direction: Way
    kind: Kind
    payload: int
    message: int
    dense_float32: int

    def __post_init__(self) -> None:
        """Refuse what would spoil a sum without a trace."""
        if self.direction not in WAYS or self.kind not in KINDS:
            raise ValueError(f"unknown direction {self.direction!r} or kind {self.kind!r}")
        if min(self.payload, self.message, self.dense_float32) < 0:
            raise ValueError("bytes are counted from 0")


class Meter:
    """Sums of parcels: over the run by direction and kind, by round, and by round and client.

    Its size grows with rounds times clients until `forget` drops the clients' part of rounds that are written to disk.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], Direction] = {}
        self._rounds: dict[tuple[int, str], Direction] = {}
        self._clients: dict[tuple[int, int, str], Direction] = {}

    def add(self, parcel: Parcel) -> None:
        """Count one message."""
        sums = (
            self._kinds.setdefault((parcel.direction, parcel.kind), Direction()),
            self._rounds.setdefault((parcel.round, parcel.direction), Direction()),
            self._clients.setdefault((parcel.round, parcel.client, parcel.direction), Direction()),
        )
        for total in sums:
            _add(total, parcel.payload, parcel.message, parcel.dense_float32, {parcel.kind: parcel.payload})

    def total(self, direction: Way) -> Direction:
        """Over the run; `by_kind` holds payload bytes by kind."""
        out = Direction()
        for (way, _), part in sorted(self._kinds.items()):
            if way == direction:
                _add(out, part.payload, part.message, part.dense_float32, part.by_kind)
        return out

    def of_kind(self, direction: Way, kind: Kind) -> Direction:
        """Over the run, of one kind."""
        return _copy(self._kinds.get((direction, kind)))

    def of_round(self, number: int, direction: Way) -> Direction:
        """All clients of one round."""
        return _copy(self._rounds.get((number, direction)))

    def of_client(self, number: int, client: int, direction: Way) -> Direction:
        """One client in one round; zeros when nothing travelled or the round was forgotten."""
        return _copy(self._clients.get((number, client, direction)))

    def forget(self, before_round: int) -> None:
        """Drop the by-client sums of rounds before `before_round`; totals and rounds stay."""
        self._clients = {key: part for key, part in self._clients.items() if key[0] >= before_round}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain lists, ready for JSON, in a fixed order."""
        return {
            name: [
                [*key, part.payload, part.message, part.dense_float32, dict(sorted(part.by_kind.items()))] for key, part in sums
            ]
            for name, sums in (
                ("kinds", sorted(self._kinds.items())),
                ("rounds", sorted(self._rounds.items())),
                ("clients", sorted(self._clients.items())),
            )
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Meter:
        """The meter that `state` was taken from."""
        meter = cls()
        for row in state["kinds"]:
            meter._kinds[str(row[0]), str(row[1])] = _direction(row[2:])
        for row in state["rounds"]:
            meter._rounds[int(row[0]), str(row[1])] = _direction(row[2:])
        for row in state["clients"]:
            meter._clients[int(row[0]), int(row[1]), str(row[2])] = _direction(row[3:])
        return meter


def _add(total: Direction, payload: int, message: int, dense_float32: int, by_kind: Mapping[str, int]) -> None:
    total.payload += payload
    total.message += message
    total.dense_float32 += dense_float32
    for kind, size in by_kind.items():
        total.by_kind[kind] = total.by_kind.get(kind, 0) + size


def _copy(part: Direction | None) -> Direction:
    """A caller may change what it got without changing the meter."""
    return Direction() if part is None else Direction(part.payload, part.message, part.dense_float32, dict(part.by_kind))


def _direction(row: list[Any]) -> Direction:
    payload, message, dense_float32, by_kind = row
    return Direction(int(payload), int(message), int(dense_float32), {str(k): int(v) for k, v in by_kind.items()})
