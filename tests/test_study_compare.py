"""Runs side by side: from summary.json alone, with a clear word for what is not a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from fed_dpprune.console import Screen
from fed_dpprune.errors import BadInput
from fed_dpprune.records import SCHEMA
from fed_dpprune.study.compare import compare, read_run, read_runs


def _summary(**changes: Any) -> dict[str, Any]:
    direction = {"payload": 446_000, "message": 512_345, "dense_float32": 1_982_000, "ratio": 0.225, "message_ratio": 0.259}
    return {
        "schema": SCHEMA,
        "status": "complete",
        "name": "",
        "accuracy": {"last": 0.9134, "best": 0.921, "best_round": 17},
        "privacy": {"epsilon_max": 3.997, "delta": 1e-3, "accountant": "pld"},
        "bytes": {"uplink": direction, "downlink": {**direction, "ratio": 0.5}},
        "sparsity": {"parameters": 9610, "live_by_round": [3844, 2000, 965]},
        "time": {"total_s": 41.25},
        **changes,
    }


def _run(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(_summary(**changes)))
    return folder


def _shown(*runs: Path, json_only: bool = False) -> str:
    out = io.StringIO()
    compare(runs, Screen(out, out), json_only=json_only)
    return out.getvalue()


def test_a_row_holds_what_the_summary_says(tmp_path):
    row = read_run(_run(tmp_path / "sparse"))
    assert (row.name, row.status, row.rounds, row.live, row.parameters) == ("sparse", "complete", 3, 965, 9610)
    assert (row.accuracy, row.accuracy_best, row.epsilon_max, row.delta) == (0.9134, 0.921, 3.997, 1e-3)
    assert (row.uplink.payload, row.uplink.message, row.uplink.ratio) == (446_000, 512_345, 0.225)


def test_the_table_shows_every_run_with_its_figures(tmp_path):
    shown = _shown(_run(tmp_path / "sparse"), _run(tmp_path / "b", name="dense twin"))
    for words in (
        "sparse",
        "dense twin",
        "complete",
        "0.913",
        "0.921",
        "4.00",
        "0.001",
        "0.446 (22.5%)",
        "0.512",
        "965",
        "41.2",
    ):
        assert words in shown


def test_every_line_of_the_table_fits_without_a_terminal(tmp_path):
    shown = _shown(_run(tmp_path / ("a-long-name-" * 6)), _run(tmp_path / "b"))
    assert max(len(line) for line in shown.splitlines()) <= 120


def test_runs_at_different_deltas_name_each_and_warn(tmp_path):
    shown = _shown(_run(tmp_path / "a"), _run(tmp_path / "b", privacy={"epsilon_max": 1.0, "delta": 1e-5}))
    assert "0.001" in shown
    assert "1e-05" in shown
    assert "different deltas" in shown
    assert "different deltas" not in _shown(tmp_path / "a", tmp_path / "a")


def test_json_has_the_fields_of_a_row(tmp_path):
    runs = json.loads(_shown(_run(tmp_path / "a"), _run(tmp_path / "b"), json_only=True))["runs"]
    assert [run["name"] for run in runs] == ["a", "b"]
    assert runs[0]["uplink"] == {"payload": 446_000, "message": 512_345, "ratio": 0.225, "message_ratio": 0.259}


def test_a_run_that_never_finished_a_round_has_dashes(tmp_path):
    empty = {"accuracy": {"last": None, "best": None}, "privacy": {"epsilon_max": None}, "bytes": {}, "sparsity": {}, "time": {}}
    run = _run(tmp_path / "a", status="failed", **empty)
    assert " - " in _shown(run)
    assert read_run(run).live is None


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "holds no summary.json"), ("{", "cannot be read"), ("[]", "is not the summary"), ('{"schema": 99}', "has schema 99")],
)
def test_a_folder_that_is_not_a_run_is_bad_input_that_names_it(tmp_path, content, why):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(BadInput, match=why) as caught:
        read_runs([tmp_path])
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_folder_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        read_run(tmp_path / "nowhere")
