"""The link model in a run: seconds from the measured messages, by client and round, beside computing and never in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_run

from fed_dpprune.comm.link import parse_link
from fed_dpprune.study.closing import closing

LINK = "4g,stragglers=0.5,slowdown=5"


def test_a_run_on_a_link_says_each_clients_seconds_and_waits_for_none(tmp_path: Path) -> None:
    conf = small_run.config(**{"wire.link": LINK, "federation.rounds": 2})
    outcome, _ = small_run.run(conf, tmp_path / "out")
    link = parse_link(LINK)
    assert link is not None and outcome.plan is not None
    slow = link.slowdowns(4, conf.seed)
    assert sorted(slow) == [1, 1, 5, 5]
    rows = small_run.clients(tmp_path / "out")
    for row in rows:
        seconds = link.seconds(row["message_down"], "down") + link.seconds(row["message_up"], "up")
        assert row["link_s"] == pytest.approx(seconds * slow[row["client"]], rel=1e-12)
    for line in small_run.rounds(tmp_path / "out"):
        assert line["link_s"] == max(row["link_s"] for row in rows if row["round"] == line["round"])
    time = small_run.summary(tmp_path / "out")["time"]
    assert time["link_s"] == sum(line["link_s"] for line in small_run.rounds(tmp_path / "out"))
    said = next(text for text in closing(outcome.summary, outcome.plan, conf, tmp_path / "out") if text.startswith("link"))
    assert f"{time['link_s']:.3g} s" in said and LINK in said


def test_a_link_changes_nothing_but_its_own_seconds(tmp_path: Path) -> None:
    for name, link in (("with", "nb-iot"), ("without", "")):
        small_run.run(small_run.config(**{"wire.link": link, "federation.rounds": 2}), tmp_path / name)
    assert small_run.result(tmp_path / "with") == small_run.result(tmp_path / "without")
    assert all(row["link_s"] is None for row in small_run.clients(tmp_path / "without"))
    assert small_run.summary(tmp_path / "without")["time"]["link_s"] is None
