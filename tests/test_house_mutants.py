"""`make mutants` tells a guarded line from an unguarded one, and the mutants in the repository are well formed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "mutants"
GUARDED_INVARIANTS = {1, 2, 3, 4, 5, 9, 11, 12}


def _runner():
    spec = importlib.util.spec_from_file_location("mutants_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


runner = _runner()
FILES = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_mutant_applies_and_names_tests_that_exist(path):
    mutant = runner.load(path)
    assert re.fullmatch(rf"{mutant.invariant:02d}-[a-z0-9-]+|{mutant.invariant}-[a-z0-9-]+", path.stem)
    assert 1 <= mutant.invariant <= 17
    mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
    for test in mutant.tests:
        file, _, function = test.partition("::")
        name = function.split("::")[-1].split("[")[0]
        assert re.search(rf"^\s*def {re.escape(name)}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_every_invariant_that_has_landed_has_a_mutant():
    assert {runner.load(path).invariant for path in FILES} >= GUARDED_INVARIANTS


MUTANT = """
invariant = {invariant}
file = "fed_dpprune/__init__.py"
old = '''{old}'''
new = '''{new}'''
tests = {tests}
"""
TESTS = """
import pytest
from fed_dpprune import double, halve

@pytest.mark.parametrize("x", [0, 1])
def test_double(x):
    assert double(x) == 2 * x

def test_halve_runs():
    halve(4)
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one guarded and one unguarded function, whose pytest starts without plugins."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for folder in ("fed_dpprune", "tests/mutants"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "fed_dpprune" / "__init__.py").write_text("def double(x):\n    return 2 * x\n\ndef halve(x):\n    return x / 2\n")
    (tmp_path / "tests" / "test_tiny.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['.']\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def _add(root: Path, name: str, old: str, new: str, *tests: str, invariant: int = 1) -> None:
    named = [f"tests/test_tiny.py::{test}" for test in tests]
    (root / "tests" / "mutants" / f"{name}.toml").write_text(MUTANT.format(invariant=invariant, old=old, new=new, tests=named))


def _judge(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = runner.main(["--root", str(root), "--jobs", "2", *arguments])
    return code, capsys.readouterr().out


def test_anything_but_red_fails_the_run_and_says_why(tiny, capsys):
    source = (tiny / "fed_dpprune" / "__init__.py").read_text()
    _add(tiny, "1-guarded", "return 2 * x", "return 3 * x", "test_double")
    _add(tiny, "1-half-guarded", "return 2 * x", "return 3 * x", "test_double", "test_halve_runs")
    _add(tiny, "2-unguarded", "return x / 2", "return x / 3", "test_halve_runs", invariant=2)
    _add(tiny, "3-gone", "return 4 * x", "return 3 * x", "test_double", invariant=3)
    _add(tiny, "4-twice", "return", "yield", "test_double", invariant=4)
    _add(tiny, "5-not-python", "return 2 * x", "return (", "test_double", invariant=5)
    code, out = _judge(tiny, capsys)
    verdicts = {line.split()[0]: line.split(" s  ", 1)[1] for line in out.splitlines() if re.match(r"  [1-5]-", line)}
    assert code == 1
    assert verdicts["1-guarded"] == "red"
    assert verdicts["1-half-guarded"] == "STAYS GREEN  green: tests/test_tiny.py::test_halve_runs"
    assert verdicts["2-unguarded"].startswith("STAYS GREEN")
    assert verdicts["3-gone"] == "does not apply  `old` occurs 0 times in fed_dpprune/__init__.py"
    assert verdicts["4-twice"] == "does not apply  `old` occurs 2 times in fed_dpprune/__init__.py"
    assert verdicts["5-not-python"].startswith("does not run  pytest ended with")
    assert out.endswith("1 of 6 went red; look at 5\n")
    assert (tiny / "fed_dpprune" / "__init__.py").read_text() == source


def test_tests_that_are_red_unbroken_stop_the_run(tiny, capsys):
    (tiny / "tests" / "test_tiny.py").write_text("def test_double():\n    assert False\n")
    _add(tiny, "1-double", "return 2 * x", "return 3 * x", "test_double")
    code, out = _judge(tiny, capsys)
    assert code == 1
    assert "not green to begin with" in out


def test_only_picks_by_name(tiny, capsys):
    _add(tiny, "1-double", "return 2 * x", "return 3 * x", "test_double")
    _add(tiny, "2-halve", "return x / 2", "return x / 3", "test_halve_runs", invariant=2)
    code, out = _judge(tiny, capsys, "--only", "double")
    assert code == 0
    assert "1 of 1 went red" in out
    assert "halve" not in out


def test_a_mutant_file_with_a_wrong_key_is_refused(tiny):
    path = tiny / "tests" / "mutants" / "1-x.toml"
    path.write_text("invariant = 1\nfile = 'a'\nold = 'b'\nneu = 'c'\ntests = ['d']\n")
    with pytest.raises(ValueError, match="neu, new"):
        runner.load(path)
