"""Killed anywhere, a client never has released more than it has charged, and a restart answers with the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fed_dpprune.errors import LedgerError
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.ledger import Ledger

DELTA, ENTRY, ROUNDS = 1e-3, Entry(2.7, 0.5, 2), 10_000
MODES = ["simulation", "deployment"]
POINTS = [
    "before the charge",
    "after the insert, before the commit",
    "after the commit, before computing",
    "in the middle of computing",
    "after computing, before storing",
    "after storing, before sending",
]


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


@pytest.fixture(autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def _open(path: Path, mode: Any) -> Ledger:
    return Ledger.open(path, "data", mode=mode, accountant="rdp")


def _client(path: Path, mode: Any, wire: Path, number: int, at: Callable[[str], None]) -> None:
    """One round of a client as the federation does it; `at` is told each point and may not return."""
    ledger = _open(path, mode)
    at(POINTS[0])

    def watch(statement: str) -> None:
        if statement.startswith("COMMIT"):
            at(POINTS[1])

    ledger._sql.set_trace_callback(watch)
    charge = ledger.charge("0", key(number), "run", number, [ENTRY], rounds=ROUNDS)
    ledger._sql.set_trace_callback(None)
    at(POINTS[2])
    reply = charge.reply
    if reply is None:
        secret = os.urandom(8)
        at(POINTS[3])
        reply = number.to_bytes(8, "big") + secret
        at(POINTS[4])
        reply = ledger.store_reply(key(number), reply)
    at(POINTS[5])
    with open(wire, "ab", buffering=0) as file:
        file.write(reply)
    ledger.close()


def _released(wire: Path) -> list[bytes]:
    data = wire.read_bytes() if wire.exists() else b""
    return [data[place : place + 16] for place in range(0, len(data) - 15, 16)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("point", POINTS)
def test_released_implies_charged_wherever_the_client_is_killed(point: str, mode: Any, tmp_path: Path) -> None:
    path, wire = tmp_path / "l" / "ledger.sqlite", tmp_path / "wire"
    Ledger.create(path, "data", mode=mode, delta=DELTA, accountant="rdp").close()

    def die(where: str) -> None:
        if where == point:
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=_client, args=(path, mode, wire, 1, die))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert _released(wire) == []
    with Ledger.read(path) as ledger:
        charged = ledger.head().count
        stored = ledger.reply(key(1))
    assert charged == (0 if point in POINTS[:2] else 1)
    assert (stored is not None) == (point == POINTS[5])

    for _ in range(2):
        _client(path, mode, wire, 1, lambda where: None)
    first, second = _released(wire)
    assert first == second and (stored is None or first == stored)
    with Ledger.read(path) as ledger:
        assert ledger.head().count == 1


def _make_until(path: Path, mode: Any, last: int, count: Any) -> None:
    """Make a ledger, and kill this process at the `last` call into the system's or SQLite's code."""

    def profile(frame: Any, event: str, function: Any) -> None:
        if event != "c_call":
            return
        count.value += 1
        if count.value == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    Ledger.open_or_create(path, "data", mode=mode, delta=DELTA, accountant="rdp")
    sys.setprofile(None)


@pytest.mark.parametrize("mode", MODES)
def test_killed_anywhere_while_it_is_made_a_ledger_is_there_or_is_not(mode: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)

    def make(path: Path, last: int) -> int:
        count.value = 0
        child = context.Process(target=_make_until, args=(path, mode, last, count))
        child.start()
        child.join()
        return int(child.exitcode or 0)

    assert make(tmp_path / "whole" / "ledger.sqlite", 0) == 0
    calls, found = count.value, Counter[bool]()
    assert calls > 50
    for last in range(1, calls, max(1, calls // 80)):
        path = tmp_path / str(last) / "ledger.sqlite"
        assert make(path, last) == -signal.SIGKILL
        found[path.exists()] += 1
        with Ledger.open_or_create(path, "data", mode=mode, delta=DELTA, accountant="rdp") as ledger:
            assert ledger.charge("0", key(1), "run", 1, [ENTRY], rounds=ROUNDS).number == 1
        left = {name.name.removeprefix("ledger.sqlite") for name in path.parent.iterdir() if not name.name.endswith(".tmp")}
        assert left <= {"", ".mark", ".lock"}
    assert found[True] and found[False]


def test_what_another_ledger_of_the_name_left_is_not_rolled_into_a_new_one(tmp_path: Path) -> None:
    """An operator removes a ledger and its mark, and overlooks the journal of a write that a kill cut short."""
    path = tmp_path / "l" / "ledger.sqlite"
    journal, mark = (path.with_name(f"ledger.sqlite{ending}") for ending in ("-journal", ".mark"))
    Ledger.create(path, "other data", mode="deployment", delta=DELTA, accountant="rdp").close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = delete")
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO meta VALUES (?, ?)", [(f"key {n}", "x" * 500) for n in range(500)])
        left = journal.read_bytes()
        connection.execute("ROLLBACK")
    path.unlink()
    mark.unlink()
    journal.write_bytes(left)
    journal.chmod(0o600)
    with Ledger.create(path, "data", mode="deployment", delta=DELTA, accountant="rdp") as ledger:
        assert ledger.meta["identity"] == "data"
        assert not journal.exists()


WINDOWS = ("idle", "charging", "charged", "computing", "storing", "sending")


def _serve(path: Path, mode: Any, wire: Path, window: mmap.mmap) -> None:
    """Rounds for ever, each announced; started from a warm parent, ends by being killed."""

    def enter(name: str) -> None:
        window[0] = WINDOWS.index(name)

    enter("idle")
    ledger = _open(path, mode)
    number = ledger.head().count
    # The last round may have been cut short: it is asked for again.
    start = max(1, number)
    with open(wire, "ab", buffering=0) as file:
        for round_number in range(start, ROUNDS):
            enter("charging")
            charge = ledger.charge("0", key(round_number), "run", round_number, [ENTRY], rounds=ROUNDS)
            enter("charged")
            time.sleep(0.0002)
            enter("computing")
            reply = charge.reply
            if reply is None:
                reply = round_number.to_bytes(8, "big") + os.urandom(8)
                time.sleep(0.0002)
                enter("storing")
                reply = ledger.store_reply(key(round_number), reply)
            enter("sending")
            file.write(reply)
            time.sleep(0.0002)


@pytest.fixture
def window() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 1) as shared:
        yield shared


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_random_kills_never_release_more_than_was_charged(mode: Any, tmp_path: Path, window: mmap.mmap) -> None:
    _kill_at_random(mode, tmp_path, window, kills=100, in_each=10)


def test_random_kills_never_release_more_than_was_charged(tmp_path: Path, window: mmap.mmap) -> None:
    _kill_at_random("deployment", tmp_path, window, kills=15, in_each=2)


def _kill_at_random(mode: Any, tmp_path: Path, window: mmap.mmap, kills: int, in_each: int) -> None:
    table.epsilons([[Entry(2.7, 0.5, 2 * count)] for count in range(1, 500)], DELTA, "rdp")
    path, wire = tmp_path / "l" / "ledger.sqlite", tmp_path / "wire"
    Ledger.create(path, "data", mode=mode, delta=DELTA, accountant="rdp").close()
    context, rng, killed = multiprocessing.get_context("fork"), random.Random(1), Counter[str]()
    wanted = WINDOWS[1:]
    while sum(killed.values()) < kills or min(killed[name] for name in wanted) < in_each:
        target = min(wanted, key=lambda name: killed[name])
        window[0] = 0
        child = context.Process(target=_serve, args=(path, mode, wire, window))
        child.start()
        deadline = time.monotonic() + 10
        while WINDOWS[window[0]] == "idle" and time.monotonic() < deadline:
            time.sleep(0.0001)
        time.sleep(rng.random() * 0.004)
        while WINDOWS[window[0]] != target and time.monotonic() < deadline:
            pass
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        killed[WINDOWS[window[0]]] += 1
        assert sum(killed.values()) < 1000, killed
    _open(path, mode).close()  # what the last kill cut short is rolled back by whoever may write
    with Ledger.read(path) as ledger:
        charged, released = ledger.verify().count, _released(wire)
        rounds = [int.from_bytes(reply[:8], "big") for reply in released]
        assert set(rounds) <= set(range(1, charged + 1))
        assert len(set(released)) == len(set(rounds)), "a round that was answered twice got the same bytes"
        assert charged - len(set(rounds)) <= 1, "every cut round was taken up again"
        assert charged > kills / 10


# --- what reaches the disk, and when -----------------------------------------------------------------------------------

_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/types.h>
static void note(const char *what, int fd) {
    const char *log = getenv("SYNC_LOG");
    char link[64], name[512];
    if (!log) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, name, sizeof name - 1);
    if (size < 0) return;
    name[size] = 0;
    if (!strstr(name, "ledgerdir")) return;
    FILE *file = fopen(log, "a");
    if (file) { fprintf(file, "%s %s\n", what, name); fclose(file); }
}
int fsync(int fd) { int (*real)(int) = dlsym(RTLD_NEXT, "fsync"); int r = real(fd); note("sync", fd); return r; }
int fdatasync(int fd) { int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync"); int r = real(fd); note("sync", fd); return r; }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) {
    ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite"); note("write", fd); return real(fd, b, n, o); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) {
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    note("write", fd);
    return real(fd, b, n, o); }
ssize_t write(int fd, const void *b, size_t n) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write"); note("write", fd); return real(fd, b, n); }
"""  # fmt: skip

_CHARGES = """
import os, sys
from pathlib import Path
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.ledger import Ledger
log = open(sys.argv[2], "a", buffering=1)
ledger = Ledger.create(Path(sys.argv[1]), "data", mode="deployment", delta=1e-3, accountant="rdp")
log.write("opened\\n")
ledger.charge("0", "ab" * 16, "run", 1, [Entry(2.7, 0.5, 2)], rounds=5)
log.write("charged\\n")
ledger.store_reply("ab" * 16, b"reply")
log.write("stored\\n")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_charge_and_reply_are_on_disk_before_they_are_acted_upon(tmp_path: Path) -> None:
    source, shim, log = tmp_path / "shim.c", tmp_path / "shim.so", tmp_path / "log"
    source.write_text(_SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", str(shim), str(source), "-ldl"], check=True)
    path = tmp_path / "ledgerdir" / "ledger.sqlite"
    environment = {**os.environ, "LD_PRELOAD": str(shim), "SYNC_LOG": str(log)}
    command = [sys.executable, "-c", _CHARGES, str(path), str(log)]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[1])
    lines = log.read_text().splitlines()
    if not any(line.startswith("write") for line in lines):
        pytest.skip("this build of SQLite does not go through the C library's names")
    journal, _ = Ledger.settings("deployment")
    for begin, end in (("opened", "charged"), ("charged", "stored")):
        events = lines[lines.index(begin) + 1 : lines.index(end)]
        written = [place for place, event in enumerate(events) if event.startswith(f"write {path}")]
        assert written, "something was written"
        for place in written:
            name = events[place].removeprefix("write ")
            if not name.endswith((".lock", "-shm")):
                assert f"sync {name}" in events[place:], f"{name} was written and not synced before {end}"
        if journal == "delete":
            changed = events.index(f"write {path}")
            assert f"sync {path}-journal" in events[:changed], "the way back is on disk before the file is changed"
            assert f"sync {path.parent}" in events[changed:], "the journal's removal is on disk too"
        if end == "charged":
            assert any(event.startswith(f"sync {path}.mark") for event in events), "and so is the mark"


def test_a_ledger_that_cannot_be_charged_lets_nothing_be_computed(tmp_path: Path) -> None:
    path, wire = tmp_path / "l" / "ledger.sqlite", tmp_path / "wire"
    Ledger.create(path, "data", mode="deployment", delta=DELTA, accountant="rdp").close()
    path.write_bytes(path.read_bytes()[:2000])
    reached: list[str] = []
    with pytest.raises(LedgerError):
        _client(path, "deployment", wire, 1, reached.append)
    assert reached == [] and not wire.exists()
