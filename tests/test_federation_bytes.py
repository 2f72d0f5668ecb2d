"""Bytes: what passes the grid is what summary.json says, to the byte; and the plan said so beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
import small_run
from flwr.app import Message, RecordDict

from fed_dpprune.federation import messages
from fed_dpprune.federation.facts import prepare

VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "nothing-sparse": {"sparsity.prune.method": "none", "sparsity.prune.rate": 0, "sparsity.freeze.method": "none"},
    "some-clients": {"federation.clients": 7, "federation.clients-per-round": 3, "federation.rounds": 7},
    "step-by-step": {"sparsity.freeze.refresh": "step"},
    "one-draw": {"sparsity.freeze.refresh": "run", "federation.clients-per-round": 2},
    "drop": {"sparsity.drop.method": "random", "sparsity.drop.rate": 0.5, "federation.local-steps": 3},
    "uneven": {"data.partition": "dirichlet", "data.alpha": 0.7},
    "random-mask": {"sparsity.prune.method": "random"},
    "held": {"sparsity.prune.inactive": "hold", "sparsity.freeze.ramp": "constant"},
    "int8": {"wire.uplink": "int8"},
    "one-bit": {"wire.uplink": "sign", "federation.clients-per-round": 3},
    "by-magnitude": {"sparsity.freeze.method": "magnitude", "federation.clients-per-round": 2},
    "rows": {"sparsity.granularity": "row"},
    "int8-both-ways": {"wire.uplink": "int8", "wire.downlink": "int8"},
    "own-supports": {"sparsity.shared": False, "federation.clients-per-round": 3},
    "layer-energy": {"sparsity.freeze.odds": "layer-energy"},
    "groups": {"sparsity.shared": False, "sparsity.groups": 2, "wire.downlink": "int8"},
    "int4-with-feedback": {"wire.downlink": "int4", "wire.error-feedback": True},
    "top-k": {"wire.select": "top-k", "wire.select-rate": 0.5},
    "by-change": {"sparsity.freeze.method": "change", "federation.clients-per-round": 2},
    "snip": {"data.public": "digits[0:200]", "sparsity.prune.method": "snip"},
    "by-public-scores": {"data.public": "digits[0:200]", "sparsity.freeze.method": "public"},
    "public-drop": {"data.public": "digits[0:200]", "sparsity.drop.method": "public", "sparsity.drop.rate": 0.5},
}
# Its own zero rate would be refused together with its method.
VARIANTS["nothing-sparse"]["sparsity.freeze.rate"] = 0


class Weighing(small_run.Tap):
    """Adds up every train message that passes, in both directions."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.weights: dict[str, list[tuple[int, int, int, int]]] = {"up": [], "down": []}

    def _weigh(self, way: str, message: Message, partition: int) -> None:
        content = RecordDict({n: r for n, r in message.content.items() if n != messages.SIMULATION})
        weight = small_run.payload_bytes(content), small_run.deflated(content)
        self.weights[way].append((int(message.metadata.group_id), partition, *weight))

    def push_messages(self, messages_out: Iterable[Message]) -> Iterable[str]:
        batch = list(messages_out)
        for message in batch:
            if message.metadata.message_type == "train":
                self._weigh("down", message, self.partitions[message.metadata.dst_node_id])
        return super().push_messages(batch)

    def answered(self, place: tuple[int, int], reply: Message) -> Message:
        self._weigh("up", reply, place[1])
        return reply


@pytest.fixture(scope="module", params=VARIANTS)
def weighed(request, tmp_path_factory):
    """(config, outcome, grid, run directory) of one variant."""
    conf = small_run.config(**VARIANTS[request.param])
    out = tmp_path_factory.mktemp(request.param) / "out"
    outcome, grid = small_run.run(conf, out, tap=Weighing)
    assert outcome.status == "complete"
    return conf, outcome, grid, out


@pytest.mark.parametrize(("way", "name"), [("up", "uplink"), ("down", "downlink")])
def test_the_bytes_that_pass_are_the_bytes_in_the_summary(weighed, way, name):
    _, _, grid, out = weighed
    passed, told = grid.weights[way], small_run.summary(out)["bytes"][name]
    assert told["payload"] == sum(row[2] for row in passed)
    assert told["message"] == sum(row[3] for row in passed)
    assert told["dense_float32"] == 4 * 1210 * len(passed)
    assert told["ratio"] == told["payload"] / told["dense_float32"]
    assert sum(told["by_kind"].values()) == told["payload"]


@pytest.mark.parametrize("way", ["up", "down"])
def test_the_bytes_that_pass_are_the_bytes_of_each_round_and_client(weighed, way):
    _, _, grid, out = weighed
    for record in small_run.rounds(out):
        passed = [row for row in grid.weights[way] if row[0] == record["round"]]
        assert (record[f"bytes_{way}"], record[f"message_{way}"]) == (sum(r[2] for r in passed), sum(r[3] for r in passed))
    for record in small_run.clients(out):
        passed = [row for row in grid.weights[way] if row[:2] == (record["round"], record["client"])]
        assert (record[f"bytes_{way}"], record[f"message_{way}"]) == (sum(r[2] for r in passed), sum(r[3] for r in passed))


def test_a_message_is_as_large_as_what_flower_serialises(weighed):
    _, _, grid, _ = weighed
    for contents in grid.requests.values():
        for content in contents:
            assert messages.message_bytes(content) == small_run.deflated(content)


def test_the_plan_says_the_uplink_of_every_round(weighed):
    _, outcome, _, out = weighed
    planned = outcome.plan.uplink
    ran = [row["bytes_up"] for row in small_run.rounds(out)]
    if planned.exact:
        assert list(planned.payload_by_round) == ran
    else:
        assert all(p >= r for p, r in zip(planned.payload_by_round, ran, strict=True))
    assert planned.dense_float32 == small_run.summary(out)["bytes"]["uplink"]["dense_float32"]


def test_the_plan_says_the_downlink_of_every_round(weighed):
    _, outcome, _, out = weighed
    planned = outcome.plan.downlink
    ran = [row["bytes_down"] for row in small_run.rounds(out)]
    if planned.exact:
        assert list(planned.payload_by_round) == ran
    else:
        assert all(p >= r for p, r in zip(planned.payload_by_round, ran, strict=True))


def test_the_plan_says_how_many_coordinates_live(weighed):
    _, outcome, _, out = weighed
    ran = [row["live"] for row in small_run.rounds(out)]
    if outcome.plan.live_exact:
        assert list(outcome.plan.live_by_round) == ran
    else:
        assert all(p >= r for p, r in zip(outcome.plan.live_by_round, ran, strict=True))
    assert ran == small_run.summary(out)["sparsity"]["live_by_round"]


def test_the_plan_says_every_epsilon(weighed):
    _, outcome, _, out = weighed
    ran = [row["epsilon_max"] for row in small_run.rounds(out)]
    assert ran == pytest.approx(list(outcome.plan.epsilon_by_round), abs=1e-9)
    privacy = small_run.summary(out)["privacy"]
    assert privacy["epsilon_max"] == pytest.approx(outcome.plan.epsilon_max, abs=1e-9)
    assert list(privacy["steps_by_client"].values()) == list(outcome.plan.steps_by_client)
    assert list(privacy["sample_rates"].values()) == list(outcome.plan.sample_rates)


@pytest.mark.parametrize(
    "variant", ["shared", "some-clients", "step-by-step", "one-draw", "drop", "uneven", "random-mask", "int8"]
)
def test_where_supports_come_from_public_streams_the_plan_is_exact(variant):
    _, plan = prepare(small_run.config(**VARIANTS[variant]))
    assert plan.live_exact
    assert plan.uplink.exact
    assert plan.downlink.exact


def test_frozen_coordinates_cost_no_bytes(tmp_path):
    """At float32, a round's uplink is 4 bytes for each live coordinate and client, nothing else."""
    small_run.run(small_run.config(), tmp_path)
    for record in small_run.rounds(tmp_path):
        assert record["bytes_up"] == 4 * record["live"] * record["clients"]["answered"]


def test_a_random_support_travels_as_nothing_and_a_pruned_start_as_its_mask(tmp_path):
    _, grid = small_run.run(small_run.config(), tmp_path / "scores")
    assert small_run.payload_bytes(grid.requests[1, 0][0]) <= 1 + (1210 + 7) // 8
    assert small_run.payload_bytes(grid.requests[2, 0][0]) == 4 * small_run.rounds(tmp_path / "scores")[0]["live"]
    _, grid = small_run.run(small_run.config(**VARIANTS["random-mask"]), tmp_path / "random")
    assert small_run.payload_bytes(grid.requests[1, 0][0]) == 0


def test_requests_and_replies_hold_the_allowed_fields_alone(weighed):
    _, _, grid, _ = weighed
    terms = {
        "run", "round", "rounds", "fingerprint", "config", "layout", "seed", "survivors", "survivor-count", "digest", "live",
        "provenance", "model", "client", "sample-rate", "noise-multiplier", "clip-norm", "steps", "learning-rate", "delta",
        "accountant", "unit", "protocol", "odds",
    }  # fmt: skip
    for contents in grid.requests.values():
        for content in contents:
            assert set(content) <= {"terms", "request", "model"}
            assert set(content["terms"]) <= terms
            assert set(content["request"]) <= set(messages.REQUEST_FIELDS)
    for contents in grid.replies.values():
        for content in contents:
            assert set(small_run.without_note(content)) == {"reply", "update"}
            assert set(content["reply"]) == set(messages.REPLY_FIELDS)
            assert list(content["update"]) == ["payload"]


def test_no_message_names_how_many_examples_a_client_really_has(tmp_path):
    """337 is the nominal size, declared; it enters the rate and nothing else."""
    _, grid = small_run.run(small_run.config(), tmp_path)
    for contents in [*grid.requests.values(), *grid.replies.values()]:
        for content in contents:
            for record in content.values():
                assert 337 not in dict(record).values() if hasattr(record, "values") else True
    assert "examples" not in json.dumps(small_run.clients(tmp_path))
