"""`fed-dpprune compare RUN RUN...`: accuracy, epsilon and bytes of runs side by side, from their summary.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from fed_dpprune.console import Screen
from fed_dpprune.errors import BadInput
from fed_dpprune.records import SCHEMA, conditions, to_json

NOTE_WIDTH = 110


@dataclass(frozen=True)
class Traffic:
    """Bytes of one direction over a run; `ratio` is payload, `message_ratio` message / dense float32, below 1 is less."""

    payload: int
    message: int
    ratio: float | None
    message_ratio: float | None = None


@dataclass(frozen=True)
class Row:
    """A run as the table shows it. `accuracy` is the last round's, `live` the last round's count of live coordinates."""

    run: str
    name: str
    status: str
    rounds: int
    accuracy: float | None
    accuracy_best: float | None
    epsilon_max: float | None
    delta: float | None
    accountant: str
    conditions: str
    uplink: Traffic
    downlink: Traffic
    live: int | None
    parameters: int | None
    total_s: float | None


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json of a run directory (or the file itself).

    Raises:
        BadInput: It is not a run directory, its summary is damaged, or it was written by a newer version.
    """
    path = run / "summary.json" if run.is_dir() else run
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        why = "holds no summary.json" if run.is_dir() else "no such folder"
        raise BadInput(str(run), why, "name the folder of a run, as `fed-dpprune run` printed it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(str(path), f"cannot be read ({error})", "run it again") from None
    if not isinstance(summary, dict) or "schema" not in summary:
        raise BadInput(str(path), "is not the summary of a run", "name the folder of a run")
    if summary["schema"] > SCHEMA:
        raise BadInput(str(path), f"has schema {summary['schema']}, this version reads up to {SCHEMA}", "upgrade fed-dpprune")
    return summary


def _within(summary: Mapping[str, Any], *keys: str) -> Any:
    """A nested value, None where any part is missing."""
    value: Any = summary
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _traffic(summary: Mapping[str, Any], direction: str) -> Traffic:
    table = _within(summary, "bytes", direction) or {}
    payload, message = int(table.get("payload") or 0), int(table.get("message") or 0)
    return Traffic(payload, message, table.get("ratio"), table.get("message_ratio"))


def read_run(run: Path) -> Row:
    """A run directory as a row.

    Raises:
        BadInput: See `read_summary`.
    """
    summary = read_summary(run)
    live = _within(summary, "sparsity", "live_by_round") or []
    return Row(
        run=str(run),
        name=summary.get("name") or run.resolve().name,
        status=summary.get("status", "unknown"),
        rounds=len(live),
        accuracy=_within(summary, "accuracy", "last"),
        accuracy_best=_within(summary, "accuracy", "best"),
        epsilon_max=_within(summary, "privacy", "epsilon_max"),
        delta=_within(summary, "privacy", "delta"),
        accountant=_within(summary, "privacy", "accountant") or "",
        conditions=conditions(summary),
        uplink=_traffic(summary, "uplink"),
        downlink=_traffic(summary, "downlink"),
        live=live[-1] if live else None,
        parameters=_within(summary, "sparsity", "parameters"),
        total_s=_within(summary, "time", "total_s"),
    )


def read_runs(runs: Sequence[Path]) -> list[Row]:
    """All runs; the first that is none stops the reading (see `read_run`)."""
    return [read_run(run) for run in runs]


def as_json(rows: Sequence[Row]) -> str:
    """`{"runs": [...]}` with the fields of Row."""
    return to_json({"runs": [asdict(row) for row in rows]}, indent=2)


def number(value: float | None, form: str) -> str:
    """A number in a table; a dash for what was not measured."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def megabytes(count: int) -> str:
    """Bytes as MB (10^6) in a table, with three digits that count."""
    return f"{count / 1e6:.3g}" if count < 1e9 else f"{count / 1e6:.0f}"


def _bytes_cell(traffic: Traffic) -> str:
    def cell(count: int, ratio: float | None) -> str:
        return megabytes(count) + ("" if ratio is None else f" ({ratio:.1%})")

    return f"{cell(traffic.payload, traffic.ratio)}\n{cell(traffic.message, traffic.message_ratio)}"


def print_table(rows: Sequence[Row], screen: Screen) -> None:
    """Print the runs side by side."""
    from rich.box import SIMPLE
    from rich.table import Table

    deltas = {row.delta for row in rows}
    table = Table(box=SIMPLE, pad_edge=False, show_lines=len(rows) > 1)
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("status", no_wrap=True)
    for heading in (
        "rounds",
        "accuracy\nbest",
        "epsilon\ndelta",
        "up, MB (of dense)\nmessages (same)",
        "down, MB (of dense)\nmessages (same)",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("live\nof", justify="right", no_wrap=True)
    table.add_column("time, s", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name, row.status, str(row.rounds), f"{number(row.accuracy, '.3f')}\n{number(row.accuracy_best, '.3f')}",
            f"{number(row.epsilon_max, '.2f')}\n{number(row.delta, 'g')}", _bytes_cell(row.uplink), _bytes_cell(row.downlink),
            f"{number(row.live, 'd')}\n{number(row.parameters, 'd')}", number(row.total_s, ".1f"),
        )  # fmt: skip
    screen.console().print(table)
    notes = "Accuracy: last round's. Epsilon: of the client that spent most. Bytes: all clients, payload, then whole messages."
    for text in dict.fromkeys(row.conditions for row in rows if row.conditions):
        notes += "\n" + fill(f"Epsilon holds for: {text}.", NOTE_WIDTH)
    if len(deltas) > 1:
        notes += "\nThese epsilons hold at different deltas: do not compare them directly."
    print(notes, file=screen.out)


def compare(runs: Sequence[Path], screen: Screen, *, json_only: bool = False) -> None:
    """The command: a table, or JSON.

    Raises:
        BadInput: One of them is not a run.
    """
    rows = read_runs(runs)
    if json_only:
        print(as_json(rows), file=screen.out)
    else:
        print_table(rows, screen)
