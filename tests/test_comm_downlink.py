"""Downlink payloads: exact round trips, what is left out costs nothing, the server applies what it sent."""

from __future__ import annotations

import numpy as np
import pytest

from fed_dpprune.comm import arithmetic
from fed_dpprune.comm.codecs.table import NAMES, codec
from fed_dpprune.comm.downlink import decode_join, decode_sync, encode_join, encode_sync, join_replay, split_replay
from fed_dpprune.comm.feedback import Downlink
from fed_dpprune.comm.masks import pack_positions
from fed_dpprune.errors import WireError
from fed_dpprune.sparsity.support import draw_positions

N = 2000


def values(k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(k).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [0, 1, 2, 7, 8, 9, 1000, N])
@pytest.mark.parametrize(("with_mask", "with_values"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_join_comes_back_and_costs_its_parts(name, k, with_mask, with_values):
    support, data = draw_positions(N, k, 0, "support"), values(k)
    blob = encode_join(support if with_mask else None, N, data if with_values else None, codec(name))
    got_support, got_values = decode_join(blob, N, k, codec(name), with_mask=with_mask, with_values=with_values)
    assert (got_support is None) == (not with_mask)
    assert (got_values is None) == (not with_values)
    if got_support is not None:
        assert np.array_equal(got_support, support)
    if got_values is not None:
        assert np.array_equal(got_values, codec(name).decode(codec(name).encode(data), k))
    mask = len(pack_positions(support, N)) if with_mask else 0
    assert len(blob) == mask + (codec(name).size(k) if with_values else 0)


@pytest.mark.parametrize("blob", [b"", b"\x00" * 39, b"\x00" * 41])
def test_a_join_of_another_length_is_refused(blob):
    with pytest.raises(WireError) as caught:
        decode_join(blob, N, 10, codec("float32"), with_mask=False, with_values=True)
    assert caught.value.why == "wrong-length"


def test_a_join_that_should_carry_nothing_carries_nothing():
    with pytest.raises(WireError):
        decode_join(b"\x00", N, 10, codec("float32"), with_mask=False, with_values=False)


def test_a_join_of_unequal_parts_is_an_error_of_the_caller():
    with pytest.raises(ValueError, match="positions"):
        encode_join(draw_positions(N, 5, 0, "support"), N, values(6), codec("float32"))


@pytest.mark.parametrize("name", NAMES)
def test_a_sync_is_the_values_and_nothing_else(name):
    """Frozen coordinates cost no bytes (invariant 9): the size depends on k alone."""
    blob = encode_sync(values(321), codec(name))
    assert len(blob) == arithmetic.sync_payload(name, 321) == codec(name).size(321)
    assert decode_sync(blob, 321, codec(name)).shape == (321,)
    with pytest.raises(WireError):
        decode_sync(blob + b"\x00", 321, codec(name))


def test_a_replay_falls_apart_into_its_rounds():
    blobs = [encode_sync(values(k), codec("int4")) for k in (10, 0, 33)]
    sizes = [codec("int4").size(k) for k in (10, 0, 33)]
    assert [bytes(part) for part in split_replay(join_replay(blobs), sizes)] == blobs
    assert len(join_replay(blobs)) == arithmetic.replay_payload("int4", (10, 0, 33))
    assert split_replay(b"", []) == []
    with pytest.raises(WireError):
        split_replay(join_replay(blobs)[:-1], sizes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [0, 1, 9, 1000])
def test_plan_counts_what_is_sent(name, k):
    data, support = values(k), draw_positions(N, k, 0, "support")
    assert arithmetic.uplink_payload(name, k) == len(codec(name).encode(data))
    bare = arithmetic.join_payload(name, N, k, with_mask=False, with_values=True)
    assert bare.exact
    assert bare.payload == len(encode_join(None, N, data, codec(name)))
    full = arithmetic.join_payload(name, N, k, with_mask=True, with_values=True)
    assert full.exact == (k == 0)
    assert full.payload >= len(encode_join(support, N, data, codec(name)))
    assert arithmetic.selected_payload(name, N, k) == full


def test_plan_counts_baselines():
    assert arithmetic.dense_float32(1000) == 4000 == arithmetic.uplink_payload("float32", 1000)
    assert arithmetic.uplink_payload("sign", 1000, public_scale=True) == 125
    support = draw_positions(N, 50, 9, "client-support")
    blob = pack_positions(support, N, seed=9) + codec("sign").encode(values(50))
    assert arithmetic.seeded_payload("sign", N, 50) == len(blob)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error_feedback", [False, True])
def test_every_receiver_holds_the_senders_model_to_the_bit(name, error_feedback):
    d, rng = 5000, np.random.default_rng(0)
    sender = Downlink(codec(name), d, error_feedback=error_feedback)
    server, client = np.zeros(d, dtype=np.float32), np.zeros(d, dtype=np.float32)
    for number in range(5):
        support = draw_positions(d, 700, 0, "support", number)
        blob, applied = sender.release(support, rng.standard_normal(700) * 0.01)
        server[support] += applied
        client[support] += decode_sync(blob, 700, codec(name))
        assert server.tobytes() == client.tobytes()


def test_error_feedback_delivers_later_what_was_lost():
    d, change = 64, np.linspace(-1, 1, 64).astype(np.float32)
    everything = np.arange(d)
    plain, fed = Downlink(codec("sign"), d, error_feedback=False), Downlink(codec("sign"), d, error_feedback=True)
    sums = {id(sender): sum(sender.release(everything, change)[1] for _ in range(200)) for sender in (plain, fed)}
    assert np.abs(sums[id(plain)] / 200 - change).max() > 0.4
    assert np.abs(sums[id(fed)] / 200 - change).max() < 0.06


def test_the_residual_is_the_sum_of_what_was_not_sent_and_stays_on_its_support():
    sender = Downlink(codec("level2"), 100, error_feedback=True)
    support = draw_positions(100, 30, 0, "support")
    wanted = np.zeros(100)
    for number in range(10):
        change = values(30, number)
        _, applied = sender.release(support, change)
        wanted[support] += change.astype(float) - applied
    assert sender.residual is not None
    assert np.allclose(sender.residual, wanted, atol=1e-5)
    assert not sender.residual[np.setdiff1d(np.arange(100), support)].any()


def test_a_release_that_fails_leaves_the_residual_alone():
    sender = Downlink(codec("sign"), 3, error_feedback=True)
    sender.release(np.arange(3), np.array([1.0, 2.0, 3.0]))
    assert sender.residual is not None
    before = sender.residual.copy()
    with pytest.raises(WireError):
        sender.release(np.arange(3), np.array([1.0, np.nan, 3.0]))
    assert np.array_equal(sender.residual, before)
