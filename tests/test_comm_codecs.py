"""Every codec of the table: exact sizes, round trips, golden bytes, and the bias and variance that its docstring states."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpprune import randomness
from fed_dpprune.comm.codecs.integers import block_count
from fed_dpprune.comm.codecs.packing import LARGEST_SCALE, pack_codes, packed_bytes, unpack_codes
from fed_dpprune.comm.codecs.table import NAMES, SCALED, codec
from fed_dpprune.errors import ConfigError, WireError

SIZES = (0, 1, 2, 7, 8, 9, 511, 512, 1000, 1024, 4097)
HEADER = {"float32": 0, "float16": 0, "bfloat16": 0, "int8": 16, "int4": 16, "level3": 4, "level2": 4, "sign": 4}


def gaussian(k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(k).astype(np.float32)


def raw_words(seed: int):
    return lambda count: randomness.raw_u32(count, seed, "codec", "test")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", SIZES)
def test_size_is_exact_and_the_header_is_at_most_16_bytes(name, k):
    chosen = codec(name)
    blob = chosen.encode(gaussian(k))
    assert len(blob) == chosen.size(k)
    assert 0 <= len(blob) - packed_bytes(k, chosen.bits_per_value) <= HEADER[name]
    assert chosen.decode(blob, k).shape == (k,)
    assert chosen.decode(blob, k).dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
def test_no_values_are_no_bytes(name):
    assert codec(name).encode(np.zeros(0, dtype=np.float32)) == b""
    assert codec(name).decode(b"", 0).shape == (0,)


@pytest.mark.parametrize("name", sorted(SCALED))
@pytest.mark.parametrize("k", SIZES)
def test_a_public_scale_leaves_the_packed_values_alone(name, k):
    chosen = codec(name, public_scale=True)
    blob = chosen.encode(gaussian(k), scale=1.5)
    assert len(blob) == chosen.size(k) == packed_bytes(k, chosen.bits_per_value)
    assert np.array_equal(chosen.decode(blob, k, scale=3.0), 2 * chosen.decode(blob, k, scale=1.5))
    with pytest.raises(ValueError, match="public"):
        chosen.encode(gaussian(k))
    with pytest.raises(ValueError, match="public"):
        chosen.decode(blob, k)


@pytest.mark.parametrize("name", sorted(SCALED))
def test_a_fixed_scale_that_is_sent_is_checked_by_the_receiver(name):
    chosen = codec(name)
    blob = chosen.encode(gaussian(1000), scale=2.0)
    assert np.array_equal(chosen.decode(blob, 1000, scale=2.0), chosen.decode(blob, 1000))
    with pytest.raises(WireError) as caught:
        chosen.decode(blob, 1000, scale=2.5)
    assert caught.value.why == "header"


def test_float32_is_the_values_little_endian():
    values = gaussian(100)
    assert codec("float32").encode(values) == b"".join(np.float32(v).tobytes() for v in values.astype("<f4"))
    assert np.array_equal(codec("float32").decode(codec("float32").encode(values.astype(np.float64)), 100), values)


def test_bfloat16_rounds_to_nearest_even():
    #       exact, below half, half to even (down), half to even (up), above half
    words = np.array([0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F818000, 0x3F808001], dtype=np.uint32)
    got = codec("bfloat16").decode(codec("bfloat16").encode(words.view(np.float32)), 5).view(np.uint32)
    assert [hex(w) for w in got] == ["0x3f800000", "0x3f800000", "0x3f800000", "0x3f820000", "0x3f810000"]


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_and_smallest_numbers_come_back_finite(name):
    top, tiny = np.finfo(np.float32).max, np.float32(1e-45)
    values = np.array([top, -top, tiny, -tiny, 0.0, -0.0, 1.0], dtype=np.float32)
    assert np.isfinite(codec(name).decode(codec(name).encode(values), 7)).all()
    assert np.isfinite(codec(name).decode(codec(name).encode(np.full(600, top)), 600)).all()
    assert np.array_equal(np.abs(codec(name).decode(codec(name).encode(np.zeros(9)), 9)), np.zeros(9))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_value_that_is_not_finite_is_not_sent(name, bad):
    with pytest.raises(WireError) as caught:
        codec(name).encode(np.array([0.0, bad, 1.0]))
    assert caught.value.why == "non-finite"


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_value_that_is_not_finite_is_not_accepted(name):
    blob = {"float32": b"\x00\x00\xc0\x7f", "float16": b"\x00\x7c", "bfloat16": b"\x80\x7f"}[name]
    with pytest.raises(WireError) as caught:
        codec(name).decode(blob, 1)
    assert caught.value.why == "non-finite"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 9, 1000])
def test_a_payload_of_another_length_is_refused(name, k):
    blob = codec(name).encode(gaussian(k))
    for wrong in (blob[:-1], blob + b"\x00", b"", blob * 2):
        with pytest.raises(WireError) as caught:
            codec(name).decode(wrong, k)
        assert caught.value.why == "wrong-length"


@pytest.mark.parametrize("name", NAMES)
def test_memoryviews_and_bytearrays_decode_like_bytes(name):
    blob = codec(name).encode(gaussian(77))
    padded = b"\x01" + blob + b"\x02"  # an odd offset: nothing may rely on alignment
    for form in (bytearray(blob), memoryview(blob), memoryview(padded)[1:-1]):
        assert np.array_equal(codec(name).decode(form, 77), codec(name).decode(blob, 77))


@pytest.mark.parametrize("name", ["int4", "level3", "level2", "sign"])
def test_unused_bits_must_be_zero(name):
    blob = bytearray(codec(name).encode(gaussian(9)))
    blob[-1] |= 0x80
    with pytest.raises(WireError) as caught:
        codec(name).decode(blob, 9)
    assert caught.value.why == "padding"


@pytest.mark.parametrize(("name", "body"), [("int8", b"\x80"), ("int4", b"\x0f")])
def test_a_code_that_no_encoder_writes_is_refused(name, body):
    with pytest.raises(WireError) as caught:
        codec(name).decode(b"\x80\x3f" + body, 1)
    assert caught.value.why == "code"


@pytest.mark.parametrize("name", ["level3", "level2", "sign"])
@pytest.mark.parametrize("scale", [-1.0, -0.0, np.nan, np.inf, 3e38])
def test_a_scale_that_is_negative_too_large_or_no_number_is_refused(name, scale):
    blob = np.float32(scale).astype("<f4").tobytes() + codec(name).encode(gaussian(9))[4:]
    with pytest.raises(WireError) as caught:
        codec(name).decode(blob, 9)
    assert caught.value.why == "header"


@pytest.mark.parametrize("pattern", [b"\x80\x7f", b"\xc0\x7f", b"\x80\xbf"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_block_scale_that_is_negative_or_no_number_is_refused(name, pattern):
    with pytest.raises(WireError) as caught:
        codec(name).decode(pattern + codec(name).encode(gaussian(9))[2:], 9)
    assert caught.value.why == "header"


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, 2 * LARGEST_SCALE])
def test_an_impossible_public_scale_is_an_error_of_the_caller(scale):
    with pytest.raises(ValueError, match="scale"):
        codec("sign").encode(gaussian(3), scale=scale)


@pytest.mark.parametrize("name", NAMES)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40))
@settings(max_examples=60, deadline=None)
def test_decoding_stays_within_the_stated_overshoot(name, numbers):
    values = np.array(numbers, dtype=np.float32)
    back = codec(name).decode(codec(name).encode(values), values.size)
    largest = float(np.abs(values).max(initial=0.0))
    # Below 2^-14 a half float has a fixed step: the relative bound holds but for half of it.
    least = 2.0**-25 if name == "float16" else 1e-40
    assert float(np.abs(back).max(initial=0.0)) <= largest * codec(name).overshoot + least


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 1000])
@given(seed=st.integers(0, 2**32), exponent=st.integers(-20, 20))
@settings(max_examples=15, deadline=None)
def test_sending_what_was_received_sends_the_same_values(name, k, seed, exponent):
    """A codec with its public scale is a projection: its own output passes unchanged."""
    values = gaussian(k, seed) * np.float32(10.0**exponent)
    public = name in SCALED
    scale = float(np.abs(values).max()) if public else None
    chosen = codec(name, public_scale=public)
    once = chosen.decode(chosen.encode(values, scale=scale), k, scale=scale)
    again = chosen.decode(chosen.encode(once, scale=scale), k, scale=scale)
    assert np.array_equal(once, again)


@pytest.mark.parametrize(("name", "top"), [("int8", 127), ("int4", 7)])
def test_nearest_rounding_is_within_half_a_step_of_each_blocks_own_scale(name, top):
    values = gaussian(4096) * np.repeat(np.float32(10.0) ** np.arange(-4, 4), 512).astype(np.float32)
    assert block_count(4096) == 8
    error = np.abs(codec(name).decode(codec(name).encode(values), 4096) - values).reshape(8, 512).max(axis=1)
    step = np.abs(values).reshape(8, 512).max(axis=1) / top
    assert (error <= step * 0.5 * (1 + 2.0**-7) + 1e-9).all()
    assert (error > step * 0.4).all()


@pytest.mark.parametrize(("name", "top"), [("int8", 127), ("int4", 7)])
def test_stochastic_rounding_is_unbiased_with_the_stated_variance(name, top):
    values = gaussian(1000)
    runs = np.stack([codec(name).decode(codec(name).encode(values, bits=raw_words(s)), 1000) for s in range(400)]).astype(float)
    step = float(np.abs(values).max()) / top * (1 + 2.0**-9)
    deviation = runs.mean(axis=0) - values
    assert np.abs(deviation).max() < 5.5 * step / 2 / math.sqrt(400)
    assert abs(deviation.mean()) < 5 * step / math.sqrt(6 * 400 * 1000)
    assert np.mean((runs - values) ** 2) == pytest.approx(step**2 / 6, rel=0.03)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_dither_is_what_the_source_says(name):
    values = gaussian(500)
    first = codec(name).encode(values, bits=raw_words(1))
    assert first == codec(name).encode(values, bits=raw_words(1))
    assert first != codec(name).encode(values, bits=raw_words(2))


GAUSSIAN_ERROR = {  # relative squared error, from the docstrings; int8 and int4 at 1,000 values: (largest / top)^2 / 12
    "float32": (0.0, 1e-15),
    "float16": (4e-8, 1e-8),
    "bfloat16": (2.3e-6, 5e-7),
    "int8": (5.6e-5, 1.5e-5),
    "int4": (0.018, 0.005),
    "level3": (0.034548, 0.0008),
    "level2": (0.117482, 0.001),
    "sign": (1 - 2 / math.pi, 0.006),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_squared_error_of_gaussian_values_is_as_stated(name):
    rows = [gaussian(1000, seed) for seed in range(400)]
    error = np.mean([np.mean((codec(name).decode(codec(name).encode(v), 1000) - v) ** 2) for v in rows])
    expected, tolerance = GAUSSIAN_ERROR[name]
    assert error == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_mean_under_noise_comes_out_times_the_stated_gain(name):
    """Source: efficiency 2/pi, 0.88 and 0.965 of one, two and three bits for noise-dominated values."""
    signal, rows = 0.1, 1000
    noise = np.random.default_rng(3).standard_normal((rows, 1000))
    received = [codec(name).decode(codec(name).encode(signal + row), 1000) for row in noise]
    mean = float(np.mean(received)) / signal
    assert mean == pytest.approx(codec(name).gaussian_gain, abs=0.015)  # noise alone: 1e-3 / 0.1
    spread = float(np.var(received))
    assert mean**2 / spread == pytest.approx(codec(name).gaussian_gain, abs=0.03)


def lloyd(count: int) -> tuple[list[float], list[float], float]:
    """Positive levels, positive thresholds and squared error of the best 2 * count level quantiser of N(0, 1)."""

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0

    def tail(x: float) -> float:
        return math.erfc(x / math.sqrt(2)) / 2 if math.isfinite(x) else 0.0

    levels = [(i + 0.5) * 2 / count for i in range(count)]
    edges: list[float] = []
    for _ in range(3000):
        edges = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        cells = list(pairwise(edges))
        levels = [(density(a) - density(b)) / (tail(a) - tail(b)) for a, b in cells]
    energy = 2 * sum((tail(a) - tail(b)) * level**2 for (a, b), level in zip(cells, levels, strict=True))
    return levels, edges[1:-1], 1 - energy


@pytest.mark.parametrize(("name", "count"), [("level3", 4), ("level2", 2)])
def test_levels_are_those_of_the_lloyd_iteration(name, count):
    levels, thresholds, error = lloyd(count)
    kind = SCALED[name]
    assert kind.levels == pytest.approx(levels, abs=2e-8)
    assert kind.thresholds == pytest.approx(thresholds, abs=2e-8)
    assert kind.gaussian_gain == pytest.approx(1 - error, abs=1e-7)
    assert error == pytest.approx(GAUSSIAN_ERROR[name][0], abs=1e-6)


@pytest.mark.parametrize("name", ["level3", "level2"])
def test_each_value_gets_its_nearest_level(name):
    values = gaussian(5000)
    blob = codec(name).encode(values)
    positive = np.array(SCALED[name].levels, dtype=np.float32) * np.frombuffer(blob[:4], dtype="<f4")[0]
    table = np.concatenate([positive, -positive])
    nearest = table[np.abs(values[:, None] - table[None, :]).argmin(axis=1)]
    assert np.allclose(codec(name).decode(blob, 5000), nearest, atol=1e-7)


def test_sign_sends_the_mean_magnitude():
    values = np.array([1.0, -2.0, 0.0, 3.0, -4.0])
    assert codec("sign").decode(codec("sign").encode(values), 5).tolist() == [2.0, -2.0, 2.0, 2.0, -2.0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("k", [0, 1, 7, 8, 9, 1000])
def test_codes_survive_packing(bits, k):
    codes = np.random.default_rng(k).integers(0, 2**bits, k).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert len(packed) == packed_bytes(k, bits)
    assert np.array_equal(unpack_codes(np.frombuffer(packed, dtype=np.uint8), k, bits), codes)


def test_bit_planes_lie_one_after_the_other_without_gaps():
    # codes 1, 2, 3 of two bits: low plane 1 0 1, high plane 0 1 1, first bit lowest: 0b110_101
    assert pack_codes(np.array([1, 2, 3], dtype=np.uint8), 2) == bytes([0b110101])


GOLDEN_VALUES = np.array([0.0, 1.0, -1.0, 0.25, -0.3, 2.5, -2.75, 0.6, 1e-3, -0.51], dtype=np.float32)
GOLDEN = {
    "float32": "000000000000803f000080bf0000803e9a9999be00002040000030c09a99193f6f12833a5c8f02bf",
    "float16": "0000003c00bc0034cdb4004180c1cd38191414b8",
    "bfloat16": "0000803f80bf803e9abe204030c01a3f833a03bf",
    "int8": "3040002ed20cf273811c00e8",
    "int4": "3040a14d5cb32a",
    "level3": "aad7a43f66804125",
    "level2": "aad7a43f605009",
    "sign": "211f643f5402",
    "int4-stochastic": "3040ab65dcb328",
}


@pytest.mark.parametrize("name", NAMES)
def test_golden_bytes(name):
    """The wire format is a contract: these bytes never change."""
    assert codec(name).encode(GOLDEN_VALUES).hex() == GOLDEN[name]


def test_golden_bytes_of_stochastic_rounding():
    words = np.arange(10, dtype=np.uint32) * np.uint32(2**32 // 10)
    assert codec("int4").encode(GOLDEN_VALUES, bits=lambda count: words[:count]).hex() == GOLDEN["int4-stochastic"]


def test_an_unknown_codec_is_named():
    with pytest.raises(ConfigError, match="int2"):
        codec("int2")
    with pytest.raises(ValueError, match="float32"):
        codec("float32", public_scale=True)


def test_the_names_are_those_of_the_config():
    from fed_dpprune.config import Wire

    assert NAMES == Wire.model_fields["uplink"].annotation.__args__ == Wire.model_fields["downlink"].annotation.__args__
