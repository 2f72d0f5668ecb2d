"""Runs one after another in this process, or several at a time in processes of their own.

A worker process is one that Python starts afresh, so nothing of the parent's state (threads, Ray, torch) is copied; it has
one thread for arithmetic, and a session of its own: the parent alone hears Ctrl-C and asks each worker once. A worker that
dies (out of memory, a crash in C) costs its run, not the sweep.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from fed_dpprune import config as cfg
from fed_dpprune.console import calm_environment, quiet_screen
from fed_dpprune.errors import FedDPPruneError
from fed_dpprune.records import RoundRecord

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Event = tuple[Any, ...]


class Execute(Protocol):
    """`federation.run.execute`, or a test's stand-in. The outcome has `status` and `error`."""

    def __call__(
        self, config: cfg.Config, out: Path, *, resume: bool, force: bool, observer: Any, on_ready: Callable[[Any], None]
    ) -> Any:
        """Run to the end, whatever that end is."""


@dataclass(frozen=True)
class Task:
    """One run to do; `resume` and `force` as in `fed-dpprune run`."""

    label: str
    config: cfg.Config
    out: Path
    resume: bool
    force: bool


class Told:
    """An observer that turns what it hears into events.

    The events are ("phase", text), ("round", round, rounds, accuracy, epsilon, megabytes) and ("note", text).
    """

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self._tell = tell

    def phase(self, text: str) -> None:
        """As in Observer."""
        self._tell(("phase", text))

    def round_done(self, record: RoundRecord, rounds: int, epsilon_so_far: float, megabytes: float) -> None:
        """As in Observer."""
        self._tell(("round", record.round, rounds, record.accuracy, epsilon_so_far, megabytes))

    def note(self, text: str) -> None:
        """As in Observer."""
        self._tell(("note", text))

    def close(self) -> None:
        """As in Observer."""


def default_execute() -> Execute:
    """The real one; imported late because it brings torch and Flower."""
    from fed_dpprune.federation.run import execute

    return execute


def run_task(task: Task, execute: Execute | None, tell: Callable[[Event], None]) -> tuple[str, str]:
    """Run a task, its chatter into its own log.txt, and return its status and the reason for it."""
    with ExitStack() as stack:

        def ready(_: Any) -> None:
            stack.enter_context(quiet_screen(task.out / "log.txt"))

        try:
            perform = execute or default_execute()
            outcome = perform(task.config, task.out, resume=task.resume, force=task.force, observer=Told(tell), on_ready=ready)
        except KeyboardInterrupt:
            return "interrupted", "interrupted by the user"
        except Exception as error:  # whatever it is, it is this run's and not the sweep's
            return "failed", _reason(error)
    return str(outcome.status), "" if outcome.error is None else _reason(outcome.error)


def _reason(error: BaseException) -> str:
    text = str(error) if isinstance(error, FedDPPruneError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def run_serially(tasks: Sequence[Task], execute: Execute | None, on_event: Callable[[Task, Event], None]) -> bool:
    """Run tasks here, in order; events end with ("end", status, reason). True when the user broke it off."""
    for task in tasks:
        on_event(task, ("start",))
        status, reason = run_task(task, execute, lambda event, task=task: on_event(task, event))  # type: ignore[misc]
        on_event(task, ("end", status, reason))
        if status == "interrupted":
            return True
    return False


def _serve(pipe: Connection, execute: Execute | None, log: Path) -> None:
    """A worker's life: take a task, tell its events, until the parent hangs up."""
    if hasattr(os, "setsid"):
        os.setsid()
    with quiet_screen(log), suppress(EOFError, OSError, KeyboardInterrupt):
        while (task := pipe.recv()) is not None:
            pipe.send(("end", *run_task(task, execute, pipe.send)))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Children started inside inherit an environment in which libraries use one thread."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Worker:
    """One worker process and the task it has."""

    def __init__(self, execute: Execute | None, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, execute, log), daemon=False)
        with _one_thread_each():
            self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        with suppress(OSError):  # a worker that is dead already shows at the next look
            self.pipe.send(task)

    def next_event(self) -> Event:
        """What it says; a dead worker says how it ended."""
        try:
            return tuple(self.pipe.recv())
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            return ("end", "failed", f"its process ended {how}")

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def interrupt(self) -> None:
        if self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)

    def end(self, *, now: bool = False) -> None:
        with suppress(OSError):
            self.pipe.send(None)
        self.pipe.close()
        if now:
            self.process.terminate()
        self.process.join()


def run_parallel(
    tasks: Sequence[Task], jobs: int, execute: Execute | None, log: Path, on_event: Callable[[Task, Event], None]
) -> bool:
    """Run tasks in at most `jobs` worker processes; as `run_serially`, in whatever order they end."""
    calm_environment()
    waiting, broken_off = list(tasks), False
    workers = [_Worker(execute, log) for _ in range(min(jobs, len(waiting)))]
    try:
        while True:
            try:
                for place, worker in enumerate(workers):
                    if worker.task is None and waiting and not broken_off:
                        if not worker.alive:
                            worker.end()
                            worker = workers[place] = _Worker(execute, log)
                        task = waiting.pop(0)
                        on_event(task, ("start",))
                        worker.give(task)
                busy = [worker for worker in workers if worker.task is not None]
                if not busy:
                    return broken_off
                _listen(busy, on_event)
            except KeyboardInterrupt:
                if broken_off:
                    raise
                broken_off = True
                for worker in workers:
                    if worker.task is not None:
                        worker.interrupt()
    finally:
        for worker in workers:
            worker.end(now=worker.task is not None)


def _listen(busy: Sequence[_Worker], on_event: Callable[[Task, Event], None]) -> None:
    """Wait until a worker says something, and pass on what each has to say."""
    ready = wait([worker.pipe for worker in busy])
    for worker in busy:
        if worker.pipe in ready and worker.task is not None:
            event, task = worker.next_event(), worker.task
            if event[0] == "end":
                worker.task = None
            on_event(task, event)
