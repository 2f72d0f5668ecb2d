"""Imports point down only: the arrows of docs/architecture.md, walked by ast. Imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fed_dpprune"

# Anyone may import these; they import each other at most.
LEAVES = {
    "bundles",
    "config",
    "dotted",
    "errors",
    "places",
    "randomness",
    "records",
    "sparsity.support",
    "models.flat",
    "__init__",
}
# What a room may import besides itself and the leaves. A name stands for all that lies under it.
ARROWS: dict[str, set[str]] = {
    "comm": set(),
    "data": set(),
    "dpsgd": {"data.sampling"},  # the drop-in engine tosses the coins of the client
    "models": set(),
    "privacy": set(),
    "sparsity": set(),
    "console": set(),
    "estimate": set(),
    "plan": {"estimate", "comm", "privacy", "sparsity.prune", "sparsity.recipe", "sparsity.schedule"},
    # Figures read records and nothing else, so they stand below the run that draws its own curves.
    "study.figures": set(),
    "federation": {"plan", "comm", "data", "dpsgd", "models", "privacy", "sparsity", "study.figures"},
    "study": {"federation", "console", "plan", "estimate", "comm", "data", "dpsgd", "models", "privacy", "sparsity"},
    "starter": set(),
    "doctor": {"console", "data", "dpsgd", "privacy"},
    "node_file": {"doctor", "federation", "data", "privacy"},
    "cli": {
        "study",
        "node_file",
        "doctor",
        "starter",
        "federation",
        "console",
        "plan",
        "comm",
        "data",
        "dpsgd",
        "models",
        "privacy",
        "sparsity",
    },
}
# Third-party packages that only these rooms may name.
KEPT_TO: dict[str, set[str]] = {
    "flwr": {"federation"},
    "ray": {"federation"},
    "torch": {"data", "dpsgd", "federation", "models", "sparsity", "doctor"},
    "matplotlib": {"data", "study"},  # data: the picture of a partition, which is no figure of a run
    "rich": {"console", "study", "doctor", "cli"},
    "dp_accounting": {"privacy"},
    "opacus": {"dpsgd", "models", "privacy"},
}
LIGHT_LEAVES = {"__future__", "numpy", "pydantic", "pydantic_core", "tomli_w"}


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def _is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imported(text: str) -> set[str]:
    """Absolute dotted names of everything that a source file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                names.add("(relative)")
            else:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(text: str) -> set[str]:
    """Modules of the package, dotted below it; `__init__` for the package itself."""
    found = set()
    for name in imported(text):
        if name.split(".")[0] == "fed_dpprune":
            parts = name.split(".")[1:]
            while parts and not _is_module(".".join(parts)):
                parts.pop()
            found.add(".".join(parts) or "__init__")
    return found


def _covers(allowed: set[str], module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


def arrows_up(module: str, text: str) -> set[str]:
    """What a module imports and may not."""
    room = "study.figures" if module.startswith("study.figures") else module.split(".")[0]
    if module in LEAVES:
        return {name for name in ours(text) if name not in LEAVES}
    allowed = ARROWS[room] | LEAVES | {room}
    return {name for name in ours(text) if not _covers(allowed, name)}


MODULES = list(_modules())


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_a_module_imports_only_what_lies_below(module, path):
    assert arrows_up(module, path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_a_heavy_package_is_named_only_where_it_belongs(module, path):
    names = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    room = module.split(".")[0]
    assert "(relative)" not in imported(path.read_text(encoding="utf-8"))
    assert {package for package, rooms in KEPT_TO.items() if package in names and room not in rooms} == set()


@pytest.mark.parametrize("leaf", sorted(LEAVES - {"__init__"}))
def test_leaves_need_numpy_at_most(leaf):
    import sys

    text = PACKAGE.joinpath(*leaf.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    names = {name.split(".")[0] for name in imported(text)} - {"fed_dpprune"}
    assert names <= LIGHT_LEAVES | sys.stdlib_module_names


@pytest.mark.parametrize("side", ["server", "client"])
def test_entry_points_import_the_federation_alone(side):
    assert ours((ROOT / side / "app.py").read_text(encoding="utf-8")) == {"federation.apps"}


def test_every_room_has_its_arrows():
    rooms = {name.split(".")[0] for name, _ in MODULES} - {"__init__"}
    assert rooms - {leaf.split(".")[0] for leaf in LEAVES if "." not in leaf} == {name for name in ARROWS if "." not in name}


def test_the_walk_sees_upward_arrows_wherever_they_hide():
    for line in (
        "import fed_dpprune.federation.run",
        "from fed_dpprune import federation",
        "def f():\n    from fed_dpprune.plan import Plan",
    ):
        assert arrows_up("comm.meter", line)
    assert not arrows_up("comm.meter", "from fed_dpprune.sparsity.support import Support")
    assert arrows_up("records", "from fed_dpprune.comm import meter")


INITS = [path for path in sorted(PACKAGE.rglob("__init__.py")) if path.parent != PACKAGE]


@pytest.mark.parametrize("path", INITS, ids=lambda path: path.parent.relative_to(PACKAGE).as_posix())
def test_a_rooms_init_is_a_docstring_of_a_few_lines_and_nothing_else(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(body) == 1
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert 3 <= len(docstring.splitlines()) <= 8
    assert "ead first" in docstring


def test_every_room_has_an_init():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_room_is_a_junk_drawer():
    assert [name for name, _ in MODULES if {"utils", "util", "common", "base", "helpers", "misc"} & set(name.split("."))] == []
