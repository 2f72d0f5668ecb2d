"""Who may touch a ledger file: locks between processes and threads, marks beside the file, safe creation.

POSIX record locks are used: a forked child does not inherit them, and they vanish with their process, killed or not.
They know nothing of threads and of two openings in one process; the sets and locks here do.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fed_dpprune import places
from fed_dpprune.errors import LedgerError

_held: set[str] = set()
_guard = threading.Lock()


def beside(path: Path, ending: str) -> Path:
    """A file next to the ledger: `client.sqlite` and "lock" give `client.sqlite.lock`."""
    return path.with_name(f"{path.name}.{ending}")


def beside_sqlite(path: Path, ending: str) -> Path:
    """SQLite's own companions: `-wal`, `-shm`, `-journal`."""
    return path.with_name(path.name + ending)


class Lock:
    """An exclusive lock on `<ledger>.lock`."""

    def __init__(self, path: Path) -> None:
        self._path = beside(path, "lock")
        self._name = str(self._path.absolute())
        self._handle = -1

    @property
    def mine(self) -> bool:
        """Whether this object holds the lock."""
        return self._handle >= 0

    def acquire(self, wait_s: float = 0.0) -> bool:
        """Take the lock, waiting at most `wait_s` seconds; whether it was taken."""
        deadline = time.monotonic() + wait_s
        while True:
            if self._try():
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)

    def _try(self) -> bool:
        with _guard:
            if self._name in _held:
                return False
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The holder before us may have removed the file that we opened: a lock on it would keep nobody out.
                current = os.fstat(handle).st_ino == os.stat(self._path).st_ino
            except OSError:
                current = False
            if not current:
                os.close(handle)
                return False
            _held.add(self._name)
            self._handle = handle
            return True

    def release(self, remove: bool = False) -> None:
        """Give the lock back, and remove its file if asked to; nothing when it is not held."""
        with _guard:
            if self._handle >= 0:
                if remove:
                    self._path.unlink(missing_ok=True)
                os.close(self._handle)
                self._handle = -1
                _held.discard(self._name)

    @contextlib.contextmanager
    def held(self, path: Path, wait_s: float) -> Iterator[None]:
        """The lock for the length of a block.

        Raises:
            LedgerError: Somebody else held it for `wait_s` seconds.
        """
        if not self.acquire(wait_s):
            raise LedgerError(str(path), f"is in use by another process for {wait_s:g} s", "stop that process, or try again")
        try:
            yield
        finally:
            self.release()


def _forget_after_fork() -> None:
    """A forked child holds none of its parent's locks."""
    global _guard
    _guard = threading.Lock()
    _held.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def make_directory(directory: Path) -> None:
    """A directory that only its owner can change, made for its owner alone (0700) when it is missing.

    Raises:
        LedgerError: The place is not writable, or others can change it.
    """
    try:
        places.private_folder(directory)
    except places.NotAlone as refusal:
        raise LedgerError(str(directory), f"is not this user's alone: {refusal}") from None
    except OSError as error:
        raise LedgerError(str(directory), f"cannot be made ({error.strerror})", "name a directory that you own") from None


def create_private(path: Path) -> None:
    """Make an empty file that only its owner can read (0600).

    Raises:
        LedgerError: The file exists, or the place is not writable.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        sync_directory(path.parent)
    except FileExistsError:
        raise LedgerError(str(path), "exists already", "open it, or name another file") from None
    except OSError as error:
        raise LedgerError(str(path), f"cannot be made ({error.strerror})", "name a file in a directory that you own") from None


def refuse_existing(path: Path) -> None:
    """Refuse to make what is there, a link that leads nowhere included.

    Raises:
        LedgerError: The name is taken.
    """
    if os.path.lexists(path):
        raise LedgerError(str(path), "exists already", "open it, or name another file")


def remove_journals(path: Path) -> None:
    """Remove what SQLite keeps beside a database that is not there: it would be rolled into the next one of the name."""
    for ending in ("-journal", "-wal", "-shm"):
        beside_sqlite(path, ending).unlink(missing_ok=True)


def remove_database(path: Path) -> None:
    """Remove a database and its journals, if they are there."""
    path.unlink(missing_ok=True)
    remove_journals(path)


def give_name(new: Path, path: Path) -> None:
    """Move a finished file to its own name, durably, under the lock that all who make it hold.

    Raises:
        LedgerError: The name is taken.
    """
    refuse_existing(path)
    remove_journals(path)
    os.rename(new, path)
    sync_directory(path.parent)


def check_private(path: Path) -> None:
    """Refuse a ledger that other users could read or replace, or beside which they could put what SQLite would believe.

    A journal that somebody else wrote beside the file would be rolled back into it; so the directory must be this user's
    alone, a sticky one is not enough, and so must be what already lies beside the file.

    Raises:
        LedgerError: See `places`; and a file that others can read.
    """
    beside_it = (beside(path, ending) for ending in ("mark", "lock"))
    journals = (beside_sqlite(path, ending) for ending in ("-journal", "-wal", "-shm"))
    try:
        places.require_alone(path.parent)
        places.require_alone(path, secret=True)
        for companion in (*beside_it, *journals):
            with contextlib.suppress(FileNotFoundError):
                places.require_alone(companion)
    except places.NotAlone as refusal:
        raise LedgerError(str(path), f"is not this user's alone: {refusal}") from None
    except OSError as error:
        raise LedgerError(str(path), f"cannot be read ({error.strerror})") from None


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, text: str) -> None:
    """Replace a small file in one durable step, mode 0600, written under a name that nobody can guess or have taken."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
