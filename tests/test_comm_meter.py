"""The meter: sums agree whichever way they are asked for, and survive a checkpoint."""

from __future__ import annotations

import json

import pytest

from fed_dpprune.comm.meter import KINDS, Meter, Parcel

PARCELS = [
    Parcel(0, 1, "down", "join", 100, 1600, 4000),
    Parcel(0, 1, "up", "update", 30, 1530, 4000),
    Parcel(1, 1, "down", "sync", 20, 1520, 4000),
    Parcel(1, 1, "down", "retry", 20, 1520, 4000),
    Parcel(1, 1, "up", "update", 30, 1530, 4000),
    Parcel(1, 2, "down", "resync", 100, 1600, 4000),
    Parcel(1, 2, "up", "update", 31, 1531, 4000),
]


def metered(parcels: list[Parcel]) -> Meter:
    meter = Meter()
    for parcel in parcels:
        meter.add(parcel)
    return meter


def test_totals_are_the_sums_of_the_parcels():
    down, up = metered(PARCELS).total("down"), metered(PARCELS).total("up")
    assert (down.payload, down.message, down.dense_float32) == (240, 6240, 16000)
    assert down.by_kind == {"join": 100, "resync": 100, "retry": 20, "sync": 20}
    assert (up.payload, up.message, up.dense_float32, up.by_kind) == (91, 4591, 12000, {"update": 91})
    assert up.as_json()["ratio"] == pytest.approx(91 / 12000)
    assert up.as_json()["message_ratio"] == pytest.approx(4591 / 12000)


def test_rounds_clients_and_kinds_add_up_to_the_totals():
    meter = metered(PARCELS)
    for way in ("up", "down"):
        total = meter.total(way)
        assert sum(meter.of_round(number, way).payload for number in (0, 1)) == total.payload
        assert sum(meter.of_client(number, who, way).message for number in (0, 1) for who in (1, 2)) == total.message
        assert sum(meter.of_kind(way, kind).dense_float32 for kind in KINDS) == total.dense_float32
    assert meter.of_client(1, 1, "down").by_kind == {"sync": 20, "retry": 20}
    assert meter.of_client(7, 7, "up").payload == 0


def test_a_checkpoint_in_json_continues_to_the_same_state():
    whole, half = metered(PARCELS), metered(PARCELS[:4])
    resumed = Meter.from_state(json.loads(json.dumps(half.state())))
    for parcel in PARCELS[4:]:
        resumed.add(parcel)
    assert json.dumps(resumed.state()) == json.dumps(whole.state())


def test_the_state_does_not_depend_on_the_order_of_replies():
    assert json.dumps(metered(PARCELS).state()) == json.dumps(metered(PARCELS[::-1]).state())


def test_forgotten_clients_leave_the_totals_alone():
    meter = metered(PARCELS)
    meter.forget(before_round=1)
    assert meter.of_client(0, 1, "down").payload == 0
    assert meter.of_client(1, 1, "up").payload == 30
    assert meter.of_round(0, "down").payload == 100
    assert meter.total("down").payload == 240


def test_what_was_handed_out_can_be_changed_without_changing_the_meter():
    meter = metered(PARCELS)
    meter.of_round(0, "down").payload = 0
    meter.total("up").by_kind.clear()
    meter.of_kind("up", "update").by_kind["update"] = 0
    assert meter.of_round(0, "down").payload == 100
    assert meter.total("up").by_kind == {"update": 91}


@pytest.mark.parametrize("wrong", [("sideways", "sync", 1), ("up", "gift", 1), ("up", "update", -1)])
def test_a_parcel_that_would_spoil_the_sums_is_refused(wrong):
    with pytest.raises(ValueError):
        Parcel(0, 0, wrong[0], wrong[1], wrong[2], 0, 0)
