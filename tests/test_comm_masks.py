"""Packed supports: exact round trips, the smallest encoding, the stated bound, golden bytes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpprune.comm import masks
from fed_dpprune.comm.masks import entropy_bound_bytes, max_size, pack_positions, packed_size_bound, unpack_positions
from fed_dpprune.errors import WireError
from fed_dpprune.sparsity.support import draw_positions


def positions(*places: int) -> np.ndarray:
    return np.array(places, dtype=np.int64)


@given(st.integers(0, 400).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(0, n - 1)), max_size=n))))
@settings(max_examples=300, deadline=None)
def test_any_support_survives_packing_within_the_bound(case):
    n, chosen = case
    support = positions(*sorted(chosen)) if n else positions()
    blob = pack_positions(support, n)
    back = unpack_positions(blob, n, support.size)
    assert back.dtype == np.int64
    assert np.array_equal(back, support)
    assert len(blob) <= packed_size_bound(n, support.size)


def test_every_support_of_every_small_size_is_distinct_on_the_wire():
    for n in range(1, 11):
        for k in range(n + 1):
            blobs = {pack_positions(positions(*chosen), n) for chosen in itertools.combinations(range(n), k)}
            assert len(blobs) == math.comb(n, k)


@pytest.mark.parametrize("k", [0, 1, 2, 7, 8, 9, 1000])
@pytest.mark.parametrize("n", [1000, 1001, 26_010, 2**20])
def test_drawn_supports_survive(n, k):
    support = draw_positions(n, k, 1, "support")
    assert np.array_equal(unpack_positions(pack_positions(support, n), n, k), support)
    others = np.setdiff1d(np.arange(n), support)
    assert np.array_equal(unpack_positions(pack_positions(others, n), n, n - k), others)


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.0625, 0.2, 0.5, 0.8, 0.99])
def test_a_random_support_costs_at_most_a_tenth_more_than_its_entropy(rate):
    n = 100_000
    k = int(rate * n)
    size = len(pack_positions(draw_positions(n, k, 3, "support"), n))
    bound = entropy_bound_bytes(n, k)
    assert bound <= size <= 1.1 * bound + 2
    assert size <= math.ceil(n / 8) + 1


def test_the_smallest_encoding_is_chosen():
    sparse, dense = draw_positions(10_000, 20, 0, "support"), draw_positions(10_000, 9_980, 0, "support")
    half = draw_positions(10_000, 5_000, 0, "support")
    assert [pack_positions(p, 10_000)[0] & 3 for p in (sparse, dense, half)] == [
        masks.KEPT_GAPS,
        masks.DROPPED_GAPS,
        masks.BITMASK,
    ]
    assert len(pack_positions(sparse, 10_000)) < 20 * 14 / 8


def test_nothing_is_sent_where_n_and_k_leave_no_choice():
    assert pack_positions(positions(), 9) == pack_positions(np.arange(9), 9) == b""
    assert unpack_positions(b"", 9, 9).tolist() == list(range(9))
    assert unpack_positions(b"", 9, 0).size == 0
    assert packed_size_bound(9, 9) == packed_size_bound(9, 0) == packed_size_bound(0, 0) == 0


def test_a_seed_replaces_the_positions_it_draws():
    support = draw_positions(100_000, 3_000, 77, masks.SEED_PURPOSE)
    blob = pack_positions(support, 100_000, seed=77)
    assert blob == bytes([masks.SEED]) + (77).to_bytes(8, "little")
    assert np.array_equal(unpack_positions(blob, 100_000, 3_000), support)
    with pytest.raises(ValueError, match="seed"):
        pack_positions(support, 100_000, seed=78)
    tiny = draw_positions(8, 3, 5, masks.SEED_PURPOSE)
    assert len(pack_positions(tiny, 8, seed=5)) == 2  # a bitmask is smaller


@pytest.mark.parametrize("n", [1, 2, 8, 17, 60, 200])
def test_the_entropy_bound_is_the_exact_one(n):
    for k in range(n + 1):
        exact = -(-(math.comb(n, k) - 1).bit_length() // 8)
        assert entropy_bound_bytes(n, k) == exact


def test_golden_bytes():
    """The wire format is a contract: these bytes never change."""
    assert pack_positions(positions(0, 1, 3, 6, 8), 10).hex() == GOLDEN["bitmask"]
    assert pack_positions(positions(5, 300, 301, 999), 1000).hex() == GOLDEN["kept"]
    assert pack_positions(np.setdiff1d(np.arange(1000), positions(5, 300, 301, 999)), 1000).hex() == GOLDEN["dropped"]


GOLDEN = {
    "bitmask": "004b01",
    "kept": "212983a8804d",
    "dropped": "222983a8804d",
}


@pytest.mark.parametrize("bad", [positions(3, 2), positions(2, 2), positions(-1), positions(10)])
def test_positions_out_of_order_or_range_are_an_error_of_the_caller(bad):
    with pytest.raises(ValueError, match="ascending"):
        pack_positions(bad, 10)


def refusal(blob: bytes, n: int, k: int) -> str:
    with pytest.raises(WireError) as caught:
        unpack_positions(blob, n, k)
    return caught.value.why


def test_a_mask_with_another_count_is_refused():
    """Both ends agree on k or nothing is believed (invariant 12)."""
    support = draw_positions(1000, 500, 0, "support")
    assert refusal(pack_positions(support, 1000), 1000, 499) == "positions"
    sparse = draw_positions(1000, 20, 0, "support")
    assert refusal(pack_positions(sparse, 1000), 1000, 21) == "positions"


def test_damaged_masks_are_refused_with_a_code():
    half, sparse = draw_positions(1003, 500, 0, "support"), draw_positions(1003, 20, 0, "support")
    bitmask, gaps = pack_positions(half, 1003), pack_positions(sparse, 1003)
    assert refusal(b"", 1003, 500) == "wrong-length"
    assert refusal(bitmask + b"\x00", 1003, 500) == "wrong-length"
    assert refusal(bitmask[:-1], 1003, 500) == "wrong-length"
    assert refusal(bytes([bitmask[0] | 4]) + bitmask[1:], 1003, 500) == "header"
    assert refusal(bitmask[:-1] + bytes([bitmask[-1] | 0x80]), 1003, 500) == "padding"
    assert refusal(bytes([masks.KEPT_GAPS | 60 << 2]) + gaps[1:], 1003, 20) == "header"
    assert refusal(gaps + b"\x00", 1003, 20) == "padding"
    assert refusal(bytes([masks.SEED]) + b"\x00" * 7, 1003, 500) == "wrong-length"
    assert refusal(b"\x00", 9, 9) == "wrong-length"


def test_gaps_that_run_past_the_end_are_refused():
    blob = pack_positions(positions(5, 300, 301, 999), 1000)
    assert refusal(blob, 999, 4) == "positions"


def test_a_blob_longer_than_any_encoder_writes_is_refused_before_it_is_read():
    assert refusal(bytes([masks.KEPT_GAPS]) + b"\x00" * max_size(1000, 5), 1000, 5) == "wrong-length"
