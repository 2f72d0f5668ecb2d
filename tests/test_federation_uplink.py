"""The uplink encodes whatever arithmetic leaves: no value fails, and the length follows from the count alone."""

from __future__ import annotations

import numpy as np
import pytest

from fed_dpprune import config as cfg
from fed_dpprune.comm.codecs.table import NAMES
from fed_dpprune.federation import uplink

NAN, INF, MOST = np.nan, np.inf, float(np.finfo(np.float32).max)
ODD: dict[str, list[float]] = {
    "ordinary": [0.5, -0.25, 1.0, -1.0],
    "zero": [0.0, -0.0, 0.0, 0.0],
    "not-a-number": [NAN, 1.0, -1.0, NAN],
    "infinite": [INF, -INF, 1.0, 0.0],
    "all-infinite": [INF] * 4,
    "all-not-a-number": [NAN] * 4,
    "past-float32": [1e300, -1e300, 1e39, -1e39],
    "largest-float32": [MOST, -MOST, MOST, MOST],
    "denormal": [1e-45, -1e-45, 5e-324, -5e-324],
    "both-ends": [3e38, 1e-45, -3e38, -1e-45],
}


def _values(kind: str, count: int) -> np.ndarray:
    return np.resize(np.array(ODD[kind], dtype=np.float64), count)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_no_value_keeps_an_update_from_leaving(name, kind, rounding):
    """Every codec: the length of an ordinary update, finite values at the other end, no error and no warning."""
    wire = cfg.Wire(uplink=name, rounding=rounding)
    for count in (0, 1, 7, 1100):
        bits = uplink.dither(wire, 3, "up", 1, 0)
        ordinary, blob = (uplink.encode(wire, _values(k, count), bits) for k in ("ordinary", kind))
        assert len(blob) == len(ordinary)
        assert np.isfinite(uplink.decode(wire, blob, count)).all()


@pytest.mark.parametrize("kind", ODD)
def test_the_largest_values_are_chosen_among_saturated_ones(kind):
    wire = cfg.Wire(uplink="float32", select="top-k", select_rate=0.5)
    found = uplink.decode(wire, uplink.encode(wire, _values(kind, 40)), 40)
    assert np.isfinite(found).all()
    assert np.count_nonzero(found) <= 20


def test_values_saturate_at_the_largest_float32_and_no_number_is_nothing():
    wire = cfg.Wire()
    values = np.array([INF, -INF, NAN, 1e39, -1e39, 0.5])
    assert uplink.decode(wire, uplink.encode(wire, values), 6).tolist() == [MOST, -MOST, 0.0, MOST, -MOST, 0.5]
