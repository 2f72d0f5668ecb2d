"""What simulated clients of one process make once for all of them is what each would have made itself."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import small_run
from flwr.app import Array, ConfigRecord, Message, RecordDict

from fed_dpprune.federation import messages, supports
from fed_dpprune.federation.broadcast import Parcel
from fed_dpprune.federation.client import Received
from fed_dpprune.federation.supports import Supports
from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.sparsity.recipe import round_support
from fed_dpprune.sparsity.support import dense

LAYOUT = Layout((Tensor("a", (30,), "weight", 5), Tensor("b", (20,), "weight", 5)))


@pytest.fixture(autouse=True)
def _nothing_remembered():
    supports._drawn.clear()


def test_a_client_that_is_sent_other_bytes_does_not_get_its_neighbours_model(tmp_path):
    class Bent(small_run.Tap):
        def asked(self, place: tuple[int, int], message: Message) -> None:
            if place == (3, 2) and message.content["request"]["kind"] == "sync":
                blob = bytearray(messages.payload_of(message.content, "model"))
                blob[0] ^= 1
                message.content["model"] = messages._array(bytes(blob))

    outcome, _ = small_run.run(small_run.config(), tmp_path, tap=Bent)
    assert outcome.status == "complete"
    status = {row["client"]: (row["status"], row["reason"]) for row in small_run.clients(tmp_path) if row["round"] == 3}
    assert status.pop(2) == ("refused", "digest-mismatch")
    assert set(status.values()) == {("answered", "")}


def test_clients_that_unpack_alone_and_clients_that_share_give_the_same_run(tmp_path, monkeypatch):
    shared, _ = small_run.run(small_run.config(), tmp_path / "shared")
    supports._drawn.clear()
    monkeypatch.setattr(Received, "get", lambda self, key: None)
    monkeypatch.setattr(supports, "LEAST", 0)
    monkeypatch.setattr(supports, "MOST", 0)
    alone, _ = small_run.run(small_run.config(), tmp_path / "alone")
    assert shared.status == alone.status == "complete"
    assert small_run.result(tmp_path / "shared") == small_run.result(tmp_path / "alone")


def test_only_the_newest_models_are_remembered():
    received = Received()
    for key in range(5):
        received.put(key, key)
    assert [received.get(key) for key in range(5)] == [None, None, None, 3, 4]


@pytest.mark.parametrize("change", [{}, {"sparsity.shared": False}, {"sparsity.freeze.refresh": "step"}, {"seed": 9}])
def test_a_remembered_support_is_the_one_of_its_own_terms(change):
    config = small_run.config(**change)
    at = Supports(config, LAYOUT, dense(LAYOUT.d), config.seed)
    weights = np.zeros(LAYOUT.d, dtype=np.float32)
    for number, client in ((1, 0), (2, 0), (1, 1), (1, 0), (2, 1)):
        plain = round_support(
            config.sparsity, dense(LAYOUT.d), LAYOUT, config.seed, number, 4, local_steps=2, client=client, weights=weights
        )
        found = at.of(number, client, weights)
        assert found.support.digest == plain.support.digest
        assert [found.steps(s).digest for s in (0, 1)] == [plain.steps(s).digest for s in (0, 1)]


def test_a_support_by_weights_is_never_remembered():
    config = small_run.config(**{"sparsity.freeze.method": "magnitude", "sparsity.freeze.ramp": "constant"})
    at = Supports(config, LAYOUT, dense(LAYOUT.d), config.seed)
    low = at.of(1, 0, np.arange(LAYOUT.d, dtype=np.float32)).support
    high = at.of(1, 0, np.arange(LAYOUT.d, dtype=np.float32)[::-1].copy()).support
    assert low.digest != high.digest
    assert not supports._drawn


@pytest.mark.parametrize("size", [1, 9, 10, 999, 1000, 123456])
def test_our_container_is_numpys_to_the_byte(size):
    blob = np.random.default_rng(size).bytes(size)
    made = messages.train_request({}, Parcel("sync", "", blob))["model"]
    assert made["payload"] == Array(np.frombuffer(blob, dtype=np.uint8))
    assert messages.payload_of({"model": made}, "model") == blob


def test_counted_bytes_are_flowers_own_for_any_terms():
    draw = random.Random(0)
    kinds = [
        lambda: draw.choice([True, False]),
        lambda: draw.choice([0.0, -1.5, math.inf, 1e300]),
        lambda: draw.choice([0, 1, -1, 63, 64, -64, -65, 127, 128, 2**31, 2**62, -(2**62), draw.randrange(-(10**6), 10**6)]),
        lambda: "aé日" * draw.randrange(60),
        lambda: bytes(draw.randrange(300)),
        lambda: [draw.randrange(10 ** draw.randrange(1, 9)) for _ in range(draw.randrange(1, 9))],
        lambda: [draw.random() for _ in range(draw.randrange(1, 30))],
    ]
    for _ in range(1500):
        record = ConfigRecord({f"k{n}": draw.choice(kinds)() for n in range(draw.randrange(4))})
        content = RecordDict({"terms": record})
        assert messages.message_bytes(content) == small_run.deflated(content)
