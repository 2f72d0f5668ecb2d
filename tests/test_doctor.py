"""`doctor` tells what is there, what a run would use and what to do; it imports nothing heavy and changes nothing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fed_dpprune import doctor
from fed_dpprune.console import Screen

REAL_DATA = os.environ.get("FED_DPPRUNE_DATA")


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("FED_DPPRUNE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path / "cache"))


def _text(report: doctor.Report, *, json_only: bool = False) -> str:
    out = io.StringIO()
    doctor.render(report, Screen(out, out), json_only=json_only)
    return out.getvalue()


def test_it_answers_within_three_seconds_without_heavy_imports_and_leaves_nothing(tmp_path):
    script = (
        "import sys; from fed_dpprune import doctor; doctor.collect();"
        "print([m for m in ('torch', 'ray', 'flwr', 'dp_accounting', 'opacus', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert time.monotonic() - started <= 3.0
    assert not (tmp_path / "cache").exists()


def test_versions_python_sqlite_and_machine_are_reported():
    report = doctor.collect()
    assert report["python"]["version"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert {"flwr", "torch", "dp-accounting", "numpy"} <= set(report["packages"])
    assert all(package["fits"] for package in report["packages"].values())
    assert report["ray"]["fits"]
    assert report["sqlite"]["journal"]["simulation"] == "wal"
    assert 1 <= report["machine"]["cpus_used"] <= report["machine"]["cpus"]


def test_text_and_json_say_the_same_and_json_parses():
    report = doctor.collect()
    assert json.loads(_text(report, json_only=True))["packages"] == report["packages"]
    text = _text(report)
    for words in ("opacus", "Ray would use", "sqlite", "digits:", "FED_DPPRUNE_DATA"):
        assert words in text


def test_lines_fit_the_screen():
    assert max(len(line) for line in _text(doctor.collect()).splitlines() if "/" not in line) <= 120


def test_data_that_is_missing_comes_with_what_to_put_where(tmp_path):
    before = doctor.collect()["data"]
    assert "digits" in before["found"]
    assert "FED_DPPRUNE_DATA/adult" in before["missing"]["adult"]
    (tmp_path / "data" / "adult").mkdir()
    for name in ("adult.data", "adult.test"):
        (tmp_path / "data" / "adult" / name).write_text("")
    after = doctor.collect()["data"]
    assert "adult" in after["found"]
    assert "adult" not in after["missing"]


def test_real_data_is_found(monkeypatch):
    if REAL_DATA is None:
        pytest.skip("FED_DPPRUNE_DATA is not set: no real files to look for")
    monkeypatch.setenv("FED_DPPRUNE_DATA", REAL_DATA)
    found = doctor.collect()["data"]["found"]
    assert (Path(REAL_DATA) / "MNIST").is_dir() == ("mnist" in found)
    assert (Path(REAL_DATA) / "adult").is_dir() == ("adult" in found)


def test_an_unset_or_wrong_data_folder_is_advice(monkeypatch, tmp_path):
    assert not [line for line in doctor.collect()["advice"] if "FED_DPPRUNE_DATA" in line]
    monkeypatch.setenv("FED_DPPRUNE_DATA", str(tmp_path / "nowhere"))
    assert any("nowhere is not a folder" in line for line in doctor.collect()["advice"])
    monkeypatch.delenv("FED_DPPRUNE_DATA")
    assert any("FED_DPPRUNE_DATA: is not set" in line for line in doctor.collect()["advice"])


def test_a_package_that_is_missing_or_too_old_is_advice_with_the_command(monkeypatch):
    version = doctor.metadata.version

    def pretend(name):
        if name == "opacus":
            raise doctor.metadata.PackageNotFoundError(name)
        return {"torch": "2.0.0", "ray": "2.1.0"}.get(name) or version(name)

    monkeypatch.setattr(doctor.metadata, "version", pretend)
    advice = doctor.collect()["advice"]
    assert any(line.startswith("opacus is missing: ") and "pip install 'opacus" in line for line in advice)
    assert any(line.startswith("torch 2.0.0: torch>=") for line in advice)
    assert any(line.startswith("ray 2.1.0: Flower ") for line in advice)


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("", 8)])
def test_a_containers_quota_limits_the_cpus(monkeypatch, quota, expected):
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(doctor, "_read", lambda _: quota)
    assert doctor.cpus() == expected


@pytest.mark.parametrize(("visible", "names"), [(None, ["A", "B"]), ("1", ["B"]), ("", []), ("-1", [])])
def test_gpus_are_those_visible_to_the_process(monkeypatch, visible, names):
    monkeypatch.setattr(doctor, "_output", lambda *_: "A\nB\n")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert doctor.gpus() == names


def test_a_tool_that_hangs_or_is_missing_is_no_answer(monkeypatch):
    monkeypatch.setattr(doctor, "TOOL_PATIENCE_S", 0.1)
    assert doctor._output(sys.executable, "-c", "import time; time.sleep(5)") == ""
    assert doctor._output("no-such-tool-anywhere") == ""


def test_no_compiler_is_said_plainly(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    report = doctor.collect()
    assert report["kernel"]["compiler"] == ""
    assert "no C++ compiler" in _text(report)


def test_a_small_shared_memory_is_advice(monkeypatch):
    machine = {**doctor.collect()["machine"], "shared_memory_bytes": 64 * 2**20, "memory_available_bytes": 10**9}
    monkeypatch.setattr(doctor, "_machine", lambda: machine)
    advice = "\n".join(doctor.collect()["advice"])
    assert "--shm-size" in advice
    assert "federation.actors = 1" in advice


def test_a_cache_or_a_package_that_others_can_write_is_told_with_what_to_do(tmp_path, monkeypatch):
    assert not any("can write it" in line for line in doctor.collect()["advice"])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setattr(doctor.fed_dpprune, "__file__", str(tmp_path / "cache" / "__init__.py"))
    report = doctor.collect()
    reason = f"{tmp_path / 'cache'} has mode 777: everybody can write it; chmod go-w {tmp_path / 'cache'}"
    assert report["cache"]["not_alone"].startswith(reason) and report["code"]["not_alone"].startswith(reason)
    told = [line for line in report["advice"] if reason in line]
    assert [line.partition(":")[0] for line in told] == ["the package's code", "the cache, which is not used"]
