"""What travels in a run: both ends hold one model to the bit, the plan is what it carries, and no reply breaks the server."""

from __future__ import annotations

import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import small_run
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from small_run import OwnClient, Tap
from test_comm_fuzz import mutate

from fed_dpprune import config as cfg
from fed_dpprune.comm.codecs.table import NAMES
from fed_dpprune.comm.downlink import MOST_KEPT
from fed_dpprune.comm.meter import KINDS
from fed_dpprune.comm.validate import CODES
from fed_dpprune.federation import client as client_side
from fed_dpprune.federation import facts, messages, strategy, uplink
from fed_dpprune.federation.broadcast import Broadcast
from fed_dpprune.federation.model_store import SharedStore
from fed_dpprune.federation.secrets import SeededSecrets
from fed_dpprune.federation.strategy import Answer, Order, Server
from fed_dpprune.federation.supports import pack_clients, unpack_clients
from fed_dpprune.plan import make_plan

PARTIAL: dict[str, Any] = {
    "federation.clients": 4,
    "federation.clients-per-round": 2,
    "federation.rounds": 8,
    "sparsity.freeze.rate": 0.9,
    "sparsity.freeze.ramp": "constant",
    "client.momentum": 0.0,
    "server.momentum": 0.5,
    "model.hidden": [8],
}
# Nearly all survivors live, so that after two missed rounds who answered makes the changes longer than the model.
NEWEST: dict[str, Any] = {
    **PARTIAL,
    "sparsity.prune.method": "random",
    "sparsity.shared": False,
    "sparsity.freeze.rate": 0.1,
    "federation.clients": 9,
}
# One support for the run: the changes stay small, however many rounds were missed.
LONG_AWAY: dict[str, Any] = {**NEWEST, "sparsity.shared": True, "sparsity.freeze.refresh": "run", "federation.rounds": 12}
SUPPORTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "each its own": {"sparsity.shared": False},
    "groups": {"sparsity.shared": False, "sparsity.groups": 2},
    "odds, each its own": {"sparsity.shared": False, "sparsity.freeze.odds": "layer-energy"},
}


class Apart(Tap):
    """Clients with a store each, one of which loses it before a round."""

    clients: list[OwnClient]
    loses: tuple[int, int] = (0, 0)
    folder: Path

    def asked(self, place: tuple[int, int], message: Message) -> None:
        if place == self.loses:
            setup = self.clients[place[1]].runtime._setup
            setup.store = SharedStore(self.folder / "new", setup.store.d)  # type: ignore[attr-defined]


def run_apart(conf: cfg.Config, folder: Path, loses: tuple[int, int]) -> tuple[Any, dict[tuple[int, int], Any], list[Any]]:
    """(grid, what each client trained from by round and partition, the server's models by version)."""
    clients = [
        small_run.own_client(conf, partition, folder / str(partition), secrets=SeededSecrets(conf.seed))
        for partition in range(conf.federation.clients)
    ]

    def app(message: Message, context: Any) -> Message:
        runtime = clients[int(context.node_config["partition-id"])].runtime
        answer = runtime.train if message.metadata.message_type == messages.TRAIN else runtime.hello
        return Message(answer(message.content), reply_to=message)

    def grid(_: Any, nodes: Any) -> Apart:
        made = Apart(app, nodes)
        made.clients, made.loses, made.folder = clients, loses, folder
        return made

    trained: dict[tuple[int, int], Any] = {}
    versions: list[Any] = []
    train, advance = client_side.train, Broadcast.advance

    def spy(config: Any, terms: Any, live: Any, survivors: Any, weights: Any, *rest: Any) -> Any:
        trained[terms.round, terms.client] = weights.copy()
        return train(config, terms, live, survivors, weights, *rest)

    def follow(self: Broadcast, *arguments: Any) -> None:
        versions.extend([] if versions else [self.model.copy()])
        advance(self, *arguments)
        versions.append(self.model.copy())

    with patch.object(client_side, "train", spy), patch.object(Broadcast, "advance", follow):
        outcome, made = small_run.run(conf, folder / "out", tap=grid)
    assert outcome.status == "complete", outcome.error
    return made, trained, versions


CASES = [(name, "shared") for name in NAMES] + [
    (name, how) for how, name in zip(islice(SUPPORTS, 1, None), ("level2", "float32", "sign"), strict=True)
]


@pytest.mark.parametrize(("downlink", "supports"), CASES)
def test_every_client_trains_from_the_servers_model_to_the_bit(downlink, supports, tmp_path):
    lossy = downlink != "float32"
    conf = small_run.config(**{**PARTIAL, **SUPPORTS[supports], "wire.downlink": downlink, "wire.error-feedback": lossy})
    cohorts = make_plan(conf, facts.gather(conf).facts).cohorts
    asked = [r for r in range(2, 9) if cohorts[r - 1][0] in {c for earlier in cohorts[: r - 1] for c in earlier}]
    loses = (asked[2], cohorts[asked[2] - 1][0])  # a client that has been asked before
    grid, trained, versions = run_apart(conf, tmp_path, loses)

    assert set(trained) == {(r, c) for r, cohort in enumerate(cohorts, start=1) for c in cohort}
    for (number, client), weights in trained.items():
        assert weights.tobytes() == versions[number - 1].tobytes(), (number, client)
    down = small_run.summary(tmp_path / "out")["bytes"]["downlink"]["by_kind"]
    assert {"join", "sync", "resync"} <= set(down) <= set(KINDS)
    assert len(grid.replies[loses]) == 2, "a refusal for want of the model, then the update"
    gaps = {r - max(e for e in range(1, r) if c in cohorts[e - 1]) for r, c in trained if any(c in x for x in cohorts[: r - 1])}
    assert max(gaps) > 1, "no client missed a round: the draw of cohorts no longer tests anything"


def test_the_newest_model_is_sent_where_it_is_smaller_than_what_changed(tmp_path):
    """Who answered in the missed rounds comes on top of the values, and these are nearly all of the model."""
    conf = small_run.config(**{**NEWEST, "federation.rounds": 12})
    grid, trained, versions = run_apart(conf, tmp_path, (0, 0))
    for (number, client), weights in trained.items():
        assert weights.tobytes() == versions[number - 1].tobytes(), (number, client)
    sent = [content for contents in grid.requests.values() for content in contents]
    sizes = {kind: [small_run.payload_bytes(c) for c in sent if c["request"]["kind"] == kind] for kind in ("newest", "sync")}
    assert sizes["newest"] and max(sizes["sync"]) <= max(sizes["newest"])
    assert len(set(sizes["newest"])) == 1, "the values of all survivors, whatever was missed"
    assert "newest" not in small_run.summary(tmp_path / "out")["bytes"]["downlink"]["by_kind"], "it is metered as a sync"


def test_error_feedback_and_the_plain_quantiser_send_different_models(tmp_path):
    models = []
    for feedback in (True, False):
        conf = small_run.config(**{**PARTIAL, "wire.downlink": "sign", "wire.error-feedback": feedback})
        small_run.run(conf, tmp_path / str(feedback))
        models.append((tmp_path / str(feedback) / "model.safetensors").read_bytes())
    assert models[0] != models[1]


@pytest.mark.parametrize("lossy", [False, True])
def test_the_server_keeps_few_changes_and_who_was_long_away_gets_the_newest_model(lossy, tmp_path):
    conf = small_run.config(**{**LONG_AWAY, "wire.downlink": "int8" if lossy else "float32"})
    kept: list[float] = []
    acknowledged = Broadcast.acknowledged

    def count(self: Broadcast, client: int, version: int) -> None:
        kept.append(sum(change.support.k for change in self.changes.values()) / self.begin.survivors.k)
        acknowledged(self, client, version)

    with patch.object(Broadcast, "acknowledged", count):
        grid, trained, versions = run_apart(conf, tmp_path, (0, 0))
    assert 3.0 < max(kept) <= MOST_KEPT
    for (number, client), weights in trained.items():
        assert weights.tobytes() == versions[number - 1].tobytes(), (number, client)
    assert "newest" in {content["request"]["kind"] for contents in grid.requests.values() for content in contents}


STOCHASTIC: dict[str, Any] = {**PARTIAL, "wire.uplink": "int8", "wire.downlink": "int4", "wire.rounding": "stochastic"}


def test_rounding_by_chance_is_the_same_at_both_ends(tmp_path):
    conf = small_run.config(**{**STOCHASTIC, "wire.error-feedback": True})
    _, trained, versions = run_apart(conf, tmp_path, (0, 0))
    for (number, client), weights in trained.items():
        assert weights.tobytes() == versions[number - 1].tobytes(), (number, client)
    small_run.run(small_run.config(**{**STOCHASTIC, "wire.error-feedback": True, "wire.rounding": "nearest"}), tmp_path / "near")
    assert (tmp_path / "near" / "model.safetensors").read_bytes() != (tmp_path / "out" / "model.safetensors").read_bytes()


def test_rounding_by_chance_averages_out_over_clients_and_rounds():
    """Words that two messages share would add up their errors: as many messages would be no better than one."""
    wire = small_run.config(**STOCHASTIC).wire.model_copy(update={"uplink": "int4"})
    values = np.random.default_rng(0).standard_normal(600)
    errors = [
        uplink.decode(wire, uplink.encode(wire, values, uplink.dither(wire, 3, "up", number, client)), 600) - values
        for number in range(1, 11)
        for client in range(40)
    ]
    step = np.abs(values).max() / 7
    assert np.mean(np.square(errors)) == pytest.approx(step**2 / 6, rel=0.05)
    assert np.mean(np.square(np.mean(errors, axis=0))) == pytest.approx(step**2 / 6 / 400, rel=0.2)
    assert uplink.dither(small_run.config().wire, 3, "up", 1, 1) is None


RANDOM = {"sparsity.prune.method": "random"}
PRICED: dict[str, dict[str, Any]] = {
    "shared, float32": {},
    "shared, sign and level2": {"wire.uplink": "sign", "wire.downlink": "level2", "wire.error-feedback": True},
    "partial": PARTIAL,
    "partial, int4": {**PARTIAL, "wire.downlink": "int4"},
    "each its own": {**PARTIAL, **SUPPORTS["each its own"], "wire.downlink": "sign", "wire.uplink": "level2"},
    "groups, all": {**SUPPORTS["groups"], "wire.downlink": "level3", "wire.error-feedback": True},
    "each its own, float32": {**PARTIAL, **SUPPORTS["each its own"]},
    "dense": {"sparsity.freeze.method": "none", "sparsity.freeze.rate": 0.0, "sparsity.prune.rate": 0.0},
    "dense, int8": {
        "sparsity.freeze.method": "none",
        "sparsity.freeze.rate": 0.0,
        "wire.uplink": "int8",
        "wire.downlink": "int8",
    },
    "drops": {"sparsity.drop.method": "random", "sparsity.drop.rate": 0.5, "federation.local-steps": 3},
    "drops, each its own": {**SUPPORTS["each its own"], "sparsity.drop.method": "random", "sparsity.drop.rate": 0.5},
    "rows": {**PARTIAL, "sparsity.granularity": "row", "wire.uplink": "level2"},
    "channels, each its own": {**PARTIAL, **SUPPORTS["each its own"], "sparsity.granularity": "channel", "wire.downlink": "int8"},
    "layers": {"sparsity.granularity": "layer", "sparsity.freeze.rate": 0.5, "sparsity.freeze.refresh": "step"},
    "newest": NEWEST,
    "rounding by chance": STOCHASTIC,
    "long away": LONG_AWAY,
}


@pytest.mark.parametrize("name", PRICED)
def test_the_plan_is_the_run_byte_for_byte(name, tmp_path):
    conf = small_run.config(**{**RANDOM, **PRICED[name]})
    plan = make_plan(conf, facts.gather(conf).facts)
    small_run.run(conf, tmp_path / "out")
    assert plan.uplink.exact and plan.downlink.exact
    lines = small_run.rounds(tmp_path / "out")
    assert tuple(line["bytes_up"] for line in lines) == plan.uplink.payload_by_round
    assert tuple(line["bytes_down"] for line in lines) == plan.downlink.payload_by_round


BOUNDED: dict[str, dict[str, Any]] = {
    "odds, each its own": {**PARTIAL, **SUPPORTS["odds, each its own"], "wire.downlink": "level2"},
    "odds, each its own, float32": {**PARTIAL, **SUPPORTS["odds, each its own"]},
    "by magnitude": {**PARTIAL, "sparsity.freeze.method": "magnitude"},
    "rows of a scored net": {**PARTIAL, "sparsity.prune.method": "synflow", "sparsity.granularity": "row"},
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_bound_is_marked_and_holds(name, tmp_path):
    conf = small_run.config(**{**RANDOM, **BOUNDED[name]})
    plan = make_plan(conf, facts.gather(conf).facts)
    small_run.run(conf, tmp_path / "out")
    assert not (plan.uplink.exact and plan.downlink.exact)
    for line, up, down in zip(
        small_run.rounds(tmp_path / "out"), plan.uplink.payload_by_round, plan.downlink.payload_by_round, strict=True
    ):
        assert line["bytes_up"] <= up
        assert line["bytes_down"] <= down


def test_groups_have_one_support_each(tmp_path):
    _, tap = small_run.run(small_run.config(**SUPPORTS["groups"]), tmp_path / "out")
    for number in range(2, 5):  # in round 1 the ramp freezes nothing
        digests = [tap.requests[number, c][0]["terms"]["digest"] for c in range(4)]
        assert digests[0] == digests[2] != digests[1] == digests[3]


def test_who_answered_is_told_in_bits():
    for clients in ((0,), (3, 8), tuple(range(20)), (4096,)):
        blob = pack_clients(clients)
        assert len(blob) == max(clients) // 8 + 1
        assert unpack_clients(blob) == clients
        assert unpack_clients(blob + b"\0\0") == clients


def test_the_meter_reports_messages_beside_payloads_and_totals_by_kind(tmp_path):
    small_run.run(small_run.config(**{**RANDOM, **PARTIAL}), tmp_path / "out")
    for name, way in small_run.summary(tmp_path / "out")["bytes"].items():
        assert sum(way["by_kind"].values()) == way["payload"] < way["message"] == sum(way["message_by_kind"].values())
        assert way["ratio"] == way["payload"] / way["dense_float32"]
        assert way["message_ratio"] == way["message"] / way["dense_float32"]
        assert (way["planned"], way["planned_exact"]) == (way["payload"], True)
        end = {"uplink": "up", "downlink": "down"}[name]
        for lines in (small_run.rounds(tmp_path / "out"), small_run.clients(tmp_path / "out")):
            assert way["dense_float32"] == sum(line[f"dense_{end}"] for line in lines)
            assert all(line[f"planned_{end}"] == line[f"bytes_{end}"] for line in lines)


def test_a_request_that_is_sent_again_is_metered_as_a_retry(tmp_path):
    """The first request to client 1 in round 2 is lost; its node comes back, and is asked once more."""

    class Losing(Tap):
        lost = False

        def push_messages(self, messages: Any) -> Any:
            ids = []
            for message in messages:
                lose = not self.lost and message.metadata.group_id == "2" and self.partitions[message.metadata.dst_node_id] == 1
                ids += ["lost"] if lose else super().push_messages([message])
                self.lost = self.lost or lose
            return ids

    with (
        patch.object(Server, "_is_far", lambda self: isinstance(self, Server)),
        patch.object(Server, "_returned", lambda self: [1]),
        patch.object(strategy, "REJOIN_S", 0.05),
        patch.object(strategy, "FAR_POLL_S", 0.01),
    ):
        outcome, _ = small_run.run(small_run.config(**{"federation.reply-timeout": 20.0}), tmp_path / "out", tap=Losing)
    assert outcome.status == "complete", outcome.error
    kinds = {(row["round"], row["client"]): row["downlink_kind"] for row in small_run.clients(tmp_path / "out")}
    assert kinds[2, 1] != kinds[2, 0] == "sync"
    assert small_run.summary(tmp_path / "out")["bytes"]["downlink"]["by_kind"]["retry"] > 0


# ---------------------------------------------------------------- whatever a client sends, the server goes on

ODD_VALUES: tuple[Any, ...] = ("", "x" * 1000, 0, -1, 2**62, 1.5, float("nan"), True, [1, 2], b"\xff" * 40, [])
STATUSES = {"answered", "refused", "rejected", "failed"}
ECHOES = {"wrong-request", "wrong-round", "wrong-digest", "wrong-fingerprint"}


def damaged(content: RecordDict, rng: np.random.Generator) -> RecordDict:
    """A reply with something wrong in its records, its fields, its array's container or its payload."""
    records = dict(content)
    head, blob = dict(records["reply"]), messages.payload_of(content, "update")  # type: ignore[call-overload]
    for _ in range(int(rng.integers(1, 3))):
        kind = int(rng.integers(0, 10))
        name = list(head)[int(rng.integers(len(head)))] if head else "status"
        if kind == 0:
            head[name] = ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
        elif kind == 1:
            head.pop(name, None)
        elif kind == 2:
            head["note"] = "text of a client's own"
        elif kind == 3:
            records["more"] = MetricRecord({"examples": 12})
        elif kind == 4:
            records.pop("update", None)
        elif kind == 5:
            kept = 128 * int(rng.integers(2))
            size = (1 << 40, kept - 128, -1, len(blob))[int(rng.integers(4))]  # kept - 128 is what a sum alone would accept
            words = str(rng.choice(["uint8", "uint8", "float32", "nonsense"])), str(rng.choice(["x", "numpy.ndarray"]))
            array = Array(dtype=words[0], shape=(size,), stype=words[1], data=blob[:kept])
            records["update"] = ArrayRecord({"payload": array})
        elif kind == 6:
            records["update"] = ArrayRecord({"other": Array(np.zeros(3)), "payload": Array(np.zeros((2, 2), dtype=np.uint8))})
        elif kind == 7:
            records["update"] = ConfigRecord({"payload": blob})
        else:
            records["update"] = ArrayRecord({"payload": Array(np.frombuffer(mutate(blob, rng) or b"\0", dtype=np.uint8))})
    records["reply"] = ConfigRecord(head)
    if rng.integers(50) == 0:
        records.pop("reply")
    return RecordDict(records)


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> list[tuple[Server, Order, int, Message]]:
    """A server in the midst of a round, and a client's honest reply, for codecs of each kind."""
    found: list[tuple[Server, Order, int, Message]] = []
    for name in ("float32", "int4", "sign"):
        conf = small_run.config(**{"wire.uplink": name, "federation.rounds": 2})
        judge = Server._judge

        def keep(self: Server, order: Order, client: int, message: Message, judge: Any = judge) -> Answer:
            if (order.round, client) == (2, 1):
                found.append((self, order, client, message))
            return judge(self, order, client, message)

        with patch.object(Server, "_judge", keep):
            small_run.run(conf, tmp_path_factory.mktemp(name) / "out")
    return found


def judge_many(judged: list[tuple[Server, Order, int, Message]], count: int) -> dict[str, int]:
    """Statuses of `count` damaged replies, and under "peak" the most bytes that judging one of them took (when traced)."""
    rng = np.random.default_rng(7)
    seen: dict[str, int] = {"peak": 0}
    for number in range(count):
        server, order, client, message = judged[number % len(judged)]
        bad = Message(damaged(message.content, rng), reply_to=message)
        if traced := tracemalloc.is_tracing():
            tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        answer = server._judge(order, client, bad)
        seen["peak"] = max(seen["peak"], tracemalloc.get_traced_memory()[1] - before) if traced else 0
        assert answer.status in STATUSES
        assert (answer.values is not None) == (answer.status == "answered")
        if answer.values is not None:
            assert answer.values.shape == (order.terms[client].live,)
            assert np.isfinite(answer.values).all()
        if answer.status == "rejected":
            assert answer.reason in {*CODES, *ECHOES, "unknown-status"} or " " in answer.reason, answer.reason
        seen[answer.status] = seen.get(answer.status, 0) + 1
    return seen


def test_a_thousand_damaged_replies_are_judged_and_none_breaks_the_server(judged):
    judge_many(judged, 30)  # what is loaded once is not the replies'
    tracemalloc.start()
    seen = judge_many(judged, 1000)
    tracemalloc.stop()
    assert seen["rejected"] > 500
    assert 0 < seen["peak"] < 2**18


@pytest.mark.slow
def test_a_hundred_thousand_damaged_replies_are_judged_and_none_breaks_the_server(judged):
    assert judge_many(judged, 100_000)["rejected"] > 50_000


def test_the_round_goes_on_without_a_damaged_reply(tmp_path):
    rng = np.random.default_rng(3)

    class Damaging(Tap):
        def answered(self, place: tuple[int, int], reply: Message) -> Message:
            if place[1] != 2:
                return reply
            short = np.frombuffer(messages.payload_of(reply.content, "update")[:-1], dtype=np.uint8)
            content = small_run.without_note(reply.content)
            content["update"] = ArrayRecord({"payload": Array(short)})
            reply.content = damaged(content, rng) if place[0] == 3 else content
            return reply

    outcome, _ = small_run.run(small_run.config(**{"federation.reply-timeout": 5.0}), tmp_path / "out", tap=Damaging)
    assert outcome.status == "complete", outcome.error
    for line in small_run.rounds(tmp_path / "out"):
        assert line["clients"]["answered"] == 3
        assert line["clients"]["rejected"] + line["clients"]["refused"] <= 1
        assert any("client 2" in note for note in line["notes"])
    assert small_run.rounds(tmp_path / "out")[0]["notes"] == ["client 2: rejected (wrong-length)"]
