"""frontier.png of a sweep: accuracy against what each client sent, payload and whole messages, mean and range over seeds."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from fed_dpprune.records import conditions
from fed_dpprune.study.figures import style


@dataclass(frozen=True)
class Arm:
    """One variant of a study.

    Attributes:
        name: The run's name without its seed.
        rounds: Of every run.
        accuracy: Of the last round, 0..1, one per seed.
        payload: Uplink payload of one client over the run, bytes, mean over seeds.
        message: The same as whole messages.
        epsilon: The largest of any client.
        conditions: Under which the epsilon holds, delta included.
    """

    name: str
    rounds: int
    accuracy: Sequence[float]
    payload: float
    message: float
    epsilon: float
    conditions: str = ""


def read(folder: Path) -> list[Arm]:
    """The arms of every complete run at or below a folder, those that sent most first; runs without an accuracy are left out."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for path in sorted(folder.rglob("summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if (summary.get("accuracy") or {}).get("last") is None:
            continue
        name = re.sub(r"(_rounds=\d+)?_seed=\d+$", "", summary.get("name") or "run")
        groups.setdefault((name, int(summary.get("rounds") or 0)), []).append(summary)
    arms = [_arm(name, rounds, runs) for (name, rounds), runs in groups.items()]
    return sorted(arms, key=lambda arm: (arm.rounds, -arm.payload, arm.name))


def _arm(name: str, rounds: int, runs: Sequence[Mapping[str, Any]]) -> Arm:
    def mean(key: str) -> float:
        return statistics.fmean(run["bytes"]["uplink"][key] / len(run["privacy"]["nominal_sizes"]) for run in runs)

    epsilon = max(float(run["privacy"]["epsilon_max"]) for run in runs)
    accuracy = [float(run["accuracy"]["last"]) for run in runs]
    told = f"at delta {runs[0]['privacy'].get('delta')}: {conditions(runs[0])}"
    return Arm(name, rounds, accuracy, mean("payload"), mean("message"), epsilon, told)


def draw(folder: Path, path: Path) -> None:
    """Write the picture of a sweep's folder to `path` as PNG."""
    arms = read(folder)
    with style.canvas(7.2, 4.4) as figure:
        if arms:
            _frontier(figure.add_subplot(), arms)
        else:
            figure.text(0.5, 0.5, "no run is complete", ha="center", va="center", color=style.GREY)
        style.write(figure, path)


def _frontier(axes: Any, arms: Sequence[Arm]) -> None:
    lengths = sorted({arm.rounds for arm in arms})
    for place, rounds in enumerate(lengths):
        some = [arm for arm in arms if arm.rounds == rounds]
        colour = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE)[place % 4]
        marker = style.MARKERS[place % len(style.MARKERS)]
        middle = [100 * statistics.fmean(arm.accuracy) for arm in some]
        spread = [
            [m - 100 * min(arm.accuracy) for m, arm in zip(middle, some, strict=True)],
            [100 * max(arm.accuracy) - m for m, arm in zip(middle, some, strict=True)],
        ]
        axes.errorbar(
            [arm.payload for arm in some],
            middle,
            yerr=spread,
            fmt=marker,
            color=colour,
            capsize=3,
            label=f"{rounds} rounds, payload",
        )
        axes.plot(
            [arm.message for arm in some], middle, marker, markerfacecolor="white", markeredgecolor=colour, linestyle="none",
            label=f"{rounds} rounds, whole messages",
        )  # fmt: skip
        for arm, height in zip(some, middle, strict=True):
            axes.plot([arm.payload, arm.message], [height, height], ":", color=colour, linewidth=1.0)
            axes.annotate(arm.name, (arm.payload, height), xytext=(7, 5), textcoords="offset points", color=colour, fontsize=8)
    seeds = max(len(arm.accuracy) for arm in arms)
    epsilon = max(arm.epsilon for arm in arms)
    axes.set_xscale("log")
    axes.set_title(f"Accuracy against bytes sent, epsilon {epsilon:.2f} for all (mean and range of {seeds} seeds)")
    axes.set(xlabel="bytes that one client sends over the run", ylabel="test accuracy, %")
    axes.legend(loc="lower right")
    told = "; ".join(sorted({arm.conditions for arm in arms if arm.conditions}))
    if told:
        axes.figure.supxlabel(fill(f"epsilon {told}", 125), x=0.01, ha="left", fontsize=6.5, color=style.GREY)
