"""The server among clients that fail, lie or fall silent: each is named in the record, and the round goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import small_run
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from small_run import with_record

from fed_dpprune.federation import messages

BAD = 2  # the partition that misbehaves, in round 2
QUICK = {"federation.reply-timeout": 0.3, "federation.rounds": 3}


def values(content: RecordDict, change: Any) -> RecordDict:
    """The reply with other float32 values."""
    found = np.frombuffer(messages.payload_of(content, "update"), dtype="<f4").copy()
    blob = np.ascontiguousarray(change(found)).view(np.uint8)
    return RecordDict({**dict(content), "update": ArrayRecord({"payload": Array(blob)})})


def at(place: int, value: float) -> Any:
    def change(found: np.ndarray) -> np.ndarray:
        found[place] = value
        return found

    return change


def array(content: RecordDict, payload: np.ndarray) -> RecordDict:
    return RecordDict({**dict(content), "update": ArrayRecord({"payload": Array(payload)})})


LIES: dict[str, tuple[Any, str, str]] = {
    "too-short": (lambda c: values(c, lambda v: v[:-1]), "rejected", "wrong-length"),
    "too-long": (lambda c: values(c, lambda v: np.append(v, v[:1])), "rejected", "wrong-length"),
    "no-values": (lambda c: RecordDict({"reply": c["reply"]}), "rejected", "wrong-length"),
    "not-a-number": (lambda c: values(c, at(0, np.nan)), "rejected", "non-finite"),
    "infinite": (lambda c: values(c, at(-1, np.inf)), "rejected", "non-finite"),
    "absurd-size": (lambda c: values(c, at(5, 1e6)), "rejected", "out-of-bound"),
    "wrong-request": (lambda c: with_record(c, "reply", request="0" * 32), "rejected", "wrong-request"),
    "wrong-round": (lambda c: with_record(c, "reply", round=1), "rejected", "wrong-round"),
    "wrong-digest": (lambda c: with_record(c, "reply", digest="0" * 32), "rejected", "wrong-digest"),
    "wrong-fingerprint": (lambda c: with_record(c, "reply", fingerprint="0" * 32), "rejected", "wrong-fingerprint"),
    "unknown-status": (lambda c: with_record(c, "reply", status="all fine\nround 9"), "rejected", "unknown-status"),
    "extra-field": (lambda c: with_record(c, "reply", examples=337), "rejected", "fields are not those of the protocol"),
    "missing-field": (lambda c: with_record(c, "reply", digest=None), "rejected", "fields are not those of the protocol"),
    "round-as-text": (lambda c: with_record(c, "reply", round="2"), "rejected", "fields are not those of the protocol"),
    "extra-record": (
        lambda c: RecordDict({**dict(c), "metrics": ConfigRecord({"loss": 0.1})}),
        "rejected",
        "unknown records ['metrics']",
    ),
    "no-reply-record": (lambda c: RecordDict({"update": c["update"]}), "rejected", "record 'reply' is missing"),
    "floats-in-the-array": (
        lambda c: array(c, np.zeros(4, dtype=np.float32)),
        "rejected",
        "record 'update' is not an array of bytes",
    ),
    "square-array": (
        lambda c: array(c, np.zeros((2, 2), dtype=np.uint8)),
        "rejected",
        "record 'update' is not an array of bytes",
    ),
    "negative-size": (
        lambda c: RecordDict({**dict(c), "update": ArrayRecord({"payload": Array("uint8", (-128,), "numpy.ndarray", b"")})}),
        "rejected",
        "record 'update' does not have its declared size",
    ),
    "refusal": (
        lambda c: with_record(RecordDict({"reply": c["reply"]}), "reply", status="config-mismatch"),
        "refused",
        "config-mismatch",
    ),
    "failure": (
        lambda c: with_record(RecordDict({"reply": c["reply"]}), "reply", status="internal-error"),
        "failed",
        "internal-error",
    ),
}


def lying(change: Any) -> type[small_run.Tap]:
    class Lying(small_run.Tap):
        def answered(self, place: tuple[int, int], reply: Message) -> Message:
            if place == (2, BAD):
                note = messages.take_seconds(reply.content)
                reply.content = change(reply.content)
                assert note is not None
            return reply

    return Lying


def record_of(out: Any) -> dict[str, Any]:
    return next(row for row in small_run.clients(out) if (row["round"], row["client"]) == (2, BAD))


@pytest.mark.parametrize("lie", LIES)
def test_a_bad_reply_is_named_and_the_round_goes_on(tmp_path, lie):
    change, status, reason = LIES[lie]
    outcome, _ = small_run.run(small_run.config(**QUICK), tmp_path, tap=lying(change))
    assert outcome.status == "complete"
    row, second = record_of(tmp_path), small_run.rounds(tmp_path)[1]
    assert (row["status"], row["reason"]) == (status, reason)
    assert second["notes"] == [f"client {BAD}: {status} ({reason})"]
    assert second["clients"] == {
        "asked": 4, "answered": 3, "refused": int(status == "refused"), "rejected": int(status == "rejected")
    }  # fmt: skip
    assert row["steps"] == 2, "the host had charged it before it was asked"
    assert row["message_up"] > 0, "it travelled, whatever it was"
    assert (row["dense_up"] > 0) == (row["bytes_up"] > 0 or lie == "no-values"), "a refusal stands for no values"
    assert small_run.rounds(tmp_path)[2]["clients"]["answered"] == 4


def test_a_bad_reply_does_not_touch_the_model(tmp_path):
    """The round's result is that of the three others, as if the fourth had said nothing."""
    small_run.run(small_run.config(**QUICK), tmp_path / "lie", tap=lying(LIES["absurd-size"][0]))
    small_run.run(small_run.config(**QUICK), tmp_path / "silent", tap=Silent)
    accuracies = [[row["accuracy"] for row in small_run.rounds(tmp_path / name)] for name in ("lie", "silent")]
    assert accuracies[0][1] == accuracies[1][1]


class Silent(small_run.Tap):
    """Client BAD never answers in round 2."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [m for m in super().pull_messages(message_ids) if not self._is_bad(m)]

    def _is_bad(self, message: Message) -> bool:
        return message.metadata.group_id == "2" and self.partitions[message.metadata.src_node_id] == BAD


class Raising(small_run.Tap):
    """Client BAD's app breaks in round 2, as Flower reports it."""

    def _handle(self, message: Message) -> Message:
        if message.metadata.group_id == "2" and self.partitions[message.metadata.dst_node_id] == BAD:
            return Message(Error(code=2, reason="patient Miller"), reply_to=message)
        return super()._handle(message)


class Twice(small_run.Tap):
    """Every reply comes twice."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        return found + [copy.copy(m) for m in found if m.metadata.message_type == "train"]


class Stranger(small_run.Tap):
    """Beside each reply of round 2 comes one that answers nothing, from a node that was not asked."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        if not found or found[0].metadata.group_id != "2":
            return found
        other = copy.deepcopy(found[0])
        other.metadata.__dict__["_src_node_id"] = 999
        return [other, *found]


class Impostor(small_run.Tap):
    """Client BAD's reply of round 2 is signed by another client's node."""

    def answered(self, place: tuple[int, int], reply: Message) -> Message:
        if place == (2, BAD):
            reply.metadata.__dict__["_src_node_id"] = BAD
        return reply


def test_a_silent_client_is_left_out_and_counted_as_charged(tmp_path):
    outcome, _ = small_run.run(small_run.config(**QUICK), tmp_path, tap=Silent)
    assert outcome.status == "complete"
    row = record_of(tmp_path)
    assert (row["status"], row["steps"], row["bytes_up"]) == ("silent", 2, 0)
    assert outcome.summary["privacy"]["steps_by_client"][str(BAD)] == 6


def test_an_error_of_a_clients_app_is_a_failure_without_its_text(tmp_path):
    outcome, _ = small_run.run(small_run.config(**QUICK), tmp_path, tap=Raising)
    assert outcome.status == "complete"
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["reason"]) == ("failed", "internal-error")
    assert b"Miller" not in b"".join(p.read_bytes() for p in tmp_path.glob("*.json*"))


def test_of_a_reply_that_comes_twice_the_first_counts(tmp_path):
    conf = small_run.config(**QUICK)
    outcome, _ = small_run.run(conf, tmp_path / "twice", tap=Twice)
    small_run.run(conf, tmp_path / "once")
    assert outcome.status == "complete"
    assert small_run.rounds(tmp_path / "twice")[0]["notes"] == [f"client {c}: rejected (duplicate)" for c in range(4)]
    assert small_run.rounds(tmp_path / "twice")[0]["clients"] == {"asked": 4, "answered": 4, "refused": 0, "rejected": 4}
    assert small_run.result(tmp_path / "twice")[1] == small_run.result(tmp_path / "once")[1]
    assert small_run.result(tmp_path / "twice")[3] == small_run.result(tmp_path / "once")[3]


def test_a_reply_of_a_stranger_counts_for_nobody(tmp_path):
    conf = small_run.config(**QUICK)
    outcome, _ = small_run.run(conf, tmp_path / "stranger", tap=Stranger)
    small_run.run(conf, tmp_path / "alone")
    assert outcome.status == "complete"
    assert small_run.rounds(tmp_path / "stranger")[1]["notes"] == ["node 999: rejected (unknown-sender)"] * 4
    assert small_run.rounds(tmp_path / "stranger")[1]["clients"] == {"asked": 4, "answered": 4, "refused": 0, "rejected": 4}
    assert small_run.result(tmp_path / "stranger")[3] == small_run.result(tmp_path / "alone")[3]


def test_a_reply_from_another_clients_node_counts_for_neither(tmp_path):
    outcome, _ = small_run.run(small_run.config(**QUICK), tmp_path, tap=Impostor)
    assert outcome.status == "complete"
    assert record_of(tmp_path)["status"] == "silent"
    assert small_run.rounds(tmp_path)[1]["clients"]["answered"] == 3


def test_too_few_answers_end_the_run_with_complete_outputs(tmp_path):
    outcome, _ = small_run.run(
        small_run.config(**QUICK, **{"federation.min-clients": 4}), tmp_path, tap=lying(LIES["not-a-number"][0])
    )
    assert (outcome.status, outcome.exit_code) == ("stopped", 3)
    assert f"client {BAD}: non-finite" in str(outcome.error)
    made = small_run.summary(tmp_path)
    assert (made["status"], made["rounds"]) == ("stopped", 1)
    assert made["reason"] == str(outcome.error)
    assert made["privacy"]["steps_by_client"] == dict.fromkeys("0123", 4)
    assert small_run.rounds(tmp_path)[-1]["notes"][-1] == "too few clients: not aggregated"


def test_a_client_that_refuses_every_round_costs_nothing_and_is_named(tmp_path):
    """From the first round on, before it ever was charged."""
    conf = small_run.config(**{"policy.max-epsilon": 0.5})
    outcome, grid = small_run.run(conf, tmp_path)
    assert outcome.exit_code == 3
    assert grid.order == []
    assert {row["steps"] for row in small_run.clients(tmp_path)} == {0}
    assert outcome.summary["privacy"]["epsilon_max"] == 0.0


def test_one_clients_limit_stops_that_client_alone(tmp_path):
    """The smallest client samples most and meets the limit first; the others go on to the end."""
    changes = {"data.partition": "dirichlet", "data.alpha": 1.0, "privacy.delta": 1e-4, "federation.rounds": 6}
    free, _ = small_run.run(small_run.config(**changes), tmp_path / "free")
    spent = sorted(free.summary["privacy"]["epsilon_by_client"].values())
    limit = (spent[-1] + spent[-2]) / 2
    outcome, _ = small_run.run(small_run.config(**changes, **{"policy.max-epsilon": limit}), tmp_path / "limited")
    assert outcome.status == "complete"
    refused = [row for row in small_run.clients(tmp_path / "limited") if row["status"] == "refused"]
    assert {row["reason"] for row in refused} == {"budget-exhausted"}
    assert len({row["client"] for row in refused}) == 1
    assert all(row["steps"] == 0 for row in refused)
    assert max(outcome.summary["privacy"]["epsilon_by_client"].values()) <= limit
    last = small_run.rounds(tmp_path / "limited")[-1]
    assert last["clients"] == {"asked": 4, "answered": 3, "refused": 1, "rejected": 0}


def test_a_budget_that_ends_mid_run_says_which_client_which_limit_and_what_fits(tmp_path):
    outcome, _ = small_run.run(small_run.config(**{"policy.max-epsilon": 1.8}), tmp_path)
    assert outcome.exit_code == 3
    text = str(outcome.error)
    assert "client 0: budget-exhausted" in text
    assert "policy.max-epsilon" in text
    assert "1.8" in text
    assert "2 rounds of this setting fit" in text
    assert outcome.plan.max_rounds == 2 == small_run.summary(tmp_path)["rounds"]
    for name in ("summary.json", "rounds.jsonl", "clients.jsonl", "ledger.sqlite", "model.safetensors"):
        assert (tmp_path / name).stat().st_size


# --- who takes part -------------------------------------------------------------------------------------------------------


def hello(change: dict[str, Any], partition: int = 1) -> type[small_run.Tap]:
    class Hello(small_run.Tap):
        def _handle(self, message: Message) -> Message:
            reply = super()._handle(message)
            if message.metadata.message_type == "query" and self.partitions[reply.metadata.src_node_id] == partition:
                reply.content = with_record(reply.content, "hello", **change)
            return reply

    return Hello


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fingerprint": "0" * 32}, "client 1 runs other code"),
        ({"config": "0" * 32}, "client 1 has another config"),
        ({"partition_id": 0}, "two nodes say that they are partition 0"),
        ({"partition_id": "1"}, "not a whole number"),
        ({"partition_id": 7}, "partitions [0, 2, 3, 7] came"),
        ({"nominal_size": 0}, "not a whole number"),
        ({"nominal_size": 337.0}, "not a whole number"),
        ({"status": "internal-error"}, "refused to take part (internal-error)"),
    ],
)
def test_a_node_that_does_not_fit_ends_the_run_before_it_begins(tmp_path, change, text):
    outcome, grid = small_run.run(small_run.config(), tmp_path, tap=hello(change))
    assert outcome.exit_code == 3
    assert text in str(outcome.error)
    assert grid.order == []
    assert small_run.summary(tmp_path)["status"] == "stopped"


def test_a_client_whose_model_is_lost_is_resynchronised_and_the_bytes_are_counted(tmp_path):
    out = tmp_path / "out"

    class Losing(small_run.Tap):
        def asked(self, place: tuple[int, int], message: Message) -> None:
            if place == (2, BAD) and message.content["request"]["kind"] == "sync":
                from fed_dpprune.federation.simulation import _store

                _store.cache_clear()
                for path in (out / "checkpoint" / "clients").glob("*.model"):
                    path.unlink()

    outcome, grid = small_run.run(small_run.config(), out, tap=Losing)
    assert outcome.status == "complete"
    row = record_of(out)
    assert row["status"] == "answered"
    assert row["downlink_kind"] == "resync+sync"
    assert row["steps"] == 2
    assert row["bytes_down"] == sum(small_run.payload_bytes(c) for c in grid.requests[2, BAD])
    assert outcome.summary["bytes"]["downlink"]["by_kind"]["resync"] > 0
    plain, _ = small_run.run(small_run.config(), tmp_path / "plain")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert plain.status == "complete"
