"""What is written: lines that a reader never sees half of, JSON that knows no infinity."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from fed_dpprune import records
from fed_dpprune.records import ClientCounts, ClientRecord, Direction, RoundRecord

ROUND = RoundRecord(1, 0.5, 1.25, 10, "d", 2.0, 40, 80, 60, 100, ClientCounts(4, 3, 1, 0), ("client 2: silent",), wall_s=0.1)
CLIENT = ClientRecord(1, 0, "answered", "", 337, 2, 0.1, 1.2, 1.0, 2.0, 10, 20, 30, 40)


def test_lines_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "rounds.jsonl"
    records.append_lines(path, [ROUND])
    records.append_lines(path, [replace(ROUND, round=2), replace(ROUND, round=3)])
    rows = list(records.read_lines(path))
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert rows[0]["clients"] == {"asked": 4, "answered": 3, "refused": 1, "rejected": 0}
    assert rows[0]["notes"] == ["client 2: silent"]


def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "clients.jsonl"
    records.append_lines(path, [CLIENT, replace(CLIENT, client=1)])
    path.write_bytes(path.read_bytes()[:-5])
    assert [row["client"] for row in records.read_lines(path)] == [0]


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert list(records.read_lines(tmp_path / "none.jsonl")) == []


def test_rounds_after_the_last_kept_one_go_and_the_others_stay_as_they_are(tmp_path):
    path = tmp_path / "rounds.jsonl"
    kept = [replace(ROUND, round=r, loss=1 / r) for r in (1, 2)]
    records.append_lines(path, kept)
    before = path.read_bytes()
    records.append_lines(path, [replace(ROUND, round=3)])
    records.keep_rounds(path, 2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_know_is_null(value):
    assert json.loads(records.to_json({"a": [value, {"b": (1.0, value)}]})) == {"a": [None, {"b": [1.0, None]}]}


def test_numbers_survive_json_to_the_bit():
    values = [0.1, 1e-300, 2.0**-1074, 1 / 3]
    assert json.loads(records.to_json(values)) == values


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "summary.json"
    records.write_atomically(path, "one")
    records.write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    records.write_atomically(path, "one")
    monkeypatch.setattr(records.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        records.write_atomically(path, "two")
    assert path.read_text() == "one"


def test_the_ratio_is_payload_over_dense_and_below_1_is_less():
    made = Direction(25, 40, 100, {"update": 25}).as_json()
    assert (made["ratio"], made["message_ratio"]) == (0.25, 0.4)


def test_a_ratio_of_nothing_is_null():
    assert Direction().as_json()["ratio"] is None


def test_the_conditions_of_an_epsilon_are_all_there_with_the_accountants_version():
    privacy = {
        "unit": "example",
        "neighbouring": "add-or-remove-one",
        "sampler": "poisson",
        "accountant": "prv",
        "adversary": "all",
    }
    text = records.conditions({"privacy": privacy, "versions": {"opacus": "1.2.3", "dp-accounting": "9"}})
    assert text == "add or remove one example of one client, poisson sampling, prv (opacus 1.2.3), against all"
    assert records.conditions({"privacy": {}}) == records.conditions({}) == ""


def test_every_accountant_has_its_library():
    from fed_dpprune.privacy.accountants.table import ACCOUNTANTS

    assert {name: row.library for name, row in ACCOUNTANTS.items()} == records.LIBRARIES
