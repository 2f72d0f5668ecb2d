"""What the user sees: a screen that only we write to, the progress of a run, and errors in one line.

Ray, Flower and the libraries under them write to the process's stdout and stderr, from C++ and from child processes too.
`quiet_screen` therefore moves the file descriptors themselves to log.txt and keeps the real screen for us. rich is
imported where it is used, so that this module costs nothing to a command that prints one line.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fed_dpprune.errors import FedDPPruneError
from fed_dpprune.records import RoundRecord

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn

CALM: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Every actor's lines, not "repeated 9x": the log is for finding out what went wrong.
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    # Without it Ray warns at each start that it will stop hiding GPUs from actors that ask for none.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GRPC_VERBOSITY": "ERROR",
}
PLAIN_WIDTH = 120
MOST_ROUND_LINES = 18
MOST_NOTES = 5


def calm_environment() -> None:
    """Switch off telemetry and chatter of Flower and Ray; call it before either is imported. What the user set stands."""
    for name, value in CALM.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Screen:
    """The real stdout and stderr, wherever the file descriptors 1 and 2 lead meanwhile."""

    out: TextIO
    err: TextIO

    @property
    def is_terminal(self) -> bool:
        """Whether bars and colours may be drawn."""
        return self.out.isatty() and os.environ.get("TERM") != "dumb"

    def console(self) -> Console:
        """A rich console on stdout; without a terminal it writes no control codes and 120 columns."""
        from rich.console import Console

        width = PLAIN_WIDTH
        if self.is_terminal:
            with suppress(OSError):
                width = os.get_terminal_size(self.out.fileno()).columns or shutil.get_terminal_size().columns
        return Console(file=self.out, force_terminal=self.is_terminal, width=width, highlight=False, emoji=False)


def plain_screen() -> Screen:
    """The screen of a command that silences nothing."""
    return Screen(sys.stdout, sys.stderr)


def _flush() -> None:
    """Write out what Python and C still hold, so that it lands where it was meant to."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).fflush(None)


def _duplicate(descriptor: int) -> int:
    """A private copy of an open descriptor, or of nowhere when the process was started without it."""
    try:
        return os.dup(descriptor)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


@contextmanager
def _python_streams(descriptors: Mapping[str, int]) -> Iterator[None]:
    """Lead `sys.stdout` and `sys.stderr` to the descriptors where they are not so already (notebooks, captured tests).

    A stream that stands on its descriptor is left alone: log handlers keep a reference to it, and it stays valid afterwards.
    """
    before = {name: getattr(sys, name) for name in descriptors}
    try:
        for name, descriptor in descriptors.items():
            current = None
            with suppress(OSError, ValueError, AttributeError):
                current = before[name].fileno()
            if current != descriptor:
                # On the descriptor itself: a log handler made meanwhile can still write to it afterwards.
                stream = open(descriptor, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
                setattr(sys, name, stream)
        yield
    finally:
        for name, stream in before.items():
            with suppress(OSError, ValueError):
                getattr(sys, name).flush()
            setattr(sys, name, stream)


@contextmanager
def quiet_screen(log_path: Path) -> Iterator[Screen]:
    """Send all that this process and its children write to `log_path` (appended), and hand the real screen to the caller.

    The descriptors are put back at the end, also after an exception or Ctrl-C. Print a closing summary inside the block:
    it shares the screen object, and what libraries say at shutdown still goes to the log.
    """
    calm_environment()
    _flush()
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    saved = (_duplicate(1), _duplicate(2))
    screen = Screen(*(os.fdopen(os.dup(copy), "w", buffering=1, encoding="utf-8", errors="replace") for copy in saved))
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        with _python_streams({"stdout": 1, "stderr": 2}):
            try:
                yield screen
            finally:
                _flush()
    finally:
        for stream in (screen.out, screen.err):
            with suppress(OSError):
                stream.close()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(log)


def figures(record: RoundRecord, epsilon: float, megabytes: float) -> str:
    """The numbers of a round as the screen shows them."""
    accuracy = "" if record.accuracy is None else f"accuracy {record.accuracy:.3f}  "
    return f"{accuracy}epsilon {epsilon:.2f}  {megabytes:.2f} MB up"


class Progress:
    """Shows a run as it goes: a bar on a terminal, else a line for each event.

    Args:
        screen: Where to. A screen that goes away (a closed pipe) ends the showing, not the run.
    """

    def __init__(self, screen: Screen) -> None:
        self._screen, self._shown_round = screen, 0
        self._started = time.monotonic()
        self._notes: list[str] = []
        self._bar: RichProgress | None = None
        if screen.is_terminal:
            self._bar = _bar(screen)
            self._task = self._bar.add_task("starting", total=None, figures="")
            self._bar.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def phase(self, text: str) -> None:
        """What happens now, for example "starting Ray"."""
        if self._bar is not None:
            self._bar.update(self._task, description=text, refresh=True)
        else:
            self._say(f"{text} ...")

    def round_done(self, record: RoundRecord, rounds: int, epsilon_so_far: float, megabytes: float) -> None:
        """A round has ended. `megabytes` (10^6 bytes) is the uplink payload of all rounds so far."""
        shown = figures(record, epsilon_so_far, megabytes)
        if self._bar is not None:
            self._bar.update(self._task, description="training", total=rounds, completed=record.round, figures=shown)
        elif self._is_due(record.round, rounds):
            self._shown_round = record.round
            self._say(f"round {record.round}/{rounds}  {shown}  {time.monotonic() - self._started:.0f} s")

    def _is_due(self, round_: int, rounds: int) -> bool:
        """Without a terminal a long run prints its first, its last, and evenly spaced rounds between."""
        stride = -(-rounds // MOST_ROUND_LINES)
        return round_ in (1, rounds) or round_ - self._shown_round >= stride

    def note(self, text: str) -> None:
        """Something the user should know now; each text once, and the first few only (the log has them all)."""
        if text in self._notes:
            return
        self._notes.append(text)
        if len(self._notes) <= MOST_NOTES:
            self._say(text)
        elif len(self._notes) == MOST_NOTES + 1:
            self._say("further notes are in log.txt only")

    def close(self) -> None:
        """Leave the bar as it stands and give the cursor back; may be called twice."""
        if self._bar is not None:
            self._bar.stop()

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=self._screen.out, flush=True)


def time_left_column() -> ProgressColumn:
    """Shows `0:12 left`, and nothing while no pace is known: a lone "left" would be read with the time before it."""
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            seconds = task.time_remaining
            if seconds is None or task.finished:
                return Text("")
            minutes, rest = divmod(int(seconds), 60)
            return Text(f"{minutes}:{rest:02d} left", style="progress.remaining")

    return TimeLeft()


def _bar(screen: Screen) -> RichProgress:
    """A one-line bar that fits into 80 columns and does not catch what libraries print."""
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    console = screen.console()
    return RichProgress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=max(4, min(40, console.width - 76))),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        time_left_column(),
        console=console,
        refresh_per_second=4,
        # The pace over the whole run: rounds may be slow, and Ray's start is before the first one.
        speed_estimate_period=3600.0,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def error_line(error: BaseException, *, log_path: Path | None = None) -> str:
    """`fed-dpprune: what: why; fix`, whatever the error is, on one line."""
    if isinstance(error, FedDPPruneError):
        text = str(error)
    else:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        text = f"unexpected failure: {reason}; --debug shows where"
    if log_path is not None:
        text += f" (log: {log_path})"
    return "fed-dpprune: " + " ".join(text.split())


def print_error(error: BaseException, *, file: TextIO | None = None, log_path: Path | None = None) -> None:
    """Print `error_line` to stderr, or to the real stderr of a quiet screen."""
    with suppress(OSError, ValueError):
        print(error_line(error, log_path=log_path), file=file or sys.stderr, flush=True)
