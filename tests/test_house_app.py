"""The Flower app: thin entry points, the defaults of the quickstart, and a folder that Flower itself accepts."""

from __future__ import annotations

import ast
import io
import re
import tomllib
import zipfile
from pathlib import Path

import pytest

import fed_dpprune
from fed_dpprune import config as cfg
from fed_dpprune.errors import BadInput
from fed_dpprune.federation import export_app

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.toml"
SMALL = 'name = "small"\n[model]\nhidden = [16, 8]\n[privacy]\nnoise-multiplier = 1.5\n'


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("side", ["server", "client"])
def test_entry_points_are_one_import_and_one_assignment(side):
    text = (ROOT / side / "app.py").read_text(encoding="utf-8")
    docstring, imported, assigned = ast.parse(text).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(imported, ast.ImportFrom)
    assert isinstance(assigned, ast.Assign)
    assert ast.unparse(assigned) == f"app = make_{side}_app()"
    assert text == export_app.entry(side)
    assert (ROOT / side / "__init__.py").read_text(encoding="utf-8") == export_app.room(side)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flwr_run_in_a_checkout_has_the_quickstarts_values():
    from flwr.common.config import flatten_dict

    app = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    run_config = flatten_dict(app["config"])
    expected = cfg.to_run_config(cfg.load(QUICKSTART))
    assert run_config == expected
    assert {key: type(value) for key, value in run_config.items()} == {key: type(value) for key, value in expected.items()}
    assert app == tomllib.loads(export_app.app_tables(cfg.load(QUICKSTART)))["tool"]["flwr"]["app"]


def test_the_run_config_of_an_exported_app_is_the_config(tmp_path, config_file):
    from flwr.common.config import flatten_dict

    export_app.write(tmp_path / "app", config_file=config_file)
    project = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    run_config = flatten_dict(project["tool"]["flwr"]["app"]["config"])
    assert run_config == cfg.to_run_config(cfg.load(config_file))
    assert cfg.build(run_config) == cfg.load(config_file)
    assert project["project"]["dependencies"] == [f"fed-dpprune=={fed_dpprune.__version__}"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flower's own dependencies
def test_flower_accepts_the_exported_folder_and_bundles_these_files_alone(tmp_path, config_file):
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.config import validate_config

    folder = tmp_path / "app"
    written = export_app.write(folder, config_file=config_file)
    valid, errors, warnings = validate_config(tomllib.loads((folder / "pyproject.toml").read_text()), True, folder)
    assert (valid, errors, warnings) == (True, [], [])
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as bundle:
        names = {name for name in bundle.namelist() if not name.startswith(".info")}
    assert names == {path.relative_to(folder).as_posix() for path in written}


def test_an_exported_app_needs_no_checkout_path(tmp_path, config_file):
    written = export_app.write(tmp_path / "app", config_file=config_file)
    assert not any(str(ROOT) in path.read_text() for path in written)


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path, config_file, taken):
    target = tmp_path / "app"
    if taken == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not an empty folder"):
        export_app.write(target, config_file=config_file)
    assert [path.name for path in target.parent.rglob("*") if path.name != "small.toml"] in (["app"], ["app", "mine.txt"])


def test_an_empty_folder_is_taken(tmp_path, config_file):
    (tmp_path / "app").mkdir()
    assert len(export_app.write(tmp_path / "app", config_file=config_file)) == 6


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == fed_dpprune.__version__


def test_the_apps_name_fits_flowers_rule():
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,31}", export_app.APP_NAME)
