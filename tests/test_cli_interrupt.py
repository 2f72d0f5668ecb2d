"""Ctrl-C and kill -9 on a real process: readable, labelled outputs, and the printed command goes on to the same result."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_run

from fed_dpprune import config as cfg
from fed_dpprune.privacy.ledger import Ledger
from fed_dpprune.records import read_lines

LONG = {"federation.rounds": 40}
COMMAND = [sys.executable, "-m", "fed_dpprune.cli"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    small_run.run(small_run.config(**LONG), out)
    return out


@pytest.fixture
def running(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A run in a process group of its own, a few rounds in. Its folder has a space in its name."""
    (tmp_path / "long.toml").write_text(cfg.to_toml(small_run.config(**LONG)))
    process = subprocess.Popen(
        [*COMMAND, "run", "long.toml", "--out", "my run"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while len(list(read_lines(tmp_path / "my run" / "rounds.jsonl"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def assert_labelled(out: Path) -> None:
    made = small_run.summary(out)
    rounds = len(small_run.rounds(out))
    assert made["status"] == "interrupted"
    assert 2 <= made["rounds"] <= rounds < 40
    with Ledger.read(out / "ledger.sqlite") as ledger:
        assert ledger.head().count >= 4 * made["rounds"]


def test_ctrl_c_leaves_a_labelled_run_and_prints_the_command_that_goes_on(running, whole, tmp_path):
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err == ""
    assert_labelled(tmp_path / "my run")
    (line,) = [line for line in out.splitlines() if line.startswith("to go on:")]
    words = shlex.split(line.removeprefix("to go on:"))
    assert words[0] == "fed-dpprune"
    again = subprocess.run([*COMMAND, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    for mine, theirs in zip(small_run.result(tmp_path / "my run"), small_run.result(whole), strict=True):
        assert mine == theirs


def test_kill_9_leaves_a_labelled_run_that_goes_on_to_the_same_result(running, whole, tmp_path):
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=60)
    assert_labelled(tmp_path / "my run")
    outcome, _ = small_run.run(small_run.config(**LONG), tmp_path / "my run", resume=True)
    assert outcome.status == "complete"
    for mine, theirs in zip(small_run.result(tmp_path / "my run"), small_run.result(whole), strict=True):
        assert mine == theirs
