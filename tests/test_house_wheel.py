"""The wheel holds `fed_dpprune` alone, and all of it."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fed_dpprune"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    import uv  # comes with flwr

    out = tmp_path_factory.mktemp("wheel")
    command = [uv.find_uv_bin(), "build", "--wheel", "--quiet", "--out-dir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_top_level_is_the_package_alone(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fed_dpprune"}
    assert len(tops) == 2


def test_every_source_file_is_in_it(wheel):
    """Kernels in C++ too: they are compiled on the user's machine."""
    suffixes = {".py", ".cpp", ".h", ".typed"}
    sources = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.suffix in suffixes}
    assert sources - set(wheel.namelist()) == set()


def test_the_configs_are_in_it(wheel):
    """`export-app` and the presets work without a checkout."""
    configs = {f"fed_dpprune/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.toml")}
    assert "fed_dpprune/configs/quickstart.toml" in configs
    assert configs - set(wheel.namelist()) == set()


def test_licence_and_command_are_in_it(wheel):
    names = {name.split(".dist-info/")[-1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert b"Apache License" in wheel.read(names["licenses/LICENSE"])
    assert b"fed-dpprune = fed_dpprune.cli:main" in wheel.read(names["entry_points.txt"])


def test_nothing_left_over_from_work_is_in_it(wheel):
    assert [name for name in wheel.namelist() if "__pycache__" in name or name.endswith((".pyc", ".so", ".sqlite"))] == []
