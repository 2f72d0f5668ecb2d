"""The plan's estimate of memory and time beside what a run takes: `python benchmarks/plan_estimate.py CONFIG --set rounds...`.

Runs the config inline, in this process, into a temporary folder. CPU seconds, because a busy machine stretches the wall clock;
inline, one thread does everything, so on an idle machine the two are the same. The first round warms up and is left out of the
median. Needs the config's data.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from fed_dpprune import config as cfg
from fed_dpprune.federation import run as running
from fed_dpprune.federation.facts import prepare
from fed_dpprune.federation.observer import LogObserver
from fed_dpprune.records import RoundRecord


class Clock(LogObserver):
    """Notes the process's CPU time at the end of each round."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def round_done(self, record: RoundRecord, rounds: int, epsilon_so_far: float, megabytes: float) -> None:
        """A round has ended."""
        self.ends.append(time.process_time())


def measure(config: cfg.Config) -> dict[str, Any]:
    """Estimate and outcome of a run of at least two rounds: CPU seconds by round and in all, peak resident set."""
    clock, prepared = Clock(), prepare(config)
    with tempfile.TemporaryDirectory() as folder:
        outcome = running.execute(config, Path(folder) / "run", observer=clock, prepared=prepared)
    if outcome.error is not None:
        raise outcome.error
    rough = prepared[1].estimate
    rounds = [after - before for before, after in pairwise(clock.ends)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "estimate": rough.as_json(),
        "estimated_round_s": statistics.median(rough.seconds_by_round[1:]) if rough.seconds_by_round else None,
        "round_cpu_s": statistics.median(rounds),
        "cpu_s": time.process_time(),
        "peak_mb": peak / 1e6,
    }


def main() -> None:
    """One line, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(cfg.load(arguments.config, [*arguments.overrides, "federation.backend=inline"]))
    if arguments.json:
        print(json.dumps(found))
        return
    rough = found["estimate"]
    for name, unit, guess, real in (
        ("round", "s", found["estimated_round_s"], found["round_cpu_s"]),
        ("run", "s", rough["seconds"], found["cpu_s"]),
        ("memory", "MB", rough["client_memory_mb"], found["peak_mb"]),
    ):
        print(f"{name:<7} {real:.3g} {unit}, estimated {guess:.3g} {unit}" + (f" ({guess / real:.2f})" if guess else ""))


if __name__ == "__main__":
    main()
