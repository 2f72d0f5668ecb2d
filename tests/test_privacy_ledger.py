"""The ledger: charged before anything, never past the limit, never twice for one request, never from a damaged file."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fed_dpprune.errors import ClientFault, ConfigError, LedgerError
from fed_dpprune.privacy import budget, locks
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.cache import Figures
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.ledger import Charge, Head, Ledger, Request

DELTA = 1e-3
ENTRY = Entry(2.7, 0.5, 2)
MODES = ["simulation", "deployment"]


def key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger" / "client.sqlite"


@pytest.fixture
def ledger(path: Path, mode: Any) -> Iterator[Ledger]:
    with Ledger.create(path, "someone's data", mode=mode, delta=DELTA, accountant="rdp") as opened:
        yield opened


def _again(path: Path, mode: Any) -> Ledger:
    return Ledger.open(path, "someone's data", mode=mode, accountant="rdp")


def _round(ledger: Ledger, number: int, limit: float | None = None, client: str = "0", rounds: int = 20) -> Charge:
    return ledger.charge(client, key(client, number), "run", number, [ENTRY], rounds=rounds, max_epsilon=limit)


# --- charging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_fifty_refused_charges_leave_no_figure_in_memory_or_on_disk(
    tmp_path: Path, mode: Any, accountant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server chooses noise and rate: what it is refused must not fill the client's disk."""
    cache = Figures(tmp_path / "cache")
    monkeypatch.setattr(table, "_memory", {})
    with Ledger.create(tmp_path / "l" / "a.sqlite", "data", mode=mode, delta=DELTA, accountant=accountant, cache=cache) as ledger:
        for number in range(50):
            entry = Entry(1.0 + number / 1000, 0.5, 2)
            with pytest.raises(ClientFault, match="budget-exhausted"):
                ledger.charge("0", key(number), "run", 1, [entry], rounds=40, max_epsilon=0.5)
        assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())
        assert table._memory == {}
        _round(ledger, 1)
        assert len(list((tmp_path / "cache").iterdir())) == 1


def test_of_the_rounds_ahead_those_past_the_limit_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Figures(tmp_path / "cache")
    monkeypatch.setattr(table, "_memory", {})
    with Ledger.create(
        tmp_path / "l" / "a.sqlite", "data", mode="deployment", delta=DELTA, accountant="rdp", cache=cache
    ) as made:
        limit = table.epsilon([Entry(2.71, 0.5, 6)], DELTA, "rdp", Figures(tmp_path / "other"))
        table._memory.clear()
        made.charge("0", key(1), "run", 1, [Entry(2.71, 0.5, 2)], rounds=20, max_epsilon=limit)
    (file,) = (tmp_path / "cache").iterdir()
    assert set(json.loads(file.read_text())["values"]) == {"2", "4", "6"}


def test_a_charge_is_in_the_file_when_it_returns(ledger: Ledger, path: Path) -> None:
    charge = _round(ledger, 1)
    assert charge == Charge(1, "new", table.epsilon([ENTRY], DELTA, "rdp"))
    with Ledger.read(path) as seen:
        assert [seen.history(client) for client in seen.clients()] == [[ENTRY]]


def test_charges_add_up_over_rounds(ledger: Ledger) -> None:
    figures = [_round(ledger, number).epsilon for number in range(1, 6)]
    assert figures == table.epsilon_curve(2.7, 0.5, [2, 4, 6, 8, 10], DELTA, "rdp")
    assert ledger.history("0") == [Entry(2.7, 0.5, 10)]


def test_a_reopened_ledger_remembers_everything(ledger: Ledger, path: Path, mode: Any) -> None:
    for number in range(1, 4):
        _round(ledger, number)
    ledger.store_reply(key("0", 2), b"answer")
    head = ledger.head()
    ledger.close()
    with _again(path, mode) as opened:
        assert opened.head() == head and opened.verify() == head
        assert opened.history("0") == [Entry(2.7, 0.5, 6)]
        assert opened.reply(key("0", 2)) == b"answer"
        assert _round(opened, 4).epsilon == table.epsilon([Entry(2.7, 0.5, 8)], DELTA, "rdp")


def test_the_state_after_the_charge_decides(ledger: Ledger) -> None:
    two, three = table.epsilon_curve(2.7, 0.5, [4, 6], DELTA, "rdp")
    limit = (two + three) / 2
    assert [_round(ledger, number, limit).status for number in (1, 2)] == ["new", "new"]
    head = ledger.head()
    with pytest.raises(ClientFault) as refused:
        _round(ledger, 3, limit)
    assert refused.value.code == "budget-exhausted"
    assert ledger.head() == head and ledger.history("0") == [Entry(2.7, 0.5, 4)]


def test_a_limit_that_is_met_exactly_is_kept(ledger: Ledger) -> None:
    limit = table.epsilon([Entry(2.7, 0.5, 4)], DELTA, "rdp")
    assert [_round(ledger, number, limit).epsilon <= limit for number in (1, 2)] == [True, True]
    with pytest.raises(ClientFault):
        _round(ledger, 3, limit)


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_past_every_limit(ledger: Ledger, figure: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "epsilon", lambda *values, **options: figure)
    monkeypatch.setattr(table, "epsilons", lambda *values, **options: [figure])
    with pytest.raises(ClientFault):
        _round(ledger, 1, 1e9)


def test_one_clients_refusal_leaves_the_others_charged(path: Path) -> None:
    with Ledger.create(path, "run", mode="simulation", delta=DELTA, accountant="rdp") as ledger:
        limit = table.epsilon([ENTRY], DELTA, "rdp")
        _round(ledger, 1, client="b")
        batch = [Request(client, key(client, 2), "run", 2, (ENTRY,), 20) for client in "abc"]
        outcomes = ledger.charge_many(batch, limit)
        assert [type(outcome).__name__ for outcome in outcomes] == ["Charge", "ClientFault", "Charge"]
        assert {client: len(ledger.history(client)) and ledger.history(client)[0].steps for client in "abc"} == {
            "a": 2,
            "b": 2,
            "c": 2,
        }


def test_a_deployments_budget_is_one_whatever_partition_a_server_names(path: Path) -> None:
    with Ledger.create(path, "data", mode="deployment", delta=DELTA, accountant="rdp") as ledger:
        limit = table.epsilon([ENTRY], DELTA, "rdp")
        _round(ledger, 1, limit, client="0")
        with pytest.raises(ClientFault) as refused:
            ledger.charge("1", key("other"), "run", 2, [ENTRY], rounds=20, max_epsilon=limit)
        assert refused.value.code == "budget-exhausted"
        assert ledger.clients() == ["data"]


def test_a_second_run_goes_through_the_filter(ledger: Ledger) -> None:
    _round(ledger, 1)
    second = ledger.charge("0", key("second"), "another run", 1, [ENTRY], rounds=20)
    assert ledger.spent("0").rule == "filter"
    assert second.epsilon >= table.epsilon([Entry(2.7, 0.5, 4)], DELTA, "rdp")
    assert [run.run for run in ledger.runs("0")] == ["run", "another run"]
    limit = second.epsilon
    left = ledger.rounds_left("0", [ENTRY], limit + 1.0)
    for number in range(2, 2 + left):
        ledger.charge("0", key("second", number), "another run", number, [ENTRY], max_epsilon=limit + 1.0)
    with pytest.raises(ClientFault):
        ledger.charge("0", key("last"), "another run", 2 + left, [ENTRY], max_epsilon=limit + 1.0)


# --- replay ------------------------------------------------------------------------------------------------------------


def test_the_same_request_is_not_charged_again(ledger: Ledger) -> None:
    first = _round(ledger, 1)
    assert _round(ledger, 1) == Charge(1, "replay", first.epsilon, None)
    ledger.store_reply(key("0", 1), b"bytes")
    assert _round(ledger, 1) == Charge(1, "replay", first.epsilon, b"bytes")
    assert ledger.head().count == 1


def test_a_replay_is_answered_past_the_limit_and_after_later_rounds(ledger: Ledger) -> None:
    _round(ledger, 1)
    ledger.store_reply(key("0", 1), b"bytes")
    _round(ledger, 2)
    assert _round(ledger, 1, limit=1e-6).reply == b"bytes"


def test_a_changed_request_for_a_charged_round_is_refused(ledger: Ledger) -> None:
    _round(ledger, 1)
    with pytest.raises(ClientFault) as refused:
        ledger.charge("0", key("changed"), "run", 1, [ENTRY], rounds=20)
    assert refused.value.code == "round-changed"


def test_an_older_round_is_refused(ledger: Ledger) -> None:
    _round(ledger, 1)
    _round(ledger, 3)
    with pytest.raises(ClientFault) as refused:
        _round(ledger, 2)
    assert refused.value.code == "older-round"
    assert ledger.history("0") == [Entry(2.7, 0.5, 4)]


def test_a_key_cannot_hide_a_larger_computation(ledger: Ledger) -> None:
    _round(ledger, 1)
    with pytest.raises(LedgerError, match="another content"):
        ledger.charge("0", key("0", 1), "run", 1, [Entry(2.7, 0.5, 200)], rounds=20)


def test_the_first_stored_reply_is_the_one_that_leaves(ledger: Ledger) -> None:
    _round(ledger, 1)
    assert ledger.store_reply(key("0", 1), b"first") == b"first"
    assert ledger.store_reply(key("0", 1), b"second") == b"first"
    assert ledger.reply(key("0", 1)) == b"first"


def test_no_reply_is_stored_without_a_charge(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="never charged"):
        ledger.store_reply(key("unknown"), b"x")


def test_a_forgotten_reply_is_never_computed_again(ledger: Ledger) -> None:
    for number in (1, 2):
        _round(ledger, number)
        ledger.store_reply(key("0", number), b"x" * 10)
    assert ledger.forget_replies(before_round=2) == 1
    assert ledger.reply(key("0", 1)) is None
    with pytest.raises(ClientFault) as refused:
        _round(ledger, 1)
    assert refused.value.code == "older-round"
    with pytest.raises(LedgerError):
        ledger.store_reply(key("0", 1), b"y")
    assert _round(ledger, 2).reply == b"x" * 10


def test_a_stored_reply_that_was_changed_is_not_sent(ledger: Ledger, path: Path, mode: Any) -> None:
    _round(ledger, 1)
    ledger.store_reply(key("0", 1), b"bytes")
    ledger.close()
    _edit(path, "DROP TRIGGER replies_stay", "UPDATE replies SET reply = x'00'")
    with _again(path, mode) as opened, pytest.raises(LedgerError, match="digest"):
        _round(opened, 1)


# --- the file ----------------------------------------------------------------------------------------------------------


def _edit(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE charges SET steps = 1",
        "DELETE FROM charges",
        "UPDATE meta SET value = '0.5' WHERE key = 'delta'",
        "DELETE FROM meta",
        "DELETE FROM replies",
        "UPDATE replies SET reply = x'00'",
    ],
)
def test_the_file_itself_refuses_changes(ledger: Ledger, path: Path, statement: str) -> None:
    _round(ledger, 1)
    ledger.store_reply(key("0", 1), b"x")
    ledger.close()
    with pytest.raises(sqlite3.IntegrityError):
        _edit(path, statement)


@pytest.mark.parametrize(
    ("new_key", "steps"),
    [("request_key", 1), ("'abcdefabcdefabcdef'", 0), ("'short'", 1)],
    ids=["same key", "no steps", "no digest"],
)
def test_the_file_itself_refuses_impossible_rows(ledger: Ledger, path: Path, new_key: str, steps: int) -> None:
    _round(ledger, 1)
    ledger.close()
    columns = f"9, client, {new_key}, run, 9, purpose, entries, {steps}, accountant, rule, 0, 0, NULL, NULL, '', ''"
    with pytest.raises(sqlite3.IntegrityError):
        _edit(path, f"INSERT INTO charges SELECT {columns} FROM charges")


@pytest.mark.parametrize(
    "tampering",
    [
        ("DROP TRIGGER charges_stay", "UPDATE charges SET entries = '[[2.7, 0.5, 1]]' WHERE number = 2"),
        ("DROP TRIGGER charges_stay", "UPDATE charges SET epsilon = 0.001 WHERE number = 2"),
        ("DROP TRIGGER charges_stay", "UPDATE charges SET run = 'else' WHERE number = 3"),
        ("DROP TRIGGER charges_last", "DELETE FROM charges WHERE number = 2"),
        ("DROP TRIGGER charges_last", "DELETE FROM charges WHERE number = 1"),
        ("DROP TRIGGER meta_stays", "UPDATE meta SET value = '0.5' WHERE key = 'delta'"),
        ("DROP TRIGGER charges_stay", "UPDATE charges SET entries = 'nonsense' WHERE number = 2"),
    ],
    ids=["entries", "epsilon", "run", "middle gone", "first gone", "delta", "nonsense"],
)
def test_a_changed_row_breaks_the_chain(ledger: Ledger, path: Path, mode: Any, tampering: tuple[str, ...]) -> None:
    for number in range(1, 4):
        _round(ledger, number)
    ledger.close()
    _edit(path, *tampering)
    for opening in (lambda: _again(path, mode), lambda: Ledger.read(path)):
        with pytest.raises(LedgerError, match=r"chain|damaged"):
            opening()


def test_a_truncated_or_overwritten_file_is_refused(ledger: Ledger, path: Path, mode: Any) -> None:
    for number in range(1, 30):
        _round(ledger, number, rounds=40)
    ledger.close()
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:100], os.urandom(4096), whole[:4096] + os.urandom(len(whole) - 4096)):
        path.write_bytes(damaged)
        with pytest.raises(LedgerError):
            _again(path, mode).close()
        with pytest.raises(LedgerError):
            Ledger.read(path)


def test_a_missing_ledger_is_not_made_anew_where_budget_was_spent(path: Path) -> None:
    with Ledger.create(path, "data", mode="deployment", delta=DELTA, accountant="rdp") as ledger:
        _round(ledger, 1)
    path.unlink()
    for opening in (
        lambda: Ledger.open(path, "data", mode="deployment"),
        lambda: Ledger.create(path, "data", mode="deployment", delta=DELTA),
        lambda: Ledger.open_or_create(path, "data", mode="deployment", delta=DELTA),
    ):
        with pytest.raises(LedgerError, match="budget was spent"):
            opening()
    assert not path.exists()


def test_an_older_copy_is_refused(path: Path, tmp_path: Path) -> None:
    with Ledger.create(path, "data", mode="deployment", delta=DELTA, accountant="rdp") as ledger:
        _round(ledger, 1)
        ledger.close()
        shutil.copy(path, tmp_path / "old")
    with Ledger.open(path, "data", mode="deployment", accountant="rdp") as ledger:
        _round(ledger, 2)
    shutil.copy(tmp_path / "old", path)
    with pytest.raises(LedgerError, match="older or another copy: 2 charges were made, it holds 1"):
        Ledger.open(path, "data", mode="deployment", accountant="rdp")


def test_a_ledger_without_its_mark_is_refused(path: Path) -> None:
    with Ledger.create(path, "data", mode="deployment", delta=DELTA, accountant="rdp") as ledger:
        _round(ledger, 1)
    locks.beside(path, "mark").unlink()
    with pytest.raises(LedgerError, match="mark is missing"):
        Ledger.open(path, "data", mode="deployment", accountant="rdp")


def test_a_crash_between_commit_and_mark_is_not_an_older_copy(path: Path) -> None:
    with Ledger.create(path, "data", mode="deployment", delta=DELTA, accountant="rdp") as ledger:
        before = locks.beside(path, "mark").read_bytes()
        _round(ledger, 1)
    locks.beside(path, "mark").write_bytes(before)
    with Ledger.open(path, "data", mode="deployment", accountant="rdp") as ledger:
        assert ledger.head().count == 1
    assert json.loads(locks.beside(path, "mark").read_text())["count"] == 1


def test_a_ledger_removed_or_replaced_while_open_charges_nothing(ledger: Ledger, path: Path) -> None:
    _round(ledger, 1)
    moved = path.with_name("moved")
    path.rename(moved)
    with pytest.raises(LedgerError, match="removed or replaced"):
        _round(ledger, 2)
    shutil.copy(moved, path)
    with pytest.raises(LedgerError, match="removed or replaced"):
        _round(ledger, 2)


def test_another_identity_or_mode_is_refused(ledger: Ledger, path: Path, mode: Any) -> None:
    ledger.close()
    with pytest.raises(LedgerError, match="identity"):
        Ledger.open(path, "someone else's data", mode=mode)
    other = "deployment" if mode == "simulation" else "simulation"
    with pytest.raises(LedgerError, match="mode"):
        Ledger.open(path, "someone's data", mode=other)  # type: ignore[arg-type]


def test_files_are_private(ledger: Ledger, path: Path, mode: Any) -> None:
    _round(ledger, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 for file in path.parent.iterdir())


def test_a_deployments_file_that_others_can_read_or_replace_is_refused(path: Path) -> None:
    Ledger.create(path, "data", mode="deployment", delta=DELTA).close()
    path.chmod(0o640)
    with pytest.raises(LedgerError, match="chmod 600"):
        Ledger.open(path, "data", mode="deployment")
    path.chmod(0o600)
    path.parent.chmod(0o777)
    with pytest.raises(LedgerError, match="chmod go-w"):
        Ledger.open(path, "data", mode="deployment")


def test_settings_are_durable_for_the_version_of_sqlite() -> None:
    assert Ledger.settings("deployment", (3, 40, 1)) == ("delete", 3)
    assert Ledger.settings("deployment", (3, 51, 2)) == ("delete", 3)
    assert Ledger.settings("deployment", (3, 51, 3)) == ("wal", 2)
    assert Ledger.settings("simulation", (3, 40, 1)) == ("wal", 1)


def test_settings_are_in_force_on_the_connection(ledger: Ledger, mode: Any) -> None:
    journal, synchronous = Ledger.settings(mode)
    assert ledger._one("PRAGMA journal_mode") == journal
    assert ledger._one("PRAGMA synchronous") == synchronous
    assert ledger._one("PRAGMA foreign_keys") == 1


@pytest.mark.parametrize("wrong", [("unheard_of", 3), ("delete", 7)], ids=["journal", "synchronous"])
def test_a_setting_that_sqlite_does_not_take_is_a_refusal(path: Path, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "settings", staticmethod(lambda mode: wrong))
        with pytest.raises(LedgerError, match="SQLite refused"):
            Ledger.create(path, "data", mode="deployment", delta=DELTA)
    Ledger.create(path, "data", mode="deployment", delta=DELTA).close()


def _as_nobody(path: Path, mode: str, pipe: Any) -> None:
    os.setgid(65534)
    os.setuid(65534)
    try:
        Ledger.open(path, "someone's data", mode=mode)  # type: ignore[arg-type]
    except LedgerError as error:
        pipe.send(str(error))
    else:
        pipe.send("opened")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; others test with chmod")
def test_somebody_elses_ledger_is_refused(ledger: Ledger, path: Path, mode: Any) -> None:
    ledger.close()
    for folder in path.parents:
        if folder != Path("/tmp") and os.stat(folder).st_uid == 0 and folder != Path("/"):
            folder.chmod(0o755)
    path.chmod(0o644)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_as_nobody, args=(path, mode, theirs))
    child.start()
    child.join()
    answer = ours.recv()
    assert "read-only" in answer or "cannot" in answer or "others can read" in answer or "in another process" in answer


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere; the test above speaks for it")
def test_a_read_only_ledger_is_refused(ledger: Ledger, path: Path, mode: Any) -> None:
    ledger.close()
    path.chmod(0o400)
    with pytest.raises(LedgerError, match="read-only"):
        _again(path, mode)


def test_a_full_disk_refuses_the_charge_and_leaves_the_ledger_whole(ledger: Ledger, path: Path, mode: Any) -> None:
    _round(ledger, 1)
    pages = ledger._one("PRAGMA page_count")
    ledger._execute(f"PRAGMA max_page_count = {pages}")
    head = ledger.head()

    def fill() -> None:
        nonlocal head
        for number in range(2, 2000):
            ledger.charge("0", key("0", number), "run" * 200, number, [ENTRY], rounds=5000)
            head = ledger.head()

    with pytest.raises(LedgerError, match="full"):
        fill()
    with pytest.raises(LedgerError, match="full"):
        ledger.charge("0", key("one more"), "run" * 200, 3000, [ENTRY], rounds=5000)
    ledger._execute(f"PRAGMA max_page_count = {pages + 100}")
    assert ledger.head() == head == ledger.verify()
    assert ledger.charge("0", key("room again"), "run" * 200, 3000, [ENTRY], rounds=5000).status == "new"


def test_a_refused_commit_is_not_remembered_as_charged(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    _round(ledger, 1)
    head, real = ledger.head(), Ledger._execute

    def failing(self: Ledger, statement: str, values: Any = ()) -> Any:
        if statement == "COMMIT":
            raise sqlite3.OperationalError("disk I/O error")
        return real(self, statement, values)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_execute", failing)
        with pytest.raises(LedgerError):
            _round(ledger, 2)
    assert ledger.head() == head and ledger.history("0") == [ENTRY]
    assert _round(ledger, 2).number == 2


def test_a_closed_ledger_charges_nothing(ledger: Ledger) -> None:
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        _round(ledger, 1)


# --- processes and threads ---------------------------------------------------------------------------------------------


def test_a_simulations_ledger_belongs_to_one_opening(path: Path) -> None:
    with Ledger.create(path, "run", mode="simulation", delta=DELTA) as ledger:
        with pytest.raises(LedgerError, match="another process"):
            Ledger.open(path, "run", mode="simulation")
        with Ledger.read(path) as reader:
            assert reader.clients() == []
        _round(ledger, 1)
    with Ledger.open(path, "run", mode="simulation") as ledger:
        assert ledger.head().count == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing is left beside a finished ledger"


def _use(ledger: Ledger, path: Path, mode: Any, pipe: Any) -> None:
    answers = []
    for attempt in (lambda: _round(ledger, 2), lambda: _again(path, mode)):
        try:
            attempt()
            answers.append("worked")
        except LedgerError as error:
            answers.append(error.why)
    ledger.close()
    pipe.send(answers)


def test_a_forked_child_cannot_charge_through_its_parents_ledger(ledger: Ledger, path: Path, mode: Any) -> None:
    _round(ledger, 1)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_use, args=(ledger, path, mode, theirs))
    child.start()
    through_parent, on_its_own = ours.recv()
    child.join()
    assert "forked" in through_parent
    assert on_its_own == ("worked" if mode == "deployment" else "is open in another process")
    assert _round(ledger, 2).number == 2, "the parent's ledger is unharmed"


def _spend(path: Path, name: int, limit: float, started: Any, pipe: Any) -> None:
    charged = []
    with Ledger.open(path, "data", mode="deployment", accountant="rdp") as ledger:
        started.wait()
        for number in range(1, 40):
            try:
                ledger.charge("0", key(name, number), f"run {name}", number, [ENTRY], max_epsilon=limit)
                charged.append((name, number))
            except ClientFault as fault:
                if fault.code != "budget-exhausted":
                    raise
    pipe.send(charged)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_on_one_ledger_stop_at_exactly_the_limit(path: Path, processes: int) -> None:
    with Ledger.create(path, "data", mode="deployment", delta=DELTA, accountant="rdp") as ledger:
        _round(ledger, 1, limit=6.0, rounds=1)
        allowed = ledger.rounds_left("0", [ENTRY], 6.0)
    context = multiprocessing.get_context("fork")
    started, pipes, children = context.Barrier(processes), [], []
    for name in range(processes):
        ours, theirs = context.Pipe()
        children.append(context.Process(target=_spend, args=(path, name, 6.0, started, theirs)))
        children[-1].start()
        pipes.append(ours)
    charged = [charge for pipe in pipes for charge in pipe.recv()]
    for child in children:
        child.join()
    assert len(charged) == allowed > 10
    with Ledger.read(path) as ledger:
        assert ledger.head().count == allowed + 1
        assert ledger.spent("data").epsilon <= 6.0


def test_threads_share_one_ledger(ledger: Ledger) -> None:
    errors: list[Exception] = []

    def work(name: int) -> None:
        try:
            for number in range(1, 11):
                ledger.charge(str(name), key(name, number), f"run {name}", number, [ENTRY], rounds=10)
        except Exception as error:  # the thread's failure is the test's
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert ledger.verify().count == 40


def test_waiting_for_a_ledger_in_use_ends_in_a_refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fed_dpprune.privacy.ledger.WAIT_S", 0.05)
    with Ledger.create(path, "data", mode="deployment", delta=DELTA) as ledger:
        other = locks.Lock(path)
        assert other.acquire()
        with pytest.raises(LedgerError, match="in use by another process"):
            _round(ledger, 1)
        other.release()
        assert _round(ledger, 1).status == "new"


# --- the rest ----------------------------------------------------------------------------------------------------------


def test_heads_tell_a_continuation_from_another_history(ledger: Ledger, tmp_path: Path, mode: Any) -> None:
    start = ledger.head()
    _round(ledger, 1)
    middle = ledger.head()
    _round(ledger, 2)
    assert ledger.contains(start) and ledger.contains(middle) and ledger.contains(ledger.head())
    assert not ledger.contains(Head(2, middle.digest)) and not ledger.contains(Head(3, middle.digest))
    with Ledger.create(tmp_path / "other" / "b.sqlite", "other data", mode=mode, delta=DELTA) as other:
        assert not ledger.contains(other.head())


def test_other_data_warn_and_open_no_new_budget(ledger: Ledger, path: Path, mode: Any) -> None:
    _round(ledger, 1)
    before = path.read_bytes()
    assert ledger.same_data("digest of other data")  # none are remembered, and asking writes nothing
    assert path.read_bytes() == before
    assert ledger.remember_data("digest of the data")
    assert ledger.same_data("digest of the data")
    assert not ledger.remember_data("digest of other data")
    ledger.close()
    with _again(path, mode) as opened:
        assert not opened.same_data("digest of other data")
        assert opened.history("0") == [ENTRY]


@pytest.mark.parametrize(
    ("key", "given"), [("delta", {"delta": 1e-6}), ("accountant", {"accountant": "pld"}), ("unit", {"unit": "client"})]
)
def test_a_ledger_of_another_delta_accountant_or_unit_is_refused(
    ledger: Ledger, path: Path, mode: Any, key: str, given: Any
) -> None:
    """They are the operator's and fixed with the file: neither a smaller nor a larger one opens it."""
    ledger.close()
    fixed = {"delta": DELTA, "accountant": "rdp", "unit": "example"}
    with pytest.raises(LedgerError, match=f"its {key} is .*, not .*; it was fixed when the ledger was made") as refused:
        Ledger.open_or_create(path, "someone's data", mode=mode, **{**fixed, **given})
    assert "\n" not in str(refused.value)
    with Ledger.open_or_create(path, "someone's data", mode=mode, **fixed) as opened:
        assert (opened.delta, opened.accountant, opened.unit) == (DELTA, "rdp", "example")
    with Ledger.read(path) as shown:
        assert (shown.delta, shown.accountant, shown.unit) == (DELTA, "rdp", "example")


def test_a_client_whose_account_is_full_is_refused(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may choose settings that cost next to nothing: how many there are is bounded, so each charge is fast."""
    monkeypatch.setattr(budget, "MOST_SETTINGS", 3)
    monkeypatch.setattr(budget, "MOST_CHARGES", 5)

    def ask(number: int, rate: float) -> Any:
        request = Request("0", f"{number:016x}", f"run {number}", 1, (Entry(5.0, rate, 1),))
        return ledger.charge_many([request], 100.0)[0]

    assert [getattr(ask(n, 1e-3 * n), "status", "refused") for n in range(1, 5)] == ["new"] * 3 + ["refused"]
    assert [getattr(ask(n, 1e-3), "code", "new") for n in (5, 6, 7)] == ["new", "new", "budget-exhausted"]


@pytest.mark.parametrize(
    "change",
    [{"request_key": "not hex at all!!!!"}, {"request_key": "abc"}, {"round": 0}, {"rounds": 0}, {"entries": ()}],
    ids=lambda change: next(iter(change)),
)
def test_an_impossible_request_is_refused(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"client": "0", "request_key": key(1), "run": "run", "round": 1, "entries": (ENTRY,), "rounds": 1}
    with pytest.raises(ValueError, match=r"digest|count|entry"):
        Request(**{**fields, **change})


def test_making_and_opening_check_their_arguments(path: Path) -> None:
    with pytest.raises(ConfigError):
        Ledger.create(path, "data", mode="simulation", delta=2.0)
    with pytest.raises(ConfigError):
        Ledger.create(path, "data", mode="simulation", delta=DELTA, accountant="gdp")
    with pytest.raises(ValueError, match="mode"):
        Ledger.create(path, "data", mode="elsewhere", delta=DELTA)  # type: ignore[arg-type]
    with pytest.raises(LedgerError, match="no such ledger"):
        Ledger.open(path, "data", mode="deployment")
    with pytest.raises(LedgerError, match="no such ledger"):
        Ledger.read(path)
    Ledger.create(path, "data", mode="simulation", delta=DELTA).close()
    with pytest.raises(LedgerError, match="exists already"):
        Ledger.create(path, "data", mode="simulation", delta=DELTA)


def test_the_first_opening_makes_the_ledger_and_the_next_finds_it(path: Path) -> None:
    for expected in (0, 1):
        with Ledger.open_or_create(path, "data", mode="deployment", delta=DELTA, accountant="rdp") as ledger:
            assert ledger.head().count == expected
            _round(ledger, expected + 1)


def test_a_round_of_ten_clients_is_charged_in_two_milliseconds(path: Path) -> None:
    import time

    table.epsilon_curve(2.7, 0.5, range(2, 62, 2), DELTA, "rdp")
    with Ledger.create(path, "run", mode="simulation", delta=DELTA, accountant="rdp") as ledger:
        seconds = []
        for number in range(1, 31):
            batch = [Request(str(client), key(client, number), "run", number, (ENTRY,), 30) for client in range(10)]
            start = time.perf_counter()
            ledger.charge_many(batch, 100.0)
            seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[len(seconds) // 4] < 0.002
