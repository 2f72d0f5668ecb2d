"""Break each guarded line, one at a time, and see its test go red: `make mutants`.

A mutant is a TOML file beside this one:

    invariant = 1                                    # of docs/architecture.md
    file = "fed_dpprune/dpsgd/clipping.py"
    old = "the exact text, found once in the file"
    new = "the text that breaks it"
    tests = ["tests/test_dpsgd_clipping.py::test_..."]   # each must go red

Each is applied in a scratch copy of the working tree, never in the tree itself. A mutant whose test stays green, does not
run, or whose text is not found fails the whole run: then the guard is not guarded.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

KEYS = {"invariant": int, "file": str, "old": str, "new": str, "tests": list}
KILLED = "red"
PYTEST_FAILED = 1  # pytest's own exit code for "some tests failed"; 2 to 5 mean that nothing was judged


@dataclass(frozen=True)
class Mutant:
    """One broken line."""

    name: str
    invariant: int
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The text with the guard broken.

        Raises:
            ValueError: `old` does not occur exactly once, or nothing would change.
        """
        found = text.count(self.old)
        if found != 1 or self.old == self.new:
            raise ValueError(f"`old` occurs {found} times in {self.file}" if found != 1 else "`new` equals `old`")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant; anything but "red" is a failure, explained in `detail`."""

    mutant: Mutant
    word: str
    seconds: float
    detail: str = ""


def load(path: Path) -> Mutant:
    """Read one mutant.

    Raises:
        ValueError: A key is missing, unknown or of the wrong type.
    """
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    wrong = {key for key in table.keys() | KEYS.keys() if key not in KEYS or not isinstance(table.get(key), KEYS[key])}
    if wrong or not table["tests"]:
        raise ValueError(f"{path.name}: keys must be {', '.join(KEYS)}; look at {', '.join(sorted(wrong)) or 'tests'}")
    return Mutant(path.stem, table["invariant"], table["file"], table["old"], table["new"], tuple(table["tests"]))


def load_all(folder: Path) -> list[Mutant]:
    """All mutants of a folder, by invariant, then name."""
    return sorted((load(path) for path in folder.glob("*.toml")), key=lambda mutant: (mutant.invariant, mutant.name))


def copy_tree(root: Path, target: Path) -> Path:
    """Copy what git tracks or would track, as it is in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (root / name).is_file():  # a file deleted but not yet committed is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    return target


def _environment(copy: Path, cache: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(copy),
        # Without byte code a file changed twice within one second cannot be mistaken for its older self.
        "PYTHONDONTWRITEBYTECODE": "1",
        # A broken calibration must not be remembered by the next mutant.
        "FED_DPPRUNE_CACHE": str(cache),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _run(arguments: Sequence[str], copy: Path, cache: Path, timeout: float | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=copy, env=_environment(copy, cache), timeout=timeout,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip


def _pytest(tests: Iterable[str], copy: Path, cache: Path, *options: str, timeout: float | None = None) -> tuple[int, str]:
    """(exit code, output). `-m ""`: a test that is named runs, whatever its marks."""
    done = _run(["-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "", "-rfE", *options, *tests], copy, cache, timeout)
    return done.returncode, done.stdout


def _imports_the_copy(copy: Path, cache: Path) -> bool:
    """Whether `fed_dpprune` is the copy's and not the installed one: else every mutant would seem to survive."""
    done = _run(["-c", "import fed_dpprune; print(fed_dpprune.__file__)"], copy, cache, None)
    return Path(done.stdout.strip()).is_relative_to(copy)


def _still_green(tests: Iterable[str], output: str) -> list[str]:
    """The named tests of which pytest's short summary tells no failure. A name covers its parameters."""
    red = [line.split(" ", 1)[1] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return [test for test in tests if not any(re.match(rf"{re.escape(test)}(\[| |::|$)", line) for line in red)]


def judge(mutant: Mutant, copy: Path, cache: Path, timeout: float) -> Verdict:
    """Apply a mutant in the copy, run its tests, put the file back."""
    started = time.monotonic()

    def verdict(word: str, detail: str = "") -> Verdict:
        return Verdict(mutant, word, time.monotonic() - started, detail)

    path = copy / mutant.file
    try:
        before = path.read_text(encoding="utf-8")
        broken = mutant.apply(before)
    except (OSError, ValueError) as error:
        return verdict("does not apply", str(error))
    path.write_text(broken, encoding="utf-8")
    try:
        code, output = _pytest(mutant.tests, copy, cache, *(["-x"] if len(mutant.tests) == 1 else []), timeout=timeout)
    except subprocess.TimeoutExpired:
        return verdict("hangs", f"no verdict within {timeout:.0f} s")
    finally:
        path.write_text(before, encoding="utf-8")
    if code not in (0, PYTEST_FAILED):
        return verdict("does not run", f"pytest ended with {code}:\n{output[-2000:]}")
    green = _still_green(mutant.tests, output)
    return verdict("STAYS GREEN", "green: " + ", ".join(green)) if green else verdict(KILLED)


class _Copies:
    """A scratch copy for each worker thread, and a fresh cache for each mutant."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self._root, self._scratch, self._local = root, scratch, threading.local()
        self.baseline_cache = scratch / "cache"
        self.baseline_cache.mkdir()

    def tree(self) -> Path:
        if not hasattr(self._local, "tree"):
            self._local.tree = copy_tree(self._root, Path(tempfile.mkdtemp(dir=self._scratch)).resolve())
        return Path(self._local.tree)

    def judge(self, mutant: Mutant, timeout: float) -> Verdict:
        cache = Path(tempfile.mkdtemp(dir=self._scratch))
        shutil.copytree(self.baseline_cache, cache, dirs_exist_ok=True)
        try:
            return judge(mutant, self.tree(), cache, timeout)
        finally:
            shutil.rmtree(cache, ignore_errors=True)


def run(root: Path, mutants: Sequence[Mutant], *, jobs: int, timeout: float) -> int:
    """Judge all mutants and print a line for each. Exit code: 0 when every one went red."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch, ThreadPoolExecutor(jobs) as pool:
        copies = _Copies(root, Path(scratch).resolve())
        copy, cache = copies.tree(), copies.baseline_cache
        if not _imports_the_copy(copy, cache):
            print("the scratch copy is not what Python imports; nothing was judged")
            return 1
        named = sorted({test for mutant in mutants for test in mutant.tests})
        code, output = _pytest(named, copy, cache)
        if code != 0:
            print(f"the named tests are not green to begin with (pytest ended with {code}):\n{output[-4000:]}")
            return 1
        print(f"{len(named)} named tests are green unbroken; {len(mutants)} mutants:")
        width = max(len(mutant.name) for mutant in mutants)
        verdicts = []
        for verdict in pool.map(lambda mutant: copies.judge(mutant, timeout), mutants):
            print(
                f"  {verdict.mutant.name:<{width}}  {verdict.seconds:5.1f} s  {verdict.word}  {verdict.detail}".rstrip(),
                flush=True,
            )
            verdicts.append(verdict)
    bad = [verdict for verdict in verdicts if verdict.word != KILLED]
    print(f"{len(verdicts) - len(bad)} of {len(verdicts)} went red" + (f"; look at {len(bad)}" if bad else ""))
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="mutants whose name contains TEXT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time (default: one per core)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one mutant")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="the checkout")
    given = parser.parse_args(arguments)
    mutants = [
        mutant
        for mutant in load_all(given.root / "tests" / "mutants")
        if not given.only or any(text in mutant.name for text in given.only)
    ]
    if not mutants:
        print("no mutant of that name")
        return 1
    return run(given.root, mutants, jobs=max(1, given.jobs), timeout=given.timeout)


if __name__ == "__main__":
    sys.exit(main())
