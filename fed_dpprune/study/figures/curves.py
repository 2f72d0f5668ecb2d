"""curves.png of a run: accuracy and epsilon over rounds, accuracy over what the clients sent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from textwrap import fill
from typing import Any

from fed_dpprune.records import RoundRecord, conditions, read_lines
from fed_dpprune.study.figures import style


@dataclass(frozen=True)
class Curves:
    """What the picture shows; all sequences have one entry per completed round.

    Attributes:
        rounds: Their numbers, from 1.
        accuracy: On held-out test data, 0..1; NaN where it was not measured.
        epsilon: Of the client that has spent most, so far.
        bytes_up: Uplink payload of all rounds so far.
        dense_bytes_up: What the same messages as dense float32 would have cost over the run; 0 if unknown.
        delta: Of the epsilon; NaN if unknown.
        name: The run's name, may be empty.
        message_bytes_up: What the whole messages weighed over the run, framing and all.
        conditions: Under which the epsilons hold, may be empty.
    """

    rounds: Sequence[int]
    accuracy: Sequence[float]
    epsilon: Sequence[float]
    bytes_up: Sequence[int]
    dense_bytes_up: int
    delta: float
    name: str = ""
    message_bytes_up: int = 0
    conditions: str = ""


def from_records(records: Sequence[RoundRecord], *, delta: float, dense_bytes_up: int, name: str = "") -> Curves:
    """The curves of records in memory."""
    return Curves(
        [record.round for record in records],
        [_number(record.accuracy) for record in records],
        [record.epsilon_max for record in records],
        list(accumulate(record.bytes_up for record in records)),
        dense_bytes_up,
        delta,
        name,
        sum(record.message_up for record in records),
    )


def read(run_dir: Path) -> Curves:
    """The curves of a run directory: rounds.jsonl, and summary.json as far as it is there."""
    lines = list(read_lines(run_dir / "rounds.jsonl"))
    summary: Mapping[str, Any] = {}
    if (run_dir / "summary.json").exists():
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return Curves(
        [int(line["round"]) for line in lines],
        [_number(line["accuracy"]) for line in lines],
        [_number(line["epsilon_max"]) for line in lines],
        list(accumulate(int(line["bytes_up"]) for line in lines)),
        int(summary.get("bytes", {}).get("uplink", {}).get("dense_float32") or 0),
        _number(summary.get("privacy", {}).get("delta")),
        summary.get("name") or "",
        sum(int(line.get("message_up") or 0) for line in lines),
        conditions(summary),
    )


def _number(value: float | None) -> float:
    """JSON writes what is not finite as null."""
    return math.nan if value is None else float(value)


def draw(run: Path | Curves, path: Path) -> None:
    """Write the picture of a run (a run directory or its curves) to `path` as PNG."""
    curves = run if isinstance(run, Curves) else read(run)
    with style.canvas(8.0, 4.2) as figure:
        if curves.name:
            figure.suptitle(curves.name, x=0.01, ha="left", fontsize=10, fontweight="bold")
        if curves.rounds:
            figure.get_layout_engine().set(wspace=0.06)
            grid = figure.add_gridspec(2, 2)
            accuracy = figure.add_subplot(grid[0, 0])
            _over_rounds(accuracy, figure.add_subplot(grid[1, 0], sharex=accuracy), curves)
            _over_bytes(figure.add_subplot(grid[:, 1]), curves)
            if curves.conditions:
                figure.supxlabel(fill(f"epsilon: {curves.conditions}", 135), x=0.01, ha="left", fontsize=6.5, color=style.GREY)
        else:
            figure.text(0.5, 0.5, "no round is complete", ha="center", va="center", color=style.GREY)
        style.write(figure, path)


def _over_rounds(accuracy: Any, epsilon: Any, curves: Curves) -> None:
    accuracy.set_title("Accuracy over rounds")
    _accuracy_line(accuracy, curves.rounds, curves)
    _label_last(accuracy, curves.rounds, curves.accuracy, f"{curves.accuracy[-1]:.3f}", style.BLUE, below=True)
    accuracy.tick_params(labelbottom=False)
    named = "" if math.isnan(curves.delta) else f" at delta = {curves.delta:g}"
    epsilon.set_title(f"Privacy spent over rounds{named}")
    every = style.mark_every(len(curves.rounds))
    epsilon.plot(curves.rounds, curves.epsilon, "--s", color=style.VERMILLION, markevery=every, clip_on=False)
    epsilon.set(xlabel="round", ylabel="epsilon, largest client")
    epsilon.xaxis.get_major_locator().set_params(integer=True)
    epsilon.set_xlim(0, curves.rounds[-1] + 0.5)
    if _finite(curves.epsilon):
        epsilon.set_ylim(0, max(_finite(curves.epsilon)) * 1.25)
    _label_last(epsilon, curves.rounds, curves.epsilon, f"{curves.epsilon[-1]:.2f}", style.VERMILLION)


def _over_bytes(axes: Any, curves: Curves) -> None:
    most = max(curves.bytes_up[-1], curves.dense_bytes_up, 1)
    divisor, unit = style.byte_scale(most)
    sent = [total / divisor for total in curves.bytes_up]
    axes.set_title("Accuracy over bytes sent by all clients")
    _accuracy_line(axes, sent, curves)
    axes.set_xlabel(f"uplink payload so far, {unit}")
    axes.set_xlim(0, most / divisor * 1.04)
    _label_last(axes, sent, curves.accuracy, f"{curves.accuracy[-1]:.3f}", style.BLUE, below=curves.bytes_up[-1] > most / 2)
    if curves.dense_bytes_up:
        dense, share = curves.dense_bytes_up / divisor, curves.bytes_up[-1] / curves.dense_bytes_up
        axes.axvline(dense, color=style.GREY, linestyle=":", linewidth=1.4)
        whole = curves.message_bytes_up / curves.dense_bytes_up
        height, edge = (0.97, "top") if curves.accuracy[-1] < 0.4 else (0.03, "bottom")  # away from the curve
        axes.annotate(
            f"these rounds as dense\nfloat32: {dense:.3g} {unit}\n(sent: {share:.1%} of it)\nwhole messages: {whole:.1%}",
            (dense, height),
            xycoords=("data", "axes fraction"), xytext=(-5, 0), textcoords="offset points", ha="right", va=edge,
            color=style.GREY, fontsize=8.5, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip


def _accuracy_line(axes: Any, across: Sequence[float], curves: Curves) -> None:
    points = list(zip(across, curves.accuracy, strict=True))
    measured = [point for point in points if math.isfinite(point[1])] or points
    axes.plot(*zip(*measured, strict=True), "-o", color=style.BLUE, markevery=style.mark_every(len(measured)), clip_on=False)
    axes.set(ylabel="test accuracy", ylim=(0, 1))


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _label_last(
    axes: Any, across: Sequence[float], values: Sequence[float], text: str, colour: str, *, below: bool = False
) -> None:
    """Write the last value at its point: last is what the words accuracy and epsilon mean."""
    below = below and values[-1] > 0.2
    if math.isfinite(values[-1]):
        axes.annotate(
            text, (across[-1], values[-1]), xytext=(0, -11 if below else 6), textcoords="offset points", ha="right",
            va="top" if below else "bottom", color=colour, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
