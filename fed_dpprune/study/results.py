"""What a sweep found: a row a run (CSV), and a table of mean and spread over the seeds of each variant."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

from fed_dpprune.console import Screen
from fed_dpprune.records import conditions, write_atomically
from fed_dpprune.study.compare import NOTE_WIDTH, megabytes, number
from fed_dpprune.study.design import Point, Study

# Column of the CSV -> where it lies in summary.json.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "accuracy_last": ("accuracy", "last"),
    "accuracy_best": ("accuracy", "best"),
    "accuracy_best_round": ("accuracy", "best_round"),
    "loss_last": ("loss", "last"),
    "epsilon_max": ("privacy", "epsilon_max"),
    "epsilon_median": ("privacy", "epsilon_median"),
    "delta": ("privacy", "delta"),
    "noise_multiplier": ("privacy", "noise_multiplier"),
    "clip_norm": ("privacy", "clip_norm"),
    "bytes_up": ("bytes", "uplink", "payload"),
    "message_bytes_up": ("bytes", "uplink", "message"),
    "dense_bytes_up": ("bytes", "uplink", "dense_float32"),
    "ratio_up": ("bytes", "uplink", "ratio"),
    "message_ratio_up": ("bytes", "uplink", "message_ratio"),
    "bytes_down": ("bytes", "downlink", "payload"),
    "message_bytes_down": ("bytes", "downlink", "message"),
    "ratio_down": ("bytes", "downlink", "ratio"),
    "message_ratio_down": ("bytes", "downlink", "message_ratio"),
    "parameters": ("sparsity", "parameters"),
    "live_after_pruning": ("sparsity", "live_after_pruning"),
    "representation_sparsity": ("sparsity", "representation"),
    "total_s": ("time", "total_s"),
    "round_median_s": ("time", "round_median_s"),
    "client_compute_s": ("time", "client_compute_s"),
}


@dataclass(frozen=True)
class Result:
    """A run of the study and how it ended.

    Attributes:
        point: Which run.
        status: One of `records.STATUSES`, or "not run" while it is still to come.
        reason: Why it is not complete.
        summary: As in summary.json; empty when there is none.
    """

    point: Point
    status: str = "not run"
    reason: str = ""
    summary: Mapping[str, Any] | None = None

    def value(self, column: str) -> Any:
        """A column's value, None where it was not measured."""
        value: Any = self.summary or {}
        for key in COLUMNS[column]:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def to_csv(study: Study, results: Sequence[Result]) -> str:
    """Tidy: a row a run, a column a fact; what was not measured is empty. Axes go by their config keys."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "variant", *study.axes, "seed", "status", "reason", "rounds", "live_last", *COLUMNS])
    for result in results:
        live = ((result.summary or {}).get("sparsity") or {}).get("live_by_round") or []
        settings = [_plain(result.point.settings.get(key)) for key in study.axes]
        measured = [result.value(column) for column in COLUMNS]
        facts = [result.status, result.reason, len(live), live[-1] if live else None, *measured]
        writer.writerow([result.point.label, result.point.variant, *settings, result.point.seed, *facts])
    return text.getvalue()


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def write_csv(path: Path, study: Study, results: Sequence[Result]) -> None:
    """Replace the CSV in one step."""
    write_atomically(path, to_csv(study, results))


def spread(values: Sequence[float], form: str) -> str:
    """Mean and sample standard deviation as text; a single value stands alone, none is a dash."""
    kept = [value for value in values if value is not None and math.isfinite(value)]
    if not kept:
        return "-"
    mean = format(statistics.fmean(kept), form)
    return mean if len(kept) == 1 else f"{mean} ± {format(statistics.stdev(kept), form)}"


def _group(result: Result) -> tuple[str, tuple[tuple[str, str], ...]]:
    return result.point.variant, tuple((key, str(_plain(value))) for key, value in result.point.settings.items())


def print_table(study: Study, results: Sequence[Result], screen: Screen) -> None:
    """Print a row for each variant and setting: mean and spread over its seeds that have figures."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("variant", overflow="fold", min_width=8)
    for key in study.axes:
        table.add_column(key.rsplit(".", 1)[-1], justify="right", overflow="fold")
    for heading in ("seeds", "accuracy, last", "lowest", "epsilon", "up, MB", "of dense", "messages", "live, last", "time, s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (variant, settings), members in groupby(results, _group):
        table.add_row(variant, *(value for _, value in settings), *_cells(list(members)))
    screen.console().print(table)
    deltas = {value for result in results if (value := result.value("delta")) is not None}
    at = f" at delta = {next(iter(deltas)):g}" if len(deltas) == 1 else ", at different deltas" if deltas else ""
    print(
        f"Mean ± sample standard deviation over seeds; lowest: the worst seed. Epsilon: largest of any client{at}.\n"
        "Of dense: uplink payload / dense float32; messages: whole uplink messages / the same.",
        file=screen.out,
    )
    for text in dict.fromkeys(conditions(result.summary or {}) for result in results):
        if text:
            print(fill(f"Epsilon holds for: {text}.", NOTE_WIDTH), file=screen.out)


def _cells(members: Sequence[Result]) -> list[str]:
    """The figures of one variant and setting. Only complete and stopped runs count: a broken-off one would blur the mean."""
    counted = [member for member in members if member.status in ("complete", "stopped")]

    def values(column: str) -> list[float]:
        return [value for member in counted if (value := member.value(column)) is not None]

    live = [member.summary["sparsity"]["live_by_round"][-1] for member in counted if member.summary and _has_live(member.summary)]

    def mean(column: str) -> float | None:
        return statistics.fmean(values(column)) if values(column) else None

    return [
        f"{len(counted)}" if len(counted) == len(members) else f"{len(counted)} of {len(members)}",
        spread(values("accuracy_last"), ".3f"),
        number(min(values("accuracy_last"), default=None), ".3f"),
        number(max(values("epsilon_max"), default=None), ".2f"),
        megabytes(round(statistics.fmean(values("bytes_up")))) if values("bytes_up") else "-",
        number(mean("ratio_up"), ".1%"),
        number(mean("message_ratio_up"), ".1%"),
        number(statistics.fmean(live) if live else None, ".0f"),
        spread(values("total_s"), ".0f"),
    ]


def _has_live(summary: Mapping[str, Any]) -> bool:
    return bool((summary.get("sparsity") or {}).get("live_by_round"))
