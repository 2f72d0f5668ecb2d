"""`fed-dpprune sweep STUDY`: all runs of a study, those that are complete already left alone.

Each run has its own folder below the sweep's; sweep.csv is rewritten after every run, so it can be read at any moment. A
run that fails is recorded with its reason and the rest goes on. Calling it again continues what was broken off.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fed_dpprune import config as cfg
from fed_dpprune.console import Screen, plain_screen, quiet_screen
from fed_dpprune.errors import BadInput, FedDPPruneError
from fed_dpprune.places import make_folder
from fed_dpprune.records import write_atomically
from fed_dpprune.study import design, results, workers
from fed_dpprune.study.sweep_progress import SweepProgress

# Keys that say who carries the messages and how the run is called: not what it computes (invariant 11).
HOW_NOT_WHAT = ("name", "federation.backend", "federation.actors", "federation.ray-address", "federation.reply-timeout")
FINISHED = ("complete", "stopped")
EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_FAILED = 130, 3, 1


def default_out(study: design.Study) -> Path:
    """Where a study goes without another wish."""
    return Path("runs") / study.name


def _same_run(folder: Path, config: cfg.Config) -> bool:
    """Whether the folder holds a run of this very config."""
    try:
        stored = cfg.to_flat(cfg.load(folder / "config.toml"))
    except FedDPPruneError:
        return False
    wanted = cfg.to_flat(config)
    return all(stored[key] == wanted[key] for key in cfg.KEYS if key not in HOW_NOT_WHAT)


def _summary(folder: Path) -> Mapping[str, Any] | None:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def found(point: design.Point, folder: Path) -> results.Result:
    """What an earlier call left of a run: finished, or still to be done."""
    summary = _summary(folder)
    if summary is not None and summary.get("status") in FINISHED and _same_run(folder, point.config):
        return results.Result(point, summary["status"], summary.get("reason") or "", summary)
    return results.Result(point)


def _task(point: design.Point, folder: Path, backend: str) -> workers.Task:
    """How to do a run: begin it, continue it, or overwrite what another version of the study left."""
    config = cfg.build({**cfg.to_flat(point.config), "federation.backend": backend})
    filled = folder.is_dir() and any(folder.iterdir())
    resume = filled and _same_run(folder, point.config)
    return workers.Task(point.label, config, folder, resume=resume, force=filled and not resume)


class _Book:
    """The results so far, on disk after each change."""

    def __init__(self, study: design.Study, out: Path) -> None:
        self.study, self.out = study, out
        self.results = {point.label: found(point, out / point.label) for point in study.points}

    def write(self) -> None:
        results.write_csv(self.out / "sweep.csv", self.study, list(self.results.values()))

    def end(self, label: str, status: str, reason: str) -> results.Result:
        folder = self.out / label
        ended = replace(self.results[label], status=status, reason=reason, summary=_summary(folder))
        if (folder / "rounds.jsonl").exists():
            from fed_dpprune.study.figures import curves

            curves.draw(folder, folder / "curves.png")
        self.results[label] = ended
        self.write()
        return ended


def sweep(
    study_file: Path,
    screen: Screen,
    *,
    jobs: int = 1,
    out: Path | None = None,
    backend: str = "inline",
    execute: workers.Execute | None = None,
) -> int:
    """Run a study and print its table.

    Args:
        study_file: See `design`.
        screen: For progress, table and paths.
        jobs: Runs at a time; above 1 each is in a process with one thread.
        out: The sweep's folder; runs/<study name> if not given.
        backend: Carries the messages in every run; results do not depend on it.
        execute: Runs one config; `federation.run.execute` if not given.

    Returns:
        The exit code: 0, 1 when a run failed, 3 when one stopped short, 130 when interrupted.

    Raises:
        BadInput: The study file or one of its configs; nothing was written.
    """
    if jobs < 1:
        raise BadInput("--jobs", f"{jobs} is not a number of runs", "use 1 or more")
    study = design.load(study_file)
    out = default_out(study) if out is None else out
    if out.exists() and not out.is_dir():
        raise BadInput(str(out), "is a file", "choose another --out")
    try:
        make_folder(out)  # the runs in it refuse a folder that others can write
        write_atomically(out / "study.toml", study_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(str(out), f"cannot be written ({error.strerror})", "choose another --out") from None
    return _run(study, out, screen, jobs, backend, execute)


def main(study_file: Path, *, jobs: int, out: Path | None) -> int:
    """The command, on the process's own screen."""
    return sweep(study_file, plain_screen(), jobs=jobs, out=out)


def _run(study: design.Study, out: Path, screen: Screen, jobs: int, backend: str, execute: workers.Execute | None) -> int:
    book = _Book(study, out)
    book.write()
    tasks = [_task(result.point, out / label, backend) for label, result in book.results.items() if result.status == "not run"]
    started = time.monotonic()
    with quiet_screen(out / "log.txt") as real, SweepProgress(_on(screen, real), len(study.points), len(tasks)) as progress:

        def on_event(task: workers.Task, event: workers.Event) -> None:
            if event[0] == "end":
                progress.ended(book.end(task.label, event[1], event[2]))
            else:
                progress.heard(task.label, event)

        if jobs == 1:
            broken_off = workers.run_serially(tasks, execute, on_event)
        else:
            broken_off = workers.run_parallel(tasks, jobs, execute, out / "log.txt", on_event)
    _close(study, book, screen, time.monotonic() - started, broken_off)
    return _exit_code(book, broken_off)


def _on(screen: Screen, real: Screen) -> Screen:
    """The caller's screen where it is not the process's own (tests), else the real one behind the redirection."""
    import sys

    return real if screen.out in (sys.stdout, sys.__stdout__) else screen


def _close(study: design.Study, book: _Book, screen: Screen, seconds: float, broken_off: bool) -> None:
    done = list(book.results.values())
    results.print_table(study, done, screen)
    for result in done:
        if result.status == "failed":
            print(
                f"failed: {result.point.label}: {result.reason} (log: {book.out / result.point.label / 'log.txt'})",
                file=screen.out,
            )
    left = sum(result.status not in (*FINISHED, "failed") for result in done)
    if broken_off or left:
        print(f"interrupted with {left} of {len(done)} runs to go; the same command continues", file=screen.out)
    print(f"{book.out / 'sweep.csv'} ({len(done)} runs, {seconds:.0f} s)", file=screen.out)


def _exit_code(book: _Book, broken_off: bool) -> int:
    statuses = {result.status for result in book.results.values()}
    if broken_off:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if "failed" in statuses else EXIT_STOPPED if "stopped" in statuses else 0
