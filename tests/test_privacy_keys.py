"""docs/privacy.md says of every key of run-config, terms and node-config what it can touch and which guard stands there."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

from fed_dpprune import config
from fed_dpprune.federation import node
from fed_dpprune.federation.terms import RoundTerms

PAGE = (Path(__file__).parents[1] / "docs" / "privacy.md").read_text(encoding="utf-8")
PACKAGE = Path(__file__).parents[1] / "fed_dpprune"
KINDS = ("sensitivity", "budget", "data", "code", "failure", "nothing")
TABLES = {
    "Keys of the run-config": set(config.KEYS),
    "Fields of the terms": {field.name for field in fields(RoundTerms)},
    "Keys of the node-config": set(node.KEYS),
}


def rows(heading: str) -> list[tuple[list[str], str, str]]:
    """(keys, touches, guard) of each row under a heading."""
    section = PAGE.split(f"### {heading}\n")[1].split("\n#")[0]
    found = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", keys), touches.strip(), guard.strip()) for keys, touches, guard in found]


def covers(pattern: str, key: str) -> bool:
    """A whole table is written `table.*`; a row that names a key itself stands beside it."""
    return key == pattern or (pattern.endswith(".*") and key.startswith(pattern[:-1]))


ALL = [(heading, key) for heading, keys in TABLES.items() for key in sorted(keys)]


@pytest.mark.parametrize(("heading", "key"), ALL, ids=[f"{key}" for _, key in ALL])
def test_every_key_has_a_row_that_says_what_it_touches_and_who_guards_it(heading: str, key: str) -> None:
    named = [row for row in rows(heading) if any(covers(pattern, key) for pattern in row[0])]
    exact = [row for row in named if key in row[0]]
    assert len(named) >= 1, f"docs/privacy.md, {heading}: no row for {key}"
    assert len(exact) <= 1 and (exact or len(named) == 1), f"{key} has several rows"
    _, touches, guard = (exact or named)[0]
    assert any(kind in touches for kind in KINDS)
    assert len(guard) > 5


@pytest.mark.parametrize("heading", TABLES)
def test_no_row_speaks_of_a_key_that_is_gone(heading: str) -> None:
    later = {"accountant", "unit"} if heading == "Fields of the terms" else set()
    for keys, _, _ in rows(heading):
        for pattern in keys:
            assert pattern in later or any(covers(pattern, key) for key in TABLES[heading]), pattern


GUARDS = sorted(
    {
        word
        for heading in TABLES
        for _, _, guard in rows(heading)
        for word in re.findall(r"`([a-z_/]+(?:\.[A-Za-z_]+)+|[a-z_]+/[a-z_]+)`", guard)
    }
)


@pytest.mark.parametrize("guard", GUARDS)
def test_a_guard_that_is_named_is_there(guard: str) -> None:
    if guard.endswith(".py") or (PACKAGE / guard).is_dir():
        assert (PACKAGE / guard).exists() or list(PACKAGE.rglob(guard))
        return
    module, *names = guard.replace("/", ".").split(".")
    if (PACKAGE / module).is_dir():
        module, *names = f"{module}.{names[0]}", *names[1:]
    (path,) = list(PACKAGE.rglob(f"{module.replace('.', '/')}.py"))
    found = importlib.import_module("fed_dpprune." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for name in names:
        found = getattr(found, name, None) or getattr(getattr(found, "ClientRuntime"), name)  # noqa: B009
    assert callable(found)


def test_the_page_says_in_one_place_what_nothing_holds_without() -> None:
    assert PAGE.count("**Nothing on this page holds against the server's side unless") == 1
    assert "`flower-supernode --trusted-entities" in PAGE.split("## Who is trusted with what")[0]
