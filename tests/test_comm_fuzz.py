"""Malformed bytes never do more than raise WireError, and never make the reader allocate more than the terms declare."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from fed_dpprune.comm.codecs.table import NAMES, SCALED, codec
from fed_dpprune.comm.downlink import decode_join, encode_join
from fed_dpprune.comm.masks import pack_positions, unpack_positions
from fed_dpprune.comm.validate import CODES
from fed_dpprune.errors import WireError
from fed_dpprune.sparsity.support import draw_positions


def targets(rng: np.random.Generator) -> list[tuple[bytes, int, Callable[[bytes], object]]]:
    """(a valid blob, coordinates that the terms declare, its reader) for every format."""
    cases: list[tuple[bytes, int, Callable[[bytes], object]]] = []
    for name in NAMES:
        sent, bare = codec(name), codec(name, public_scale=name in SCALED)
        for k in (1, 9, 1500):
            data = rng.standard_normal(k)
            cases.append((sent.encode(data), k, partial(sent.decode, k=k)))
            cases.append((bare.encode(data, scale=1.0), k, partial(bare.decode, k=k, scale=1.0)))
    for n, k in ((10, 3), (3000, 40), (3000, 1500), (3000, 2950)):
        support, int4 = draw_positions(n, k, int(rng.integers(2**32)), "support"), codec("int4")
        cases.append((pack_positions(support, n), n, partial(unpack_positions, n=n, k=k)))
        joined = encode_join(support, n, rng.standard_normal(k), int4)
        cases.append((joined, n, partial(decode_join, n=n, k=k, codec=int4, with_mask=True, with_values=True)))
    return cases


def mutate(blob: bytes, rng: np.random.Generator) -> bytes:
    """One to four damages: bits flipped, bytes set, cut, repeated, inserted, or noise in place of everything."""
    out = bytearray(blob)
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(0, len(out) + 1))
        kind = int(rng.integers(0, 7))
        if kind == 0 and place < len(out):
            out[place] ^= 1 << int(rng.integers(8))
        elif kind == 1 and place < len(out):
            out[place] = (0, 0x7F, 0x80, 0xFF)[int(rng.integers(4))]
        elif kind == 2:
            del out[place : place + int(rng.integers(1, 9))]
        elif kind == 3:
            out[place:place] = out[: int(rng.integers(1, 9))]
        elif kind == 4:
            out[place:place] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 5:
            out = bytearray(rng.bytes(len(blob)))
        elif out:
            out[0] = int(rng.integers(256))
    return bytes(out)


def fuzz(count: int, seed: int) -> tuple[int, int]:
    """(accepted, refused) of `count` mutations; anything but a WireError with a known code escapes."""
    rng = np.random.default_rng(seed)
    cases = targets(rng)
    accepted = refused = 0
    tracemalloc.start()
    try:
        for number in range(count):
            blob, declared, read = cases[number % len(cases)]
            damaged = mutate(blob, rng)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                read(damaged)
                accepted += 1
            except WireError as error:
                if error.why not in CODES:
                    raise
                refused += 1
            assert tracemalloc.get_traced_memory()[1] - before < 64 * declared + 20_000
    finally:
        tracemalloc.stop()
    return accepted, refused


def test_a_thousand_mutations_do_no_harm():
    accepted, refused = fuzz(1_000, seed=1)
    assert accepted > 50  # else the mutations are too wild to test the decoders beyond the length check
    assert refused > 300


@pytest.mark.slow
def test_a_hundred_thousand_mutations_do_no_harm():
    accepted, refused = fuzz(100_000, seed=2)
    assert accepted + refused == 100_000


@pytest.mark.parametrize("name", NAMES)
def test_a_huge_declared_count_allocates_nothing_for_a_short_blob(name):
    """The length is checked before anything is made (invariant 12: a mismatch is a refusal)."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as caught:
            codec(name).decode(b"\x00" * 100, 10**15)
        assert caught.value.why == "wrong-length"
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_huge_blob_is_refused_without_being_unpacked():
    blob = b"\x01" * 10_000_000
    tracemalloc.start()
    try:
        for read in (lambda: unpack_positions(blob, 1000, 10), lambda: codec("sign").decode(blob, 1000)):
            with pytest.raises(WireError):
                read()
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_the_room_imports_neither_torch_nor_flower():
    modules = ["codecs.table", "masks", "downlink", "meter", "arithmetic", "link", "validate", "feedback"]
    code = "; ".join(f"import fed_dpprune.comm.{name}" for name in modules)
    heavy = "import sys; bad = {'torch', 'flwr', 'ray', 'sklearn', 'scipy', 'dp_accounting', 'opacus'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; {heavy}; sys.exit(bool(bad))"], check=True, timeout=60)
