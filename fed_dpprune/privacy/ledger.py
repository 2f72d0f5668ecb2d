"""The ledger: what each client has spent, in one SQLite file, charged and committed before anything private is computed.

Order of one request: policy, `charge` (returns after the commit), compute, `store_reply`, send what that returned. A crash
after the charge costs budget and never gives a release away; the same request again is a replay: it is not charged, and
once a reply is stored, that reply is all that leaves. While none is stored nothing has left, so computing again under the
same charge is sound.

Two modes. `simulation`: one file for all clients of a run, one process that holds it for its whole life; write-ahead log
with synchronous NORMAL, which survives kill -9 but does not claim power loss. `deployment`: one file for one client's
data over all runs, locked for each operation so that several processes may serve; settings that survive power loss, a mark
beside the file that betrays a missing or older copy, and files that nobody else can read.

Lives here: storing and refusing. Does not live here: what a row holds (`rows.py`), what a charge costs (`budget.py`), what
an operator allows (`policy.py`), how it is shown (`report.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from fed_dpprune.errors import ClientFault, LedgerError
from fed_dpprune.privacy import locks, rows
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.budget import Account, Declaration, entries_from, entries_text
from fed_dpprune.privacy.cache import Figures
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.rows import DEPLOYMENT, SIMULATION, Charge, ClientSpent, Head, Mode, Request, RunSpent

__all__ = ["DEPLOYMENT", "SIMULATION", "Charge", "ClientSpent", "Head", "Ledger", "Request", "RunSpent"]

WAIT_S = 30.0
# Rounds whose epsilon is computed at once in a deployment, where the next round may be a new process.
AHEAD = 32
# Two connections that write or checkpoint at the same instant could corrupt a write-ahead log before this version.
WAL_IS_SAFE_FROM = (3, 51, 3)


class Ledger:
    """See the module. Made by `create`, `open`, `open_or_create` or `read`; usable as a context manager.

    Every method raises LedgerError when the file cannot be trusted or written; after that nothing may be computed.
    """

    def __init__(self, path: Path, mode: str, accountant: str, cache: Figures | None) -> None:
        self.path = path
        self.mode = mode
        self.accountant = accountant
        self._cache = cache
        self._lock = locks.Lock(path)
        self._threads = threading.RLock()
        self._process = os.getpid()
        self._locked = False
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._accounts: dict[str, Account] = {}
        self._head = Head(0, "")
        self._version = -1
        self.meta: dict[str, str] = {}

    # --- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path,
        identity: str,
        *,
        mode: Mode,
        delta: float,
        accountant: str = "pld",
        unit: str = "example",
        cache: Figures | None = None,
    ) -> Ledger:
        """Make a new ledger and open it.

        Args:
            path: Its file, which must not exist; in a deployment its mark must not exist either.
            identity: What the budget belongs to: the run in a simulation, the data's owner-given name in a deployment.
            mode: "simulation" or "deployment".
            delta: At which everything is counted, fixed for this ledger, as the next two.
            accountant: For charges within a declared schedule.
            unit: Of privacy.
            cache: Where accountants' figures are kept.

        Raises:
            LedgerError: The file or its mark exists, or the place is not writable.
            ConfigError: A delta or accountant that does not work.
        """
        table.lookup(accountant)
        table.check_delta(delta)
        if mode not in (SIMULATION, DEPLOYMENT):
            raise ValueError(f"mode must be {SIMULATION!r} or {DEPLOYMENT!r}, not {mode!r}")
        ledger = cls(Path(path), mode, accountant, cache)
        if mode == DEPLOYMENT and ledger._mark.exists():
            ledger._missing()
        meta = {
            "schema": str(rows.SCHEMA),
            "identity": identity,
            "mode": mode,
            "unit": unit,
            "neighbouring": "add-or-remove-one",
            "sampler": "poisson",
            "delta": repr(float(delta)),
            "accountant": accountant,
        }
        locks.make_directory(ledger.path.parent)
        with ledger._held_if_shared():
            ledger._make(meta)
            ledger._start(identity)
        return ledger

    @classmethod
    def open(
        cls,
        path: Path,
        identity: str,
        *,
        mode: Mode,
        accountant: str = "pld",
        delta: float | None = None,
        unit: str | None = None,
        cache: Figures | None = None,
    ) -> Ledger:
        """Open an existing ledger for charging, after checking its chain and its mark.

        Args:
            path: See `create`, as all others.
            identity: As it was made for.
            mode: As it was made for.
            accountant: As it was made for.
            delta: As it was made for; None does not ask.
            unit: As it was made for; None does not ask.
            cache: Where accountants' figures are kept.

        Raises:
            LedgerError: Missing, damaged, older than its mark, of another identity, mode, accountant, delta or unit, not
                writable, readable by others, or (simulation) open elsewhere.
        """
        table.lookup(accountant)
        ledger = cls(Path(path), mode, accountant, cache)
        if not ledger.path.exists():
            ledger._missing()
        with ledger._faults():
            ledger._connect()
        ledger._start(identity, delta, unit)
        return ledger

    @classmethod
    def open_or_create(
        cls,
        path: Path,
        identity: str,
        *,
        mode: Mode,
        delta: float,
        accountant: str = "pld",
        unit: str = "example",
        cache: Figures | None = None,
    ) -> Ledger:
        """Open the ledger, or make it where neither the file nor a mark of an earlier one exists.

        Raises:
            LedgerError: As `open` and `create`; a ledger of another delta, accountant or unit is refused.
        """
        path = Path(path)

        def opened() -> Ledger:
            return cls.open(path, identity, mode=mode, accountant=accountant, delta=delta, unit=unit, cache=cache)

        if path.exists() or locks.beside(path, "mark").exists():
            return opened()
        try:
            return cls.create(path, identity, mode=mode, delta=delta, accountant=accountant, unit=unit, cache=cache)
        except LedgerError:
            # Another process of this client may have been first.
            if not path.exists():
                raise
            return opened()

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Open a ledger for reading alone, whoever may be writing it; its chain is checked."""
        path = Path(path)
        ledger = cls(path, "read", "pld", None)
        if not path.is_file():
            raise LedgerError(str(path), "no such ledger", "a run writes ledger.sqlite into its directory")
        with ledger._faults():
            ledger._connection = sqlite3.connect(_read_address(path), uri=True, isolation_level=None)
            ledger._execute("PRAGMA trusted_schema = OFF")
        ledger._load()
        ledger.accountant = ledger.meta.get("accountant", ledger.accountant)
        return ledger

    def _alone(self) -> None:
        """In a simulation: the lock that is held as long as the file is open."""
        if self.mode == SIMULATION and not self._lock.mine and not self._lock.acquire():
            raise LedgerError(str(self.path), "is open in another process", "end that run first, or use another directory")

    def _connect(self) -> None:
        """Open the connection with the mode's settings, each read back."""
        self._alone()
        if self.mode == DEPLOYMENT:
            locks.check_private(self.path)
        if not os.access(self.path, os.W_OK) or not os.access(self.path.parent, os.W_OK):
            raise LedgerError(str(self.path), "is read-only", "a charge must be written before anything is computed")
        self._link(self.path)
        self._inode = os.stat(self.path).st_ino

    def _link(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
        journal, synchronous = self.settings(self.mode)
        for pragma, value in (("trusted_schema", 0), ("foreign_keys", 1), ("synchronous", synchronous)):
            self._execute(f"PRAGMA {pragma} = {value}")
            if (got := self._one(f"PRAGMA {pragma}")) != value:
                raise LedgerError(str(self.path), f"SQLite refused {pragma} = {value} (it is {got})")
        if (got := self._one(f"PRAGMA journal_mode = {journal}")) != journal:
            raise LedgerError(str(self.path), f"SQLite refused journal mode {journal} (it is {got})")

    @staticmethod
    def settings(mode: str, version: tuple[int, ...] = sqlite3.sqlite_version_info) -> tuple[str, int]:
        """(journal mode, synchronous) of a mode under a version of SQLite: 1 is NORMAL, 2 FULL, 3 EXTRA."""
        if mode == SIMULATION:
            return "wal", 1
        return ("wal", 2) if version >= WAL_IS_SAFE_FROM else ("delete", 3)

    def _make(self, meta: dict[str, str]) -> None:
        """Make the file whole under another name, then give it its own: wherever this is killed, it is there or it is not.

        Every process does so under the lock; what is under the other name was left by one that was killed.
        """
        new = locks.beside(self.path, "new")
        with self._faults():
            self._alone()
            locks.refuse_existing(self.path)
            locks.remove_database(new)
            locks.create_private(new)
            try:
                if self.mode == DEPLOYMENT:
                    locks.check_private(new)
                self._lay_out(new, meta)
                locks.give_name(new, self.path)
            except BaseException:
                locks.remove_database(new)
                raise
            self._connect()

    def _lay_out(self, path: Path, meta: dict[str, str]) -> None:
        """Write the tables and what is fixed for good into a new file, in one transaction; nothing of it stays open."""
        self._link(path)
        try:
            self._execute("BEGIN IMMEDIATE")
            for statement in _statements(rows.TABLES):
                self._execute(statement)
            self._sql.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
            self._execute("COMMIT")
        finally:
            self._sql.close()
            self._connection = None

    def _start(self, identity: str, delta: float | None = None, unit: str | None = None) -> None:
        """Check what was opened, and refuse what is not this budget's newest state."""
        fixed = {"accountant": self.accountant, "delta": None if delta is None else repr(float(delta)), "unit": unit}
        try:
            with self._exclusive():
                self._load()
                for key, wanted in (("schema", str(rows.SCHEMA)), ("identity", identity), ("mode", self.mode)):
                    if self.meta.get(key) != wanted:
                        why = f"its {key} is {self.meta.get(key)!r}, not {wanted!r}"
                        raise LedgerError(str(self.path), why, "every budget has a file of its own; name the right one")
                for key, given in fixed.items():
                    if given is not None and self.meta.get(key) != given:
                        why = f"its {key} is {self.meta.get(key)!r}, not {given!r}"
                        raise LedgerError(str(self.path), why, f"it was fixed when the ledger was made; set {key} back to it")
                if self.mode == DEPLOYMENT:
                    self._check_mark()
                    self._write_mark()
        except LedgerError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file and give up its lock; a second call does nothing."""
        if self._connection is not None:
            # A forked child must not close what its parent still uses: SQLite would drop the parent's locks.
            if os.getpid() == self._process:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.close()
            else:
                _of_parents.append(self._connection)
            self._connection = None
        if os.getpid() == self._process:
            self._lock.release(remove=self.mode == SIMULATION)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- charging --------------------------------------------------------------------------------------------------

    def charge(
        self,
        client: str,
        request_key: str,
        run: str,
        round: int,
        entries: Sequence[Entry],
        *,
        rounds: int = 1,
        max_epsilon: float | None = None,
        purpose: str = "train",
    ) -> Charge:
        """Charge one request; when this returns, the charge is on disk.

        Args:
            client: See `Request`, as the next five. A deployment's ledger has one client, its identity, whatever is said.
            request_key: Hex digest of the request.
            run: Identity of the run.
            round: Of the run, from 1.
            entries: What is spent.
            rounds: Declared by the run.
            max_epsilon: The client's own limit at the ledger's delta; None for none.
            purpose: In a word.

        Returns:
            A new charge, or the earlier one of the same request.

        Raises:
            ClientFault: "budget-exhausted" when the state after the charge would pass the limit, "round-changed" when
                this round was charged for another request, "older-round" when it lies before the last one charged, or
                its reply has been forgotten. Nothing is written then.
            LedgerError: The ledger cannot be trusted or written.
        """
        request = Request(client, request_key, run, round, tuple(entries), rounds, purpose)
        (outcome,) = self.charge_many([request], max_epsilon)
        if isinstance(outcome, ClientFault):
            raise outcome
        return outcome

    def charge_many(self, requests: Sequence[Request], max_epsilon: float | None = None) -> list[Charge | ClientFault]:
        """Charge many clients in one commit; a client that is refused does not keep the others from being charged.

        Returns:
            For each request, in order, its charge or the refusal that `charge` would have raised.
        """
        with self._exclusive():
            self._refresh()
            self._execute("BEGIN IMMEDIATE")
            try:
                outcomes = [
                    self._charge(replace(request, client=self._owner(request.client)), max_epsilon) for request in requests
                ]
                self._execute("COMMIT")
            except BaseException:
                # What is in memory may be ahead of the file now; the next call reads it again.
                self._version = -1
                with contextlib.suppress(sqlite3.Error):
                    self._execute("ROLLBACK")
                raise
            if self.mode == DEPLOYMENT:
                self._write_mark()
            return outcomes

    def _charge(self, request: Request, max_epsilon: float | None) -> Charge | ClientFault:
        earlier = self._row("SELECT number, client, epsilon, entries FROM charges WHERE request_key = ?", (request.request_key,))
        if earlier is not None:
            return self._replay(request, *earlier)
        account = self._accounts.get(request.client) or Account(self.delta)
        last = account.last_round.get(request.run, 0)
        if request.round <= last:
            same = self._row(
                "SELECT 1 FROM charges WHERE client = ? AND run = ? AND round = ?", (request.client, request.run, request.round)
            )
            return ClientFault("round-changed" if same else "older-round", f"round {request.round}, last charged {last}")
        if account.full(request.entries):
            return ClientFault("budget-exhausted", "the account holds as many charges or settings as it may")
        verdict = account.after(
            request.run,
            request.entries,
            rounds=request.rounds,
            accountant=self.accountant,
            max_epsilon=max_epsilon,
            ahead=AHEAD if self.mode == DEPLOYMENT else 1,
            cache=self._cache,
        )
        # Written so that a figure that is not a number is a refusal too.
        if max_epsilon is not None and not verdict.epsilon <= max_epsilon:
            return ClientFault("budget-exhausted", f"{verdict.epsilon:.6g} would pass {max_epsilon:g} ({verdict.rule})")
        row = (
            self._head.count + 1,
            request.client,
            request.request_key,
            request.run,
            request.round,
            request.purpose,
            entries_text(request.entries),
            sum(entry.steps for entry in request.entries),
            table.version(self.accountant),
            verdict.rule,
            rows.to_disk(verdict.epsilon),
            rows.to_disk(verdict.run_epsilon),
            max_epsilon,
            verdict.declaration.text() if verdict.declaration else None,
            self._head.digest,
        )
        digest = rows.digest(row)
        self._execute(f"INSERT INTO charges ({rows.COLUMNS}) VALUES ({', '.join('?' * (len(row) + 1))})", (*row, digest))
        self._take(row, digest)
        return Charge(row[0], "new", verdict.epsilon)

    def _owner(self, client: str) -> str:
        """Whose budget it is: in a deployment the ledger's own, whatever partition a server names."""
        return self.meta["identity"] if self.meta["mode"] == DEPLOYMENT else client

    def _replay(self, request: Request, number: int, client: str, epsilon: float | None, entries: str) -> Charge | ClientFault:
        # A key names everything that is charged; else a larger computation could hide behind an earlier, smaller charge.
        if (client, entries) != (request.client, entries_text(request.entries)):
            raise LedgerError(str(self.path), "one request was charged before with another content")
        stored = self._row("SELECT reply, digest FROM replies WHERE request_key = ?", (request.request_key,))
        if stored is None:
            return Charge(number, "replay", rows.from_disk(epsilon))
        if stored[0] is None:
            return ClientFault("older-round", "its reply has been forgotten")
        return Charge(number, "replay", rows.from_disk(epsilon), self._intact(*stored))

    def _intact(self, reply: bytes, digest: str) -> bytes:
        if hashlib.sha256(reply).hexdigest() != digest:
            raise LedgerError(
                str(self.path), "a stored reply does not match its digest", "restore the file from its disk's backup"
            )
        return bytes(reply)

    # --- replies ---------------------------------------------------------------------------------------------------

    def store_reply(self, request_key: str, reply: bytes) -> bytes:
        """Keep the bytes that answer a request, before they are sent.

        Returns:
            The bytes to send: those given or, when another process was first with its own, those.

        Raises:
            LedgerError: The request was never charged, or its reply has been forgotten.
        """
        return self.store_replies([(request_key, reply)])[0]

    def store_replies(self, replies: Sequence[tuple[str, bytes]]) -> list[bytes]:
        """`store_reply` for many, in one commit."""
        with self._exclusive():
            self._execute("BEGIN IMMEDIATE")
            try:
                kept = [self._store(request_key, reply) for request_key, reply in replies]
                self._execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._execute("ROLLBACK")
                raise
            return kept

    def _store(self, request_key: str, reply: bytes) -> bytes:
        charged = self._row("SELECT round FROM charges WHERE request_key = ?", (request_key,))
        if charged is None:
            raise LedgerError(str(self.path), "a reply was made for a request that was never charged")
        stored = self._row("SELECT reply, digest FROM replies WHERE request_key = ?", (request_key,))
        if stored is None:
            row = (request_key, charged[0], hashlib.sha256(reply).hexdigest(), reply)
            self._execute("INSERT INTO replies VALUES (?, ?, ?, ?)", row)
            return reply
        if stored[0] is None:
            raise LedgerError(str(self.path), "a second reply was made for a request whose first has been forgotten")
        return self._intact(*stored)

    def reply(self, request_key: str) -> bytes | None:
        """The stored reply of a request; None when there is none, or it has been forgotten."""
        with self._exclusive():
            stored = self._row("SELECT reply, digest FROM replies WHERE request_key = ?", (request_key,))
            return None if stored is None or stored[0] is None else self._intact(*stored)

    def forget_replies(self, before_round: int) -> int:
        """Blank the stored replies of rounds below `before_round`; they can be asked for no more ("older-round").

        That a reply was sent stays known, so it is never computed a second time. Bounds the file's size.

        Returns:
            How many were blanked.
        """
        with self._exclusive():
            cursor = self._execute("UPDATE replies SET reply = NULL WHERE round < ? AND reply IS NOT NULL", (before_round,))
            return int(cursor.rowcount)

    # --- reading ---------------------------------------------------------------------------------------------------

    @property
    def delta(self) -> float:
        """At which everything in this ledger is counted."""
        return float(self.meta["delta"])

    @property
    def unit(self) -> str:
        """Of privacy."""
        return self.meta["unit"]

    def clients(self) -> list[str]:
        """All clients that were ever charged, by name."""
        with self._exclusive():
            self._refresh()
            return sorted(self._accounts, key=lambda name: (len(name), name))

    def history(self, client: str) -> list[Entry]:
        """All that a client has spent, in canonical form; empty for one that never was charged."""
        with self._exclusive():
            self._refresh()
            client = self._owner(client)
            account = self._accounts.get(client)
            return list(account.history) if account else []

    def runs(self, client: str) -> list[RunSpent]:
        """What a client spent, by run, in the order of their first charges."""
        with self._exclusive():
            self._refresh()
            client = self._owner(client)
            account = self._accounts.get(client)
            if account is None:
                return []
            select = "SELECT run, run_epsilon FROM charges WHERE client = ? ORDER BY number"
            figures = dict(self._execute(select, (client,)).fetchall())
            return [
                RunSpent(run, account.rounds[run], sum(entry.steps for entry in entries), entries, rows.from_disk(figures[run]))
                for run, entries in account.by_run.items()
            ]

    def spent(self, client: str) -> ClientSpent:
        """What a client spent in all, as it was computed when it was charged."""
        with self._exclusive():
            client = self._owner(client)
            last = self._row(
                "SELECT epsilon, rule, accountant, max_epsilon FROM charges WHERE client = ? ORDER BY number DESC LIMIT 1",
                (client,),
            )
            if last is None:
                return ClientSpent(client, 0.0, "schedule", table.version(self.accountant), None, (), ())
            epsilon, rule, accountant, limit = last
            return ClientSpent(
                client, rows.from_disk(epsilon), rule, accountant, limit, tuple(self.history(client)), tuple(self.runs(client))
            )

    def rounds_left(self, client: str, entries: Sequence[Entry], max_epsilon: float) -> int:
        """How many rounds of `entries` a new run may have, by the rule that will be enforced."""
        with self._exclusive():
            self._refresh()
            client = self._owner(client)
            account = self._accounts.get(client) or Account(self.delta)
            return account.rounds_left(entries, accountant=self.accountant, max_epsilon=max_epsilon, cache=self._cache)

    def same_data(self, fingerprint: str) -> bool:
        """Whether the data are those that were remembered, or none were; writes nothing."""
        with self._exclusive():
            known = self._row("SELECT value FROM meta WHERE key = 'data-fingerprint'", ())
            return known is None or bool(known[0] == fingerprint)

    def remember_data(self, fingerprint: str) -> bool:
        """Remember the data where none are; whether they are those. A fingerprint stays here and never opens a new budget."""
        with self._exclusive():
            self._execute("INSERT OR IGNORE INTO meta VALUES ('data-fingerprint', ?)", (fingerprint,))
            return self.same_data(fingerprint)

    def head(self) -> Head:
        """Where the chain ends now."""
        with self._exclusive():
            self._refresh()
            return self._head

    def contains(self, head: Head) -> bool:
        """Whether this ledger is the one that once ended at `head`, or a later state of it."""
        with self._exclusive():
            return self._holds(head)

    def verify(self) -> Head:
        """Check the file and every link of the chain.

        Raises:
            LedgerError: Something was changed, removed or put in between.
        """
        with self._exclusive():
            self._load()
            return self._head

    # --- inside ----------------------------------------------------------------------------------------------------

    @property
    def _mark(self) -> Path:
        return locks.beside(self.path, "mark")

    @property
    def _sql(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LedgerError(str(self.path), "is closed")
        return self._connection

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._sql.execute(statement, values)

    def _row(self, statement: str, values: Sequence[Any] = ()) -> Any:
        return self._execute(statement, values).fetchone()

    def _one(self, statement: str) -> Any:
        return self._row(statement)[0]

    def _missing(self) -> NoReturn:
        if self._mark.exists():
            raise LedgerError(
                str(self.path),
                "is missing, but its mark says that budget was spent in it",
                "put the newest copy back; a new ledger for the same data would spend the budget a second time",
            )
        raise LedgerError(str(self.path), "no such ledger")

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Whatever SQLite or the system says becomes a LedgerError, and a half-opened ledger is closed."""
        try:
            yield
        except LedgerError:
            self.close()
            raise
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise self._fault(error) from error

    def _fault(self, error: Exception) -> LedgerError:
        fix = "restore the newest copy, or see whether disk and rights are as they should be; nothing private is computed before"
        return LedgerError(str(self.path), f"cannot be trusted or written ({error})", fix)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One operation: one thread, one process, the file that was opened; system errors as LedgerError."""
        if os.getpid() != self._process:
            raise LedgerError(str(self.path), "was opened by the process that forked this one", "open it again here")
        with self._threads:
            try:
                if self.mode != "read" and (not self.path.exists() or os.stat(self.path).st_ino != self._inode):
                    raise LedgerError(str(self.path), "was removed or replaced while it was open", "stop, and restore it")
                with self._held_if_shared():
                    yield
            except (sqlite3.Error, OSError) as error:
                raise self._fault(error) from error

    @contextlib.contextmanager
    def _held_if_shared(self) -> Iterator[None]:
        """In a deployment the lock between processes; operations inside an operation do not take it again."""
        if self.mode != DEPLOYMENT or self._locked:
            yield
            return
        with self._lock.held(self.path, WAIT_S):
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def _refresh(self) -> None:
        """Bring memory up to the file where another connection may have written."""
        if self.mode == SIMULATION and self._version >= 0:
            return
        version = self._one("PRAGMA data_version")
        if version != self._version:
            self._load()
            if self.mode == DEPLOYMENT:
                self._check_mark()
            self._version = version

    def _load(self) -> None:
        """Read everything, checking each link: row by row the digest of its content and of the one before."""
        with self._loading():
            self.meta = dict(self._execute("SELECT key, value FROM meta").fetchall())
            fixed = sorted((key, value) for key, value in self.meta.items() if key != "data-fingerprint")
            self._accounts, self._head = {}, Head(0, rows.digest(fixed))
            for *row, digest in self._execute(f"SELECT {rows.COLUMNS} FROM charges ORDER BY number"):
                if row[0] != self._head.count + 1 or row[-1] != self._head.digest or digest != rows.digest(row):
                    raise LedgerError(str(self.path), f"charge {row[0]} does not continue the chain", "restore the newest copy")
                self._take(tuple(row), digest)
            self._version = self._one("PRAGMA data_version")

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            check = self._one("PRAGMA quick_check(1)")
            if check != "ok":
                raise LedgerError(str(self.path), f"is damaged ({check})", "restore the newest copy")
            yield
        except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
            raise LedgerError(str(self.path), f"is damaged ({error})", "restore the newest copy") from error

    def _take(self, row: tuple[Any, ...], digest: str) -> None:
        """Take a row that is in the file into memory."""
        values = dict(zip(rows.FIELDS, row, strict=True))
        account = self._accounts.setdefault(values["client"], Account(self.delta))
        declared = Declaration.from_text(values["declaration"]) if values["declaration"] else None
        account.add(values["run"], values["round"], entries_from(values["entries"]), declared)
        self._head = Head(values["number"], digest)

    def _holds(self, head: Head) -> bool:
        if head.count == 0:
            fixed = sorted((key, value) for key, value in self.meta.items() if key != "data-fingerprint")
            return head.digest == rows.digest(fixed)
        row = self._row("SELECT digest FROM charges WHERE number = ?", (head.count,))
        return row is not None and bool(row[0] == head.digest)

    def _check_mark(self) -> None:
        """Refuse a file that is older than what the mark has seen."""
        try:
            mark = json.loads(self._mark.read_text(encoding="utf-8"))
            head = Head(int(mark["count"]), str(mark["digest"]))
        except FileNotFoundError:
            if self._head.count == 0:
                return
            raise LedgerError(
                str(self.path), "its mark is missing", f"restore {self._mark.name} beside it; it tells an old copy from a new one"
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
            raise LedgerError(str(self.path), "its mark cannot be read", f"restore {self._mark.name} beside it") from None
        if not self._holds(head):
            raise LedgerError(
                str(self.path),
                f"is an older or another copy: {head.count} charges were made, it holds {self._head.count}",
                "put the newest copy back; going on from this one would spend budget twice",
            )

    def _write_mark(self) -> None:
        content = {"identity": self.meta["identity"], "count": self._head.count, "digest": self._head.digest}
        locks.write_durably(self._mark, json.dumps(content) + "\n")


# Connections that a fork brought along: kept, so that they are never closed in a child.
_of_parents: list[sqlite3.Connection] = []


def _read_address(path: Path) -> str:
    """How to open a file for reading without leaving anything beside it.

    A finished write-ahead file without its log cannot change under us, so no locks (and no new log) are needed.
    """
    with open(path, "rb") as file:
        header = file.read(20)
    finished = header[18:20] == b"\x02\x02" and not locks.beside_sqlite(path, "-wal").exists()
    return f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if finished else ''}"


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, one by one: `executescript` would commit what is open."""
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
