"""The progress of a sweep: runs and the rounds within them on a terminal, a line for each run elsewhere."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fed_dpprune.console import Screen, time_left_column
from fed_dpprune.study.compare import number
from fed_dpprune.study.results import Result

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class SweepProgress:
    """Shows a sweep as it goes.

    Args:
        screen: Where to. A screen that goes away ends the showing, not the sweep.
        runs: Of the study.
        to_do: Of them, not complete yet.
    """

    def __init__(self, screen: Screen, runs: int, to_do: int) -> None:
        self._screen, self._runs, self._done = screen, runs, runs - to_do
        self._began: dict[str, float] = {}
        self._lines: dict[str, TaskID] = {}
        self._bar: Progress | None = None
        if screen.is_terminal:
            self._bar = _bar(screen)
            self._all = self._bar.add_task("runs", total=runs, completed=self._done, figures="")
            self._bar.start()
        if self._done:
            self._say(f"{self._done} of {runs} runs are complete already")

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def heard(self, label: str, event: tuple[Any, ...]) -> None:
        """A run has begun or says how far it is (the events of `workers`)."""
        if event[0] == "start":
            self._began[label] = time.monotonic()
        if self._bar is None:
            return
        if event[0] == "start":
            self._lines[label] = self._bar.add_task(label, total=None, figures="starting")
        elif event[0] == "round":
            _, round_, rounds, accuracy, epsilon, _ = event
            shown = f"accuracy {number(accuracy, '.3f')}  epsilon {epsilon:.2f}"
            self._bar.update(self._lines[label], total=rounds, completed=round_, figures=shown)
        elif event[0] == "phase":
            self._bar.update(self._lines[label], figures=event[1])

    def ended(self, result: Result) -> None:
        """A run is over."""
        label = result.point.label
        seconds = time.monotonic() - self._began.get(label, time.monotonic())
        self._done += result.status != "interrupted"
        if self._bar is not None:
            self._bar.remove_task(self._lines.pop(label))
            self._bar.update(self._all, completed=self._done)
        figures = f"accuracy {number(result.value('accuracy_last'), '.3f')}  epsilon {number(result.value('epsilon_max'), '.2f')}"
        told = result.reason if result.status == "failed" else figures
        self._say(f"[{self._done}/{self._runs}] {label}: {result.status}, {told}, {seconds:.0f} s")

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=self._screen.out, flush=True)


def _bar(screen: Screen) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        time_left_column(),
        console=screen.console(),
        refresh_per_second=4,
        speed_estimate_period=24 * 3600.0,
        redirect_stdout=False,
        redirect_stderr=False,
    )
