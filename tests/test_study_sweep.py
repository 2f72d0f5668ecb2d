"""A sweep runs what is missing, records what fails, and can be broken off at any moment."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fed_dpprune import config as cfg
from fed_dpprune.console import Screen
from fed_dpprune.errors import BadInput, DataError, RunStopped
from fed_dpprune.records import ClientCounts, RoundRecord, append_lines
from fed_dpprune.study.figures import curves
from fed_dpprune.study.results import spread
from fed_dpprune.study.sweep import sweep

STUDY = """
seeds = [1, 2]
[common]
federation.rounds = 2
privacy.noise-multiplier = 1.0
[variants.dense]
[variants.freeze]
sparsity.freeze.method = "random"
sparsity.freeze.rate = 0.9
"""


@dataclass
class Outcome:
    status: str
    error: BaseException | None = None


def _write(config: cfg.Config, out: Path, status: str) -> None:
    accuracy = 0.9 if config.sparsity.freeze.method == "none" else 0.8
    summary = {
        "schema": 1,
        "status": status,
        "accuracy": {"last": accuracy + 0.01 * config.seed, "best": 0.95},
        "privacy": {"epsilon_max": 2.0, "delta": 1e-5},
        "bytes": {"uplink": {"payload": 1_000_000, "message": 1_100_000, "dense_float32": 4_000_000, "ratio": 0.25}},
        "sparsity": {"parameters": 1000, "live_by_round": [500, 250]},
        "time": {"total_s": 1.0},
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "process": os.getpid(),
    }
    (out / "summary.json").write_text(json.dumps(summary))


def fake(config: cfg.Config, out: Path, *, resume: bool, force: bool, observer: Any, on_ready: Callable[[Any], None]) -> Outcome:
    """Behaves as a run does, within milliseconds."""
    if os.environ.get("FAKE_BAD_DATA") == config.name:
        raise DataError("data.dataset", "is\nbroken", "mend it")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").write_text(cfg.to_toml(config))
    on_ready(None)
    print(f"chatter resume={resume} force={force}")
    observer.phase("training")
    for round_ in (1, 2):
        if os.environ.get("FAKE_CRASH") == config.name:
            os.kill(os.getpid(), signal.SIGKILL)
        record = RoundRecord(round_, 0.5, 1.0, 10, "d", 1.0, 100, 100, 100, 100, ClientCounts())
        append_lines(out / "rounds.jsonl", [record])
        observer.round_done(record, 2, 1.0, 0.1)
        if os.environ.get("FAKE_SLOW"):
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                _write(config, out, "interrupted")
                return Outcome("interrupted", KeyboardInterrupt())
    stopped = os.environ.get("FAKE_STOPS") == config.name
    _write(config, out, "stopped" if stopped else "complete")
    return Outcome("stopped", RunStopped("budget", "spent")) if stopped else Outcome("complete")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(STUDY)
    return path


def _sweep(study: Path, **options: Any) -> tuple[int, str, Path]:
    screen, out = io.StringIO(), study.parent / "out"
    code = sweep(study, Screen(screen, screen), out=out, execute=fake, **options)
    return code, screen.getvalue(), out


def _rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / "sweep.csv").read_text())))


@pytest.fixture(autouse=True)
def _quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ones are drawn in test_study_figures."""
    monkeypatch.setattr(curves, "draw", lambda run, path: path.write_bytes(b"picture"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_run_gets_a_folder_a_row_and_a_log_of_its_own(study, jobs, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, shown, out = _sweep(study, jobs=jobs)
    rows = _rows(out)
    assert code == 0
    assert [row["run"] for row in rows] == ["dense_seed=1", "dense_seed=2", "freeze_seed=1", "freeze_seed=2"]
    assert {row["status"] for row in rows} == {"complete"}
    assert rows[3]["accuracy_last"] == "0.8200000000000001"
    assert rows[0] | {"bytes_up": "1000000", "live_last": "250", "rounds": "2"} == rows[0]
    assert all((out / row["run"] / "curves.png").exists() for row in rows)
    assert "0.915 ± 0.007" in shown
    assert "25.0%" in shown
    assert "delta = 1e-05" in shown
    # Chatter goes to the run's own log.
    assert "chatter" not in shown + "".join(capfd.readouterr())
    assert (out / "dense_seed=2" / "log.txt").read_text() == "chatter resume=False force=False\n"
    # Workers are other processes, with one thread each; the parent's environment is left alone.
    summaries = [json.loads(path.read_text()) for path in out.glob("*/summary.json")]
    assert {summary["threads"] for summary in summaries} == ({"1"} if jobs == 2 else {None})
    assert (os.getpid() in {summary["process"] for summary in summaries}) == (jobs == 1)
    assert "OMP_NUM_THREADS" not in os.environ


def test_complete_runs_are_skipped_on_a_second_call(study):
    _, _, out = _sweep(study)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    code, shown, _ = _sweep(study)
    assert code == 0
    assert "4 of 4 runs are complete already" in shown
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")} == before
    assert "0.915 ± 0.007" in shown


def test_a_run_whose_config_has_changed_is_done_anew(study):
    _, _, out = _sweep(study)
    study.write_text(STUDY.replace("rate = 0.9", "rate = 0.8"))
    _, shown, _ = _sweep(study)
    assert "2 of 4 runs are complete already" in shown
    assert "force=True" in (out / "freeze_seed=1" / "log.txt").read_text()
    assert "force=True" not in (out / "dense_seed=1" / "log.txt").read_text()


def test_a_run_that_was_broken_off_is_resumed(study):
    _, _, out = _sweep(study)
    summary = out / "dense_seed=1" / "summary.json"
    summary.write_text(summary.read_text().replace("complete", "interrupted"))
    assert _sweep(study)[0] == 0
    assert (out / "dense_seed=1" / "log.txt").read_text().endswith("chatter resume=True force=False\n")


def test_the_runner_is_no_part_of_what_makes_a_run_the_same(study):
    _sweep(study, backend="inline")
    assert "4 of 4 runs are complete already" in _sweep(study, backend="ray")[1]


def test_a_failed_run_is_recorded_with_its_reason_and_the_rest_goes_on(study, monkeypatch):
    monkeypatch.setenv("FAKE_BAD_DATA", "dense_seed=2")
    code, shown, out = _sweep(study)
    rows = {row["run"]: row for row in _rows(out)}
    assert code == 1
    assert rows["dense_seed=2"]["status"] == "failed"
    assert rows["dense_seed=2"]["reason"] == "data.dataset: is broken; mend it"
    assert [row["status"] for row in rows.values()].count("complete") == 3
    assert "failed: dense_seed=2: data.dataset: is broken; mend it" in shown
    assert "1 of 2" in shown
    monkeypatch.delenv("FAKE_BAD_DATA")
    assert _sweep(study)[0] == 0


def test_a_worker_that_fails_or_dies_costs_its_own_run_alone(study, monkeypatch):
    monkeypatch.setenv("FAKE_CRASH", "dense_seed=1")
    monkeypatch.setenv("FAKE_BAD_DATA", "dense_seed=2")
    code, _, out = _sweep(study, jobs=2)
    rows = {row["run"]: row for row in _rows(out)}
    assert code == 1
    assert rows["dense_seed=1"]["reason"] == "its process ended by signal SIGKILL"
    assert rows["dense_seed=2"]["reason"] == "data.dataset: is broken; mend it"
    assert [row["status"] for row in rows.values()].count("complete") == 2


def test_a_run_that_stops_short_is_finished_and_told_by_the_exit_code(study, monkeypatch):
    monkeypatch.setenv("FAKE_STOPS", "dense_seed=1")
    code, _, out = _sweep(study)
    assert code == 3
    assert _rows(out)[0]["reason"] == "budget: spent"
    assert "4 of 4 runs are complete already" in _sweep(study)[1]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_ends_the_sweep_readably_and_the_same_command_continues(study, jobs, tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nimport test_study_sweep as t\n"
        "from fed_dpprune.console import plain_screen\nfrom fed_dpprune.study.sweep import sweep\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(sweep(Path(sys.argv[1]), plain_screen(), jobs=int(sys.argv[2]), out=Path(sys.argv[3]), execute=t.fake))\n"
    )
    (tmp_path / "main.py").write_text(script)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "FAKE_SLOW": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(tmp_path / "main.py"), str(study), jobs, str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("out/*/rounds.jsonl"))) < int(jobs) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert "interrupted with 4 of 4 runs to go; the same command continues" in out
    statuses = sorted(row["status"] for row in _rows(tmp_path / "out"))
    assert statuses == ["interrupted"] * int(jobs) + ["not run"] * (4 - int(jobs))
    assert _sweep(study)[0] == 0


def test_bad_input_writes_nothing(study, tmp_path):
    study.write_text(STUDY.replace("rate = 0.9", "rate = 2"))
    with pytest.raises(BadInput, match=r"sparsity\.freeze\.rate"):
        _sweep(study)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="--jobs"):
        _sweep(study, jobs=0)


def test_without_a_terminal_the_sweep_prints_a_line_for_each_run(study):
    _, shown, _ = _sweep(study)
    assert "[1/4] dense_seed=1: complete, accuracy 0.910  epsilon 2.00, " in shown
    assert "\x1b" not in shown


def test_a_real_run_goes_through(study, monkeypatch, tmp_path):
    study.write_text("[common]\nfederation.rounds = 1\nfederation.clients = 2\nprivacy.noise-multiplier = 2.0\n")
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path / "cache"))
    screen = io.StringIO()
    assert sweep(study, Screen(screen, screen), out=tmp_path / "out") == 0
    (row,) = _rows(tmp_path / "out")
    assert (row["status"], row["rounds"]) == ("complete", "1")
    assert 0 < float(row["accuracy_last"]) < 1
    assert float(row["epsilon_max"]) > 0
    assert (tmp_path / "out" / "run_seed=0" / "log.txt").exists()
    assert "1 of 1 runs are complete already" in _sweep(study)[1]


def test_spread_is_mean_and_sample_standard_deviation():
    assert spread([0.9, 0.92, 0.94], ".3f") == "0.920 ± 0.020"
    assert spread([0.9], ".3f") == "0.900"
    assert spread([], ".3f") == "-"
    assert spread([0.9, float("nan")], ".2f") == "0.90"
