"""The link model: seconds from bytes, named and custom links, stragglers."""

from __future__ import annotations

import numpy as np
import pytest

from fed_dpprune.comm.link import PROFILES, Link, parse_link, round_time
from fed_dpprune.errors import ConfigError


def test_seconds_are_latency_and_bytes_over_the_rate_that_loss_leaves():
    link = Link(up=8e6, down=16e6, latency=0.5, loss=0.5)
    assert link.seconds(1_000_000, "up") == pytest.approx(0.5 + 1.0 / 0.5)
    assert link.seconds(1_000_000, "down") == pytest.approx(0.5 + 0.5 / 0.5)
    assert link.seconds(0, "up") == 0.5


def test_profiles_are_ordered_from_fast_to_slow():
    for way in ("up", "down"):
        times = [PROFILES[name].seconds(100_000, way) for name in ("lan", "wifi", "4g", "nb-iot")]
        assert times == sorted(times)


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_names_are_understood(name):
    assert parse_link(name) == PROFILES[name]


def test_no_text_is_no_model():
    assert parse_link("") is None
    assert parse_link("  ") is None


def test_custom_links_take_units():
    assert parse_link("up=10M, down=1.5G, latency=30ms, loss=0.01") == Link(1e7, 1.5e9, 0.03, 0.01)
    assert parse_link("up=250k,down=1e6") == Link(250e3, 1e6)
    assert parse_link("up=1,down=.5,latency=2s,stragglers=0.25,slowdown=4") == Link(1.0, 0.5, 2.0, 0.0, 0.25, 4.0)


def test_a_profile_can_be_changed_in_part():
    link = parse_link("4g,stragglers=0.2,slowdown=5")
    assert link is not None
    assert (link.up, link.stragglers, link.slowdown) == (PROFILES["4g"].up, 0.2, 5.0)


@pytest.mark.parametrize(
    "text",
    [
        "5g",
        "up=10M",
        "up=10M,down=10M,speed=3",
        "up=10M,up=10M,down=1M",
        "up=0,down=1",
        "up=-1,down=1",
        "up=nan,down=1",
        "up=inf,down=1",
        "up=10ms,down=1",
        "up=1e,down=1",
        "up=1e99,down=1e999",
        "up=1,down=1,loss=1",
        "up=1,down=1,loss=1M",
        "up=1,down=1,latency=-1",
        "up=1,down=1,stragglers=2",
        "up=1,down=1,slowdown=0.5",
        "4g,,",
        "=1,down=1",
    ],
)
def test_anything_else_is_a_config_error_that_names_the_key(text):
    with pytest.raises(ConfigError) as caught:
        parse_link(text)
    assert caught.value.what == "wire.link"
    assert caught.value.fix


def test_stragglers_are_drawn_once_and_in_the_stated_share():
    link = Link(up=1, down=1, stragglers=0.25, slowdown=4)
    factors = link.slowdowns(20, seed=3)
    assert sorted(factors.tolist()) == [1.0] * 15 + [4.0] * 5
    assert np.array_equal(factors, link.slowdowns(20, seed=3))
    assert not np.array_equal(factors, link.slowdowns(20, seed=4))


def test_a_round_waits_for_its_slowest_client():
    link = Link(up=8, down=8)
    plain = round_time(link, {2: (1, 1), 0: (3, 1)})
    assert dict(plain.by_client) == {0: 4.0, 2: 2.0}
    assert (plain.slowest, plain.seconds) == (0, 4.0)
    slow = round_time(link, {2: (1, 1), 0: (3, 1)}, np.array([1.0, 1.0, 3.0]))
    assert (slow.slowest, slow.seconds) == (2, 6.0)
    assert round_time(link, {}).seconds == 0.0
