"""docs/privacy.md says what the code does: every code, key and price that it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.policy import NODE_KEYS, REFUSAL_CODES

PAGE = (Path(__file__).parents[1] / "docs" / "privacy.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("word", [*REFUSAL_CODES, *NODE_KEYS, *table.ACCOUNTANTS, "gdp"])
def test_the_page_explains_every_code_key_and_accountant(word: str) -> None:
    assert f"`{word}`" in PAGE


def test_the_page_opens_with_who_ships_the_code() -> None:
    headings = [line for line in PAGE.splitlines() if line.startswith("#")]
    assert headings[1] == "## Who ships the code"
    assert {"## Who is trusted with what", "## Sharp edges", "## NIST SP 800-226, point by point"} <= set(headings)
