"""docs/wire.md says what the code does: every codec, refusal code and link profile, with the code's own figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from fed_dpprune.comm.codecs.table import NAMES, SCALED, codec
from fed_dpprune.comm.link import PROFILES
from fed_dpprune.comm.validate import CODES

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "wire.md").read_text(encoding="utf-8")
ROWS = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if "|" in line}


@pytest.mark.parametrize("name", NAMES)
def test_each_codec_has_a_row_and_its_measured_payload(name):
    assert f"| {codec(name).size(1_000_000):,} |" in TEXT
    assert any(line.startswith(f"| {name} |") for line in TEXT.splitlines())


@pytest.mark.parametrize("name", ["level3", "level2"])
def test_the_levels_are_those_of_the_code(name):
    for number in (*SCALED[name].levels, *SCALED[name].thresholds):
        assert f"{number:.8f}" in TEXT


@pytest.mark.parametrize("code", CODES)
def test_each_refusal_code_is_explained(code):
    assert code in ROWS


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_each_link_profile_has_its_figures(name):
    _, up, down, latency, loss, _ = ROWS[name]
    link = PROFILES[name]
    assert (float(up), float(down)) == (link.up / 1e6, link.down / 1e6)
    seconds = float(latency.split()[0]) * (1e-3 if latency.endswith("ms") else 1)
    assert seconds == pytest.approx(link.latency)
    assert float(loss.rstrip("%")) / 100 == pytest.approx(link.loss)
