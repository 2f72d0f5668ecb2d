"""Commands that compute nothing answer at once, because nothing heavy is imported for them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT_S = 1.5
HEAVY = ("torch", "torchvision", "flwr", "ray", "dp_accounting", "opacus", "sklearn", "matplotlib", "scipy")
SCRIPT = """
import sys
sys.argv = ["fed-dpprune", *sys.argv[1:]]
code = None
try:
    from fed_dpprune.cli import main
    code = main()
except SystemExit as stop:
    code = stop.code
print("heavy:", *[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def _answer(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The fastest of up to three tries: another process may hold the machine for a moment."""
    best = float("inf")
    for _ in range(3):
        started = time.monotonic()
        command = [sys.executable, "-c", SCRIPT.format(heavy=HEAVY), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        best = min(best, time.monotonic() - started)
        if best <= LIMIT_S:
            break
    return done, best


@pytest.fixture
def bad_config(tmp_path: Path) -> Path:
    path = tmp_path / "bad.toml"
    path.write_text("[sparsity.freez]\nrate = 0.5\n")
    return path


@pytest.mark.parametrize("command", [(), ("run",), ("plan",), ("ledger",), ("compare",), ("doctor",), ("sweep",)])
def test_help_is_quick_and_light(command):
    done, seconds = _answer(*command, "--help")
    assert done.returncode == 0
    assert "usage" in done.stdout.lower()
    assert done.stderr.splitlines()[-1].strip() == "heavy:"
    assert seconds <= LIMIT_S


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_bad_config_is_refused_quickly_in_one_line(command, bad_config):
    done, seconds = _answer(command, str(bad_config))
    *lines, heavy = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith("fed-dpprune: sparsity.freez.rate: is not a config key; did you mean 'sparsity.freeze.rate'")
    assert heavy.strip() == "heavy:"
    assert done.stdout == ""
    assert seconds <= LIMIT_S


@pytest.mark.parametrize(
    "command", [("ledger", "nowhere.sqlite"), ("compare", "nowhere", "nowhere-either"), ("run", "nowhere.toml")]
)
def test_a_missing_file_is_one_line_and_quick(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done, seconds = _answer(*command)
    *lines, heavy = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith("fed-dpprune: nowhere")
    assert heavy.strip() == "heavy:"
    assert seconds <= LIMIT_S
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "module", ["config", "records", "errors", "console", "sparsity.support", "models.flat", "plan", "study.compare"]
)
def test_modules_for_light_commands_import_nothing_heavy(module):
    script = f"import sys, fed_dpprune.{module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == ""
