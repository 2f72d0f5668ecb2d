"""Whose code a SuperNode runs, read from command lines: signed, any, or honestly unknown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fed_dpprune import bundles

ANY = ["/venv/bin/python", "/venv/bin/flower-supernode", "--superlink", "x:1"]
KEYS = "fpk_1: 'ssh-ed25519 AAAA me'\n"


def processes(root: Path, table: dict[int, tuple[int, list[str]]]) -> Path:
    """A made-up /proc: process id -> (parent, command line)."""
    for pid, (parent, argv) in table.items():
        (root / str(pid)).mkdir()
        (root / str(pid) / "cmdline").write_bytes(b"\0".join(word.encode() for word in argv) + b"\0")
        (root / str(pid) / "cwd").symlink_to(root)
        (root / str(pid) / "status").write_text(f"Name:\tx\nPPid:\t{parent}\n")
    return root


@pytest.mark.parametrize(
    ("options", "text", "word"),
    [
        (["--trusted-entities", "keys.yaml"], KEYS, "signed"),
        (["--trusted-entities=keys.yaml", "--insecure"], KEYS, "signed"),
        ([], KEYS, "any"),
        (["--insecure"], KEYS, "any"),
        (["--trusted-entities", "keys.yaml"], "{}\n", "any"),
        (["--trusted-entities", "keys.yaml"], "", "any"),
        (["--trusted-entities", "keys.yaml"], f"# {KEYS}", "any"),
        (["--trusted-entities", "gone.yaml"], KEYS, "unknown"),
    ],
    ids=str,
)
def test_the_option_of_the_supernode_above_decides(tmp_path, options, text, word):
    (tmp_path / "keys.yaml").write_text(text)
    argv = [*ANY, *options]
    table = {
        os.getpid(): (70, ["python", "flwr-clientapp", "--token", "t"]),
        70: (60, ["python", "flower-superexec", "--parent-pid", "50"]),
        60: (1, ["sh"]),
        50: (1, argv),
    }
    assert bundles.of_this_process(processes(tmp_path, table)) == word


@pytest.mark.parametrize(
    "argv", [["bash"], ["vi", "notes", "flower-supernode"], ["flower-supernodes"], ["sh", "-c", "flower-supernode --x"]]
)
def test_without_a_supernode_above_nothing_is_claimed(tmp_path, argv):
    table = {os.getpid(): (70, ["python", "app"]), 70: (70, argv)}
    assert bundles.of_this_process(processes(tmp_path, table)) == "unknown"
    assert bundles.of_this_process(tmp_path / "nowhere") == "unknown"


def test_every_supernode_of_the_machine_is_listed_and_no_other_process(tmp_path):
    (tmp_path / "keys.yaml").write_text(KEYS)
    table = {
        7: (1, [*ANY, "--trusted-entities", str(tmp_path / "keys.yaml")]),
        8: (1, ["flower-supernode"]),
        9: (1, ["flower-superlink"]),
        10: (1, []),
    }
    assert bundles.of_this_machine(processes(tmp_path, table)) == {7: "signed", 8: "any"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_real_process_is_seen(tmp_path):
    script = tmp_path / "flower-supernode"
    script.write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "keys.yaml").write_text(KEYS)
    started = subprocess.Popen([sys.executable, str(script), "--trusted-entities", "keys.yaml"], cwd=tmp_path)
    try:
        assert bundles.of_this_machine()[started.pid] == "signed"
    finally:
        started.kill()
        started.wait()
