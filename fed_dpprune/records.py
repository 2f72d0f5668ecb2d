"""What is written to disk: one line per round, one per client and round, one summary. Plain types, no torch.

Keys are the contract's (snake_case). `*_s` keys are seconds and are the only ones that may differ between two runs of
one seed. Files are written so that a reader never sees half of one: a whole file by rename, a line by a single append.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("complete", "stopped", "interrupted", "failed")


@dataclass(frozen=True)
class ClientCounts:
    """What became of the clients of one round."""

    asked: int = 0
    answered: int = 0
    refused: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class RoundRecord:
    """One line of rounds.jsonl. Bytes are payload bytes of the round, all clients together.

    `message_*` are the whole messages, `planned_*` the payload that `plan` counts (an upper bound where it says so),
    `dense_*` what dense float32 would have carried. `link_s`: seconds of the messages on the config's `wire.link`.
    `accuracy` and `loss` are None where the test data was not looked at (`federation.evaluate-every`).
    """

    round: int
    accuracy: float | None
    loss: float | None
    live: int
    digest: str
    epsilon_max: float
    bytes_up: int
    bytes_down: int
    message_up: int
    message_down: int
    clients: ClientCounts
    notes: tuple[str, ...] = ()
    planned_up: int = 0
    planned_down: int = 0
    dense_up: int = 0
    dense_down: int = 0
    link_s: float | None = None
    wall_s: float = 0.0


@dataclass(frozen=True)
class ClientRecord:
    """One line of clients.jsonl: enough to recompute every epsilon with another accountant.

    `epsilon` is cumulative over the client's charged steps; `status` is "answered", "refused", "rejected", "failed" or
    "silent"; `reason` a reply code or the server's ground for rejecting. `steps` counts the steps charged in this round.
    Bytes and `link_s` as in `RoundRecord`.
    """

    round: int
    client: int
    status: str
    reason: str
    nominal_size: int
    steps: int
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    epsilon: float
    bytes_up: int
    bytes_down: int
    message_up: int
    message_down: int
    planned_up: int = 0
    planned_down: int = 0
    dense_up: int = 0
    dense_down: int = 0
    downlink_kind: str = ""
    compute_s: float | None = None
    link_s: float | None = None


@dataclass
class Direction:
    """Totals over the run of one direction. `ratio` is payload / dense float32 of the same messages; below 1 is less."""

    payload: int = 0
    message: int = 0
    dense_float32: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """With the two ratios, null while nothing has travelled."""
        dense = self.dense_float32
        return {
            **asdict(self),
            "ratio": self.payload / dense if dense else None,
            "message_ratio": self.message / dense if dense else None,
        }


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON with non-finite numbers as null (JSON has no word for them)."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(k): clean(v) for k, v in item.items()}
        if isinstance(item, list | tuple):
            return [clean(v) for v in item]
        if isinstance(item, float) and not math.isfinite(item):
            return None
        return item

    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:  # not finite somewhere
        return json.dumps(clean(value), indent=indent, allow_nan=False)


LIBRARIES = {"pld": "dp-accounting", "rdp": "dp-accounting", "prv": "opacus"}  # where each accountant comes from


def conditions(summary: Mapping[str, Any]) -> str:
    """Under which a finished run's epsilons hold, from its summary.json; empty where it claims nothing.

    Unit, neighbouring relation, sampler, accountant with its version, adversary: printed beside the figures and their delta.
    """
    privacy = summary.get("privacy") or {}
    if not privacy.get("accountant"):
        return ""
    library = LIBRARIES.get(privacy["accountant"], "")
    version = (summary.get("versions") or {}).get(library, "of unknown version")
    relation, unit, sampler, adversary = (str(privacy.get(key, "")) for key in ("neighbouring", "unit", "sampler", "adversary"))
    accountant = f"{privacy['accountant']} ({library} {version})"
    return f"{relation.replace('-', ' ')} {unit} of one client, {sampler} sampling, {accountant}, against {adversary}"


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace `path` in one step; a reader sees the old file or the new one, also after kill -9 (power loss is not claimed).

    The file is readable for its owner alone (0600). It is written under a name that nobody can guess or have taken.
    """
    blob = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(blob)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def append_lines(path: Path, rows: list[RoundRecord] | list[ClientRecord]) -> None:
    """Append records as JSON lines in one write."""
    text = "".join(to_json(asdict(row)) + "\n" for row in rows)
    with open(path, "ab", buffering=0) as file:
        file.write(text.encode())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a JSONL file; a last line without its newline (a crash) is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def keep_rounds(path: Path, last_round: int) -> None:
    """Drop the lines after `last_round`: what a resumed run will write again."""
    kept = [row for row in read_lines(path) if row["round"] <= last_round]
    write_atomically(path, "".join(to_json(row) + "\n" for row in kept))
