"""The screen belongs to us: chatter of libraries, of C and of child processes goes to the log, errors are one line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fed_dpprune import console
from fed_dpprune.errors import ConfigError

CHATTER = """
import ctypes, os, subprocess, sys
from pathlib import Path
from fed_dpprune.console import quiet_screen
print("before")
with quiet_screen(Path(sys.argv[1])) as screen:
    print("python says")
    print("python complains", file=sys.stderr)
    os.write(1, b"descriptor says\\n")
    ctypes.CDLL(None).printf(b"C says\\n")  # buffered by C until flushed
    subprocess.run([sys.executable, "-c", "print('child says')"], check=True)
    print("result", file=screen.out)
    print("trouble", file=screen.err)
    if sys.argv[2] == "raise":
        raise KeyboardInterrupt
print("after")
print("after, too", file=sys.stderr)
"""


def _chatter(log: Path, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CHATTER, str(log), mode], capture_output=True, text=True, check=False)


def test_only_what_is_printed_on_the_screen_object_reaches_the_screen(tmp_path):
    done = _chatter(tmp_path / "log.txt", "finish")
    assert done.stdout == "before\nresult\nafter\n"
    assert done.stderr == "trouble\nafter, too\n"


def test_everything_else_is_in_the_log(tmp_path):
    _chatter(tmp_path / "log.txt", "finish")
    logged = (tmp_path / "log.txt").read_text()
    for voice in ("python says", "python complains", "descriptor says", "C says", "child says"):
        assert logged.count(voice) == 1
    assert "before" not in logged
    assert "after" not in logged


def test_an_interrupt_gives_the_screen_back(tmp_path):
    done = _chatter(tmp_path / "log.txt", "raise")
    assert done.stdout == "before\nresult\n"
    assert "KeyboardInterrupt" in done.stderr
    assert "C says" in (tmp_path / "log.txt").read_text()


def test_the_log_is_appended_to(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("first part\n")
    _chatter(log, "finish")
    assert log.read_text().startswith("first part\n")


def test_captured_python_streams_are_led_to_the_log_and_come_back(tmp_path, capsys):
    before = sys.stdout
    with console.quiet_screen(tmp_path / "log.txt"):
        print("chatter")
    assert sys.stdout is before
    print("free")
    assert capsys.readouterr().out == "free\n"
    assert (tmp_path / "log.txt").read_text() == "chatter\n"


def test_a_log_handler_made_inside_survives_the_end(tmp_path, capfd):
    logger = logging.getLogger("fed_dpprune.test_console")
    with console.quiet_screen(tmp_path / "log.txt"):
        handler = logging.StreamHandler()
        logger.addHandler(handler)
    logger.warning("late words")
    logger.removeHandler(handler)
    assert "Traceback" not in capfd.readouterr().err


def test_no_descriptor_is_left_open(tmp_path):
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom fed_dpprune.console import quiet_screen\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "for _ in range(3):\n    with quiet_screen(Path(sys.argv[1])): pass\n"
        "print(len(os.listdir('/proc/self/fd')) - before)"
    )
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts descriptors in /proc, which this system lacks")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "log")], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_a_closed_stdout_does_not_stop_a_run(tmp_path):
    done = subprocess.run(
        [
            "bash",
            "-c",
            'exec "$0" -c "$1" "$2" finish >&-',
            sys.executable,
            CHATTER.replace('print("after")', ""),
            str(tmp_path / "l"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "python complains" in (tmp_path / "l").read_text()


def test_what_the_user_set_in_the_environment_stands(monkeypatch):
    for name in console.CALM:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_DEDUP_LOGS", "1")
    console.calm_environment()
    assert os.environ["RAY_DEDUP_LOGS"] == "1"
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"


def test_an_error_of_ours_reads_what_why_fix():
    assert console.error_line(ConfigError("seed", "is\nodd", "use 0")) == "fed-dpprune: seed: is odd; use 0"


def test_an_unexpected_error_is_one_line_that_names_its_type_and_the_log():
    line = console.error_line(ValueError("a\nb"), log_path=Path("runs/x/log.txt"))
    assert line == "fed-dpprune: unexpected failure: ValueError: a b; --debug shows where (log: runs/x/log.txt)"


def test_errors_go_to_stderr(capsys):
    console.print_error(ConfigError("seed", "is odd"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "fed-dpprune: seed: is odd\n"


def test_the_module_is_light():
    script = "import sys, fed_dpprune.console; print([m for m in ('rich', 'torch', 'ray', 'flwr') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
