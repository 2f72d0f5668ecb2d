"""The simulated clients' host: charged on disk before a client sees the request, stored before the server sees the reply."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import pytest
import small_run
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fed_dpprune.federation import messages
from fed_dpprune.federation.guard import LedgerGuard
from fed_dpprune.federation.host import HostGrid
from fed_dpprune.federation.inline import InlineGrid
from fed_dpprune.federation.messages import Reply
from fed_dpprune.federation.terms import from_wire
from fed_dpprune.privacy.ledger import Ledger
from fed_dpprune.privacy.policy import ClientPolicy

IDENTITY = "a run"


def on_disk(path: Path, table: str) -> set[str]:
    """Request keys that another process would read from the ledger's file now."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        return {row[0] for row in connection.execute(f"SELECT request_key FROM {table}")}


class Looking(small_run.Tap):
    """Reads the ledger's file whenever a request reaches it, and before every reply is handed back."""

    path: Path
    seen: list[tuple[bool, bool]]

    def push_messages(self, messages_out: Iterable[Message]) -> Iterable[str]:
        batch = list(messages_out)
        asked = {from_wire(dict(m.content["terms"])).key for m in batch if m.metadata.message_type == "train"}
        self.pushed.append(asked <= on_disk(self.path, "charges"))
        return super().push_messages(batch)

    def asked(self, place: tuple[int, int], message: Message) -> None:
        key = from_wire(dict(message.content["terms"])).key
        self.seen.append((key in on_disk(self.path, "charges"), key in on_disk(self.path, "replies")))


def looking(path: Path):
    def make(*arguments):
        grid = Looking(*arguments)
        grid.path, grid.seen, grid.pushed = path, [], []
        return grid

    return make


def test_every_charge_is_on_disk_before_its_client_is_asked(tmp_path):
    out = tmp_path / "out"
    outcome, grid = small_run.run(small_run.config(), out, tap=looking(out / "ledger.sqlite"))
    assert outcome.status == "complete"
    assert grid.seen == [(True, False)] * 16
    assert grid.pushed.count(True) == len(grid.pushed)
    assert len(on_disk(out / "ledger.sqlite", "charges")) == 16


def test_every_reply_is_on_disk_before_the_server_judges_it(tmp_path, monkeypatch):
    from fed_dpprune.federation.strategy import Server

    out, stored = tmp_path / "out", []
    judge = Server._judge

    def judged(self, order, client, message):
        stored.append(order.terms[client].key in on_disk(out / "ledger.sqlite", "replies"))
        return judge(self, order, client, message)

    monkeypatch.setattr(Server, "_judge", judged)
    small_run.run(small_run.config(), out)
    assert stored == [True] * 16


def test_the_ledger_holds_each_charge_of_the_run(tmp_path):
    out = tmp_path / "out"
    small_run.run(small_run.config(), out)
    records = small_run.clients(out)
    with Ledger.read(out / "ledger.sqlite") as ledger:
        for client in range(4):
            steps = sum(row["steps"] for row in records if row["client"] == client)
            assert sum(entry.steps for entry in ledger.history(str(client))) == steps == 8
            assert ledger.spent(str(client)).epsilon == pytest.approx(records[-4 + client]["epsilon"], abs=1e-9)
        assert ledger.head().count == 16


# --- the grid by itself ---------------------------------------------------------------------------------------------------


class Echo(InlineGrid):
    """A grid whose clients answer with a new payload every time they are asked."""

    def __init__(self) -> None:
        app = ClientApp()
        self.handled = 0

        @app.train()
        def train(message: Message, context: Context) -> Message:
            self.handled += 1
            terms = from_wire(dict(message.content["terms"]))
            reply = Reply("ok", terms.key, terms.round, terms.digest, terms.fingerprint, bytes([self.handled] * 8))
            return Message(messages.train_reply(reply), reply_to=message)

        super().__init__(app, [{"partition-id": p} for p in range(4)])


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    _, tap = small_run.run(small_run.config(), tmp_path_factory.mktemp("host") / "out")
    return {place: contents[0] for place, contents in tap.requests.items()}


@pytest.fixture
def hosted(tmp_path):
    conf = small_run.config()
    ledger = Ledger.create(tmp_path / "ledger.sqlite", IDENTITY, mode="simulation", delta=conf.privacy.delta, accountant="rdp")
    inner = Echo()
    with ledger:
        yield HostGrid(inner, LedgerGuard(ledger, ClientPolicy(max_epsilon=1.5), dict.fromkeys(range(4), 337))), inner, ledger


def send(grid: HostGrid, contents: list, nodes: list[int]) -> list[Message]:
    ids = list(
        grid.push_messages([grid.create_message(c, messages.TRAIN, node, "1") for c, node in zip(contents, nodes, strict=True)])
    )
    replies: dict[str, Message] = {}
    while set(replies) < set(ids):
        for reply in grid.pull_messages([i for i in ids if i not in replies]):
            replies[reply.metadata.reply_to_message_id] = reply
    return [replies[i] for i in ids]


def test_a_repeated_request_gets_the_stored_bytes_and_reaches_no_client(hosted, asked):
    grid, inner, ledger = hosted
    (first,) = send(grid, [asked[1, 0]], [1])
    (again,) = send(grid, [asked[1, 0]], [1])
    assert messages.freeze(first.content) == messages.freeze(again.content)
    assert first.content.object_id == again.content.object_id
    assert inner.handled == 1
    assert ledger.head().count == 1


def test_a_second_reply_to_a_request_is_not_handed_on(hosted, asked):
    """Two of one request on their way at once: both are computed, one reply is stored, and that one goes on twice."""
    grid, inner, ledger = hosted
    replies = send(grid, [asked[1, 0], asked[1, 0]], [1, 1])
    assert inner.handled == 2
    assert messages.freeze(replies[0].content) == messages.freeze(replies[1].content)
    assert ledger.head().count == 1


def test_a_refused_request_reaches_no_client_and_the_others_go_on(hosted, asked):
    grid, inner, ledger = hosted
    quiet = small_run.with_record(asked[1, 1], "terms", noise_multiplier=0.0)
    replies = send(grid, [asked[1, 0], quiet, asked[1, 2]], [1, 2, 3])
    assert [r.content["reply"]["status"] for r in replies] == ["ok", "noise-multiplier-below-policy", "ok"]
    assert inner.handled == 2
    assert ledger.clients() == ["0", "2"]


def test_a_client_past_its_budget_is_refused_and_the_others_go_on(hosted, asked):
    grid, inner, _ = hosted
    send(grid, [asked[1, 0]], [1])
    replies = send(grid, [asked[2, 0], asked[2, 1]], [1, 2])
    assert [r.content["reply"]["status"] for r in replies] == ["budget-exhausted", "ok"]
    assert inner.handled == 2


def test_a_charge_whose_reply_was_lost_is_computed_again_uncharged(hosted, asked, monkeypatch):
    grid, inner, ledger = hosted
    monkeypatch.setattr(inner, "_handle", lambda message: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        send(grid, [asked[1, 0]], [1])
    monkeypatch.undo()
    (reply,) = send(grid, [asked[1, 0]], [1])
    assert reply.content["reply"]["status"] == "ok"
    assert ledger.head().count == 1


def test_a_ledger_that_cannot_be_written_lets_no_request_through(hosted, asked, tmp_path):
    from fed_dpprune.errors import LedgerError

    grid, inner, _ = hosted
    (tmp_path / "ledger.sqlite").unlink()
    with pytest.raises(LedgerError):
        send(grid, [asked[1, 0]], [1])
    assert inner.handled == 0


def test_a_stored_reply_is_thawed_to_the_record_that_was_frozen(asked):
    terms = from_wire(dict(asked[1, 0]["terms"]))
    for payload in (b"", b"\x00", bytes(range(256))):
        content = messages.train_reply(Reply("ok", terms.key, 1, terms.digest, terms.fingerprint, payload))
        assert messages.thaw(messages.freeze(content)).object_id == content.object_id
