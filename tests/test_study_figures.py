"""Figures draw from records alone, name their units, and are the same to the byte."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fed_dpprune.records import ClientCounts, RoundRecord, append_lines, to_json
from fed_dpprune.study.figures import curves, style
from fed_dpprune.study.figures.table import FIGURES


def _records(rounds: int) -> list[RoundRecord]:
    return [
        RoundRecord(
            r, 0.1 + 0.8 * r / rounds, 1.0, 100, "ab", 0.5 * (r + 1), 40_000 - 100 * r, 50_000, 41_000, 51_000, ClientCounts()
        )
        for r in range(rounds)
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    append_lines(tmp_path / "rounds.jsonl", _records(12))
    summary = {"name": "small run", "privacy": {"delta": 1e-3}, "bytes": {"uplink": {"dense_float32": 2_000_000}}}
    (tmp_path / "summary.json").write_text(to_json(summary))
    return tmp_path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All words in the last picture drawn."""
    words: list[str] = []
    write = style.write

    def spy(figure, path):
        from matplotlib.text import Text

        words.extend(text.get_text() for text in figure.findobj(Text))
        write(figure, path)

    monkeypatch.setattr(style, "write", spy)
    return words


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_png_and_the_same_bytes_each_time(name, run_dir):
    FIGURES[name](run_dir, run_dir / "a.png")
    FIGURES[name](run_dir, run_dir / "b.png")
    first = (run_dir / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (run_dir / "b.png").read_bytes()


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_ignores_the_users_matplotlib_settings(name, run_dir):
    import matplotlib

    FIGURES[name](run_dir, run_dir / "a.png")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "lines.linewidth": 9}):
        FIGURES[name](run_dir, run_dir / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (run_dir / "a.png").read_bytes() == (run_dir / "b.png").read_bytes()


def test_curves_name_delta_units_and_the_dense_equivalent(run_dir, drawn):
    curves.draw(run_dir, run_dir / "curves.png")
    text = "\n".join(drawn)
    for words in ("delta = 0.001", "uplink payload so far, MB", "test accuracy", "epsilon, largest client", "round", "small run"):
        assert words in text
    sent = sum(record.bytes_up for record in _records(12))
    whole = sum(record.message_up for record in _records(12))
    assert f"float32: 2 MB\n(sent: {sent / 2_000_000:.1%} of it)\nwhole messages: {whole / 2_000_000:.1%}" in text


def test_the_last_values_are_written_out(run_dir, drawn):
    curves.draw(run_dir, run_dir / "curves.png")
    assert f"{_records(12)[-1].accuracy:.3f}" in drawn
    assert "6.00" in drawn


def test_records_in_memory_and_on_disk_give_the_same_curves(run_dir):
    in_memory = curves.from_records(_records(12), delta=1e-3, dense_bytes_up=2_000_000, name="small run")
    assert in_memory == curves.read(run_dir)


def test_bytes_add_up_over_rounds():
    got = curves.from_records(_records(3), delta=1e-3, dense_bytes_up=0)
    assert got.bytes_up == [40_000, 79_900, 119_700]


@pytest.mark.parametrize("rounds", [0, 1, 2, 200])
def test_runs_of_any_length_are_drawn(rounds, tmp_path):
    curves.draw(curves.from_records(_records(rounds), delta=1e-5, dense_bytes_up=10**6), tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_what_was_not_measured_is_left_out_of_the_line(tmp_path):
    lines = [to_json({**asdict(record), "accuracy": math.nan, "epsilon_max": math.inf}) for record in _records(4)]
    (tmp_path / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    curves.draw(tmp_path, tmp_path / "c.png")
    assert all(math.isnan(value) for value in curves.read(tmp_path).accuracy)
    assert (tmp_path / "c.png").exists()


def test_time_leaves_no_trace_in_the_picture(tmp_path):
    slow = [replace(record, wall_s=99.0) for record in _records(5)]
    for name, records in (("a", _records(5)), ("b", slow)):
        curves.draw(curves.from_records(records, delta=1e-5, dense_bytes_up=10**6), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("largest", "unit"), [(12, "bytes"), (4_000, "kB"), (1.4e6, "MB"), (3e9, "GB")])
def test_byte_axes_use_the_unit_that_keeps_numbers_short(largest, unit):
    divisor, chosen = style.byte_scale(largest)
    assert chosen == unit
    assert 1 <= largest / divisor < 1000
