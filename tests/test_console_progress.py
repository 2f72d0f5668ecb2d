"""The progress of a run: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest

from fed_dpprune.console import MOST_NOTES, Progress, Screen, plain_screen
from fed_dpprune.records import ClientCounts, RoundRecord


def _record(round_: int, accuracy: float = 0.5) -> RoundRecord:
    return RoundRecord(round_, accuracy, 1.0, 10, "d", 1.0, 1, 1, 1, 1, ClientCounts())


def _plain(rounds: int, *, done: int = 0) -> list[str]:
    out = io.StringIO()
    with Progress(Screen(out, io.StringIO())) as progress:
        progress.phase("starting Ray")
        for round_ in range(done + 1, rounds + 1):
            progress.round_done(_record(round_, 0.25), rounds, 0.1 * round_, 0.01 * round_)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("rounds", [1, 2, 18, 19, 20, 37, 400, 5000])
def test_without_a_terminal_a_run_of_any_length_is_at_most_25_lines_with_first_and_last_round(rounds):
    lines = _plain(rounds)
    assert len(lines) <= 25
    assert lines[0] == "starting Ray ..."
    assert lines[1].startswith(f"round 1/{rounds}  ")
    assert lines[-1].startswith(f"round {rounds}/{rounds}  ")


def test_a_plain_line_carries_accuracy_epsilon_and_bytes():
    assert "accuracy 0.250  epsilon 0.20  0.02 MB up" in _plain(2)[2]


def test_a_resumed_run_counts_on():
    assert _plain(20, done=17)[1].startswith("round 18/20  ")


def test_plain_output_has_no_control_codes():
    assert not any(ord(letter) < 32 for line in _plain(3) for letter in line)


def test_forced_colour_does_not_bring_control_codes_into_a_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    Screen(out, out).console().print("[bold]word[/]")
    assert out.getvalue() == "word\n"


def test_a_note_is_shown_once_and_brackets_stay():
    out = io.StringIO()
    with Progress(Screen(out, out)) as progress:
        for _ in range(3):
            progress.note("client 3: [failed]")
    assert out.getvalue() == "client 3: [failed]\n"


def test_a_flood_of_notes_ends_with_a_pointer_to_the_log():
    out = io.StringIO()
    with Progress(Screen(out, out)) as progress:
        for number in range(100):
            progress.note(f"client {number} failed")
    lines = out.getvalue().splitlines()
    assert len(lines) == MOST_NOTES + 1
    assert "log.txt" in lines[-1]


def test_a_reader_that_goes_away_does_not_stop_the_run():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(os.dup(writing), "w", buffering=1) as pipe:
        with Progress(Screen(pipe, pipe)) as progress:
            progress.note("nobody hears this")
            progress.round_done(_record(1), 2, 0.0, 0.0)
        # Nothing is left for the file to write when it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())
    os.close(writing)


def test_the_screen_of_a_plain_command_is_the_process_own():
    assert plain_screen().out is sys.stdout


BAR = """
import sys, time
from pathlib import Path
from fed_dpprune.console import Progress, quiet_screen
from fed_dpprune.records import ClientCounts, RoundRecord
with quiet_screen(Path(sys.argv[1])) as screen, Progress(screen) as progress:
    progress.phase("starting Ray")
    time.sleep(0.3)
    print("chatter")
    for r in range(1, 5):
        progress.round_done(RoundRecord(r, 0.9, 1.0, 10, "d", 1.0, 1, 1, 1, 1, ClientCounts()), 4, 3.99, 1.25)
        time.sleep(0.05)
    progress.note("client 3 [failed]")
"""


def _on_a_terminal(script: str, *args: str, columns: int = 80) -> str:
    """What a program writes to an 80-column terminal."""
    fcntl = pytest.importorskip("fcntl")
    import struct
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", script, *args], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(master)
    assert process.wait(timeout=30) == 0
    return seen.decode()


def test_on_a_terminal_a_bar_shows_phase_rounds_and_figures_and_no_chatter(tmp_path):
    seen = _on_a_terminal(BAR, str(tmp_path / "log.txt"))
    assert "starting Ray" in seen
    assert "4/4" in seen
    assert "accuracy 0.900  epsilon 3.99  1.25 MB up" in seen
    assert "client 3 [failed]" in seen
    assert "chatter" not in seen
    assert "\x1b[?25h" in seen  # the cursor is back
    assert (tmp_path / "log.txt").read_text() == "chatter\n"


def test_the_bar_fits_on_one_line_of_80_columns(tmp_path):
    seen = _on_a_terminal(BAR, str(tmp_path / "log.txt"))
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen))
    bars = [line for line in lines if "4/4" in line]
    assert bars
    assert all(len(line.rstrip()) <= 80 and "MB up" in line for line in bars)


def test_time_left_is_told_once_a_pace_is_known(tmp_path):
    seen = _on_a_terminal(BAR.replace("sleep(0.05)", "sleep(0.3)"), str(tmp_path / "log.txt"))
    before, training = seen.split("training", 1)
    assert "left" not in before
    assert re.search(r"\d:\d\d left", training)
