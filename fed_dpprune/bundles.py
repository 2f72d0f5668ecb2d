"""Whose code a SuperNode runs: what can be told from here, and what cannot. Standard library only.

Flower's `flower-supernode --trusted-entities FILE` accepts only app bundles that one of the file's keys has signed;
without it a SuperNode runs whatever bundle the server's side submits, before a line of this package is executed. The
option is not handed on to the app, so it is read from the SuperNode's command line in /proc, and the file as it is now:
on Linux, on the same machine and in the same process namespace. Elsewhere nothing is known, and that is said. And a line
of a log is written by the code that runs: a bundle that is not ours writes what it likes, so this finds a mistake, never
an attacker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

SIGNED, ANY, UNKNOWN = "signed", "any", "unknown"
OPTION = "--trusted-entities"
KEY = "ssh-ed25519"  # the one kind of key that Flower takes there
WORDS: dict[str, str] = {
    SIGNED: "accepts only app bundles signed by an entity of its --trusted-entities file; who is in that file decides",
    ANY: "runs whatever code the server's side submits, so nothing that this package promises holds against the server; "
    "start it with --trusted-entities FILE naming your own key",
    UNKNOWN: "cannot be told from here to accept signed app bundles only; look whether flower-supernode was started with "
    "--trusted-entities",
}
_PROGRAM = "flower-supernode"
_HOPS = 12
_PROC = Path("/proc")


def verdict(argv: list[str], home: Path | None = None) -> str:
    """Of one SuperNode, by its command line and the file that it names: `signed`, `any`, or `unknown`.

    Flower takes a file without a key for no file at all, and then checks nothing.

    Args:
        argv: Its command line.
        home: Its working directory, for a relative path; None where it cannot be told.
    """
    named = [argv[place + 1] for place, word in enumerate(argv[:-1]) if word == OPTION]
    named += [word.partition("=")[2] for word in argv if word.startswith(OPTION + "=")]
    if not named:
        return ANY
    path = Path(named[-1]).expanduser()
    if not path.is_absolute() and home is None:
        return UNKNOWN
    try:
        text = (path if home is None else home / path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return UNKNOWN
    return SIGNED if any(KEY in line.partition("#")[0] for line in text.splitlines()) else ANY


def _home(pid: int, proc: Path) -> Path | None:
    try:
        return (proc / str(pid) / "cwd").readlink()
    except OSError:
        return None


def of_this_process(proc: Path = _PROC) -> str:
    """Of the SuperNode that started this process: `signed`, `any`, or `unknown` where it is not found.

    Flower's helpers between the SuperNode and its app name their parent by `--parent-pid` where they are no child of it.
    """
    wanted, seen = [os.getpid()], set[int]()
    while wanted and len(seen) < _HOPS:
        pid = wanted.pop(0)
        if pid <= 1 or pid in seen:
            continue
        seen.add(pid)
        argv = _argv(pid, proc)
        if _is_supernode(argv):
            return verdict(argv, _home(pid, proc))
        wanted += _parents(pid, argv, proc)
    return UNKNOWN


def of_this_machine(proc: Path = _PROC) -> dict[int, str]:
    """Of every SuperNode that this user can see running, by process id."""
    pids = (int(entry.name) for entry in proc.glob("[0-9]*") if entry.name.isdecimal())
    found = ((pid, _argv(pid, proc)) for pid in pids)
    return {pid: verdict(argv, _home(pid, proc)) for pid, argv in sorted(found) if _is_supernode(argv)}


def _is_supernode(argv: list[str]) -> bool:
    """The program itself, or Python running its script; not a command line that only mentions it."""
    return any(Path(word).name == _PROGRAM for word in argv[:2])


def _argv(pid: int, proc: Path) -> list[str]:
    try:
        blob = (proc / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode(errors="replace") for part in blob.split(b"\0") if part]


def _parents(pid: int, argv: list[str], proc: Path) -> Iterator[int]:
    for place, word in enumerate(argv[:-1]):
        if word == "--parent-pid" and argv[place + 1].isdecimal():
            yield int(argv[place + 1])
    try:
        status = (proc / str(pid) / "status").read_text(errors="replace")
    except OSError:
        return
    for line in status.splitlines():
        if line.startswith("PPid:") and line.split()[1].isdecimal():
            yield int(line.split()[1])
