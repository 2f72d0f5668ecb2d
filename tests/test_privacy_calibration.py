"""Calibration meets its target with the accountant that checks it, tightly, in few calls, and remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fed_dpprune.errors import ConfigError
from fed_dpprune.privacy import calibration
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.cache import Figures
from fed_dpprune.privacy.history import Entry

CASES = [(4.0, 1e-3, 0.5, 40), (2.0, 1e-5, 0.0427, 200), (1.0, 1e-6, 1.0, 10), (20.0, 1e-5, 0.2, 5)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "_memory", {})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    real = table.compute

    def spy(*values: Any) -> Any:
        seen.append(values)
        return real(*values)

    monkeypatch.setattr(table, "compute", spy)
    return seen


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_noise_meets_the_target_and_a_little_less_does_not(case: Any, accountant: str, calls: list[Any]) -> None:
    epsilon, delta, rate, steps = case
    noise = calibration.noise_multiplier(epsilon, delta, rate, steps, accountant)
    assert len(calls) <= 10
    assert table.epsilon([Entry(noise, rate, steps)], delta, accountant) <= epsilon
    assert table.epsilon([Entry(noise * (1 - 3e-4), rate, steps)], delta, accountant) > epsilon


def test_known_noise_multipliers() -> None:
    assert calibration.noise_multiplier(3.0, 1e-5, 0.01, 1000, "pld") == pytest.approx(0.81368, rel=3e-4)
    assert calibration.noise_multiplier(3.0, 1e-5, 0.01, 1000, "rdp") == pytest.approx(0.86461, rel=3e-4)
    assert calibration.noise_multiplier(0.5, 1e-5, 0.01, 1000, "pld") == pytest.approx(2.38225, rel=3e-4)
    assert calibration.max_steps(3.0, 1e-5, 0.01, 1.0, "rdp") == pytest.approx(2195, abs=1)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_most_steps_fit_and_one_more_does_not(accountant: str) -> None:
    count = calibration.max_steps(2.0, 1e-4, 0.1, 1.5, accountant)
    assert table.epsilon([Entry(1.5, 0.1, count)], 1e-4, accountant) <= 2.0
    assert table.epsilon([Entry(1.5, 0.1, count + 1)], 1e-4, accountant) > 2.0


def test_the_three_quantities_agree_with_one_another() -> None:
    noise = calibration.noise_multiplier(2.0, 1e-4, 0.1, 60)
    assert calibration.max_steps(2.0, 1e-4, 0.1, noise) == 60
    assert table.epsilon([Entry(noise, 0.1, 60)], 1e-4) == pytest.approx(2.0, rel=3e-4)


def test_steps_come_in_whole_rounds_after_what_is_spent_already() -> None:
    spent = (Entry(1.5, 0.1, 20),)
    count = calibration.max_steps(2.0, 1e-4, 0.1, 1.5, multiple=4, spent=spent)
    assert count % 4 == 0 and 0 < count <= calibration.max_steps(2.0, 1e-4, 0.1, 1.5) - 20
    assert calibration.max_steps(0.1, 1e-4, 0.1, 1.5, multiple=4, spent=spent) == 0


def test_a_second_calibration_asks_no_accountant(calls: list[Any]) -> None:
    first = calibration.noise_multiplier(4.0, 1e-3, 0.5, 40)
    asked = len(calls)
    table._memory.clear()
    assert calibration.noise_multiplier(4.0, 1e-3, 0.5, 40) == first
    assert len(calls) == asked


def test_any_other_input_is_calibrated_anew() -> None:
    figures = {
        calibration.noise_multiplier(*values)
        for values in [
            (4.0, 1e-3, 0.5, 40, "rdp"),
            (4.1, 1e-3, 0.5, 40, "rdp"),
            (4.0, 1e-4, 0.5, 40, "rdp"),
            (4.0, 1e-3, 0.4, 40, "rdp"),
            (4.0, 1e-3, 0.5, 41, "rdp"),
            (4.0, 1e-3, 0.5, 40, "pld"),
        ]
    }
    assert len(figures) == 6


def test_a_target_below_the_accountants_floor_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"no noise reaches 1e-06"):
        calibration.noise_multiplier(1e-6, 1e-5, 0.5, 1000, "rdp")


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_target_is_refused(epsilon: float) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.epsilon"):
        calibration.noise_multiplier(epsilon, 1e-5, 0.5, 10)


def test_a_large_target_needs_no_large_grid() -> None:
    noise = calibration.noise_multiplier(3e5, 1e-5, 1.0, 4)
    assert 0 < noise < 0.02
    assert table.epsilon([Entry(noise, 1.0, 4)], 1e-5) <= 3e5


# --- the cache ---------------------------------------------------------------------------------------------------------


def _file(directory: Path) -> Path:
    (file,) = directory.glob("*.json")
    return file


def test_figures_come_back_to_the_last_bit(tmp_path: Path) -> None:
    Figures(tmp_path / "c").add("family", {"a": 0.1 + 0.2, "b": 1e-17})
    assert Figures(tmp_path / "c").read("family") == {"a": 0.1 + 0.2, "b": 1e-17}
    assert Figures(tmp_path / "c").read("another") == {}


@pytest.mark.parametrize(
    "damage", ["{", "", "[]", "null", '{"family": "family", "values": {"a": 0.0}, "checksum": "0"}', "\udcff"]
)
def test_a_damaged_file_is_ignored_and_repaired(tmp_path: Path, damage: str) -> None:
    figures = Figures(tmp_path / "c")
    figures.add("family", {"a": 3.5})
    _file(tmp_path / "c").write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert figures.read("family") == {}
    figures.add("family", {"a": 3.5})
    assert figures.read("family") == {"a": 3.5}


def test_a_figure_made_smaller_in_the_file_is_ignored(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "c")
    figures.add("family", {"a": 3.5})
    file = _file(tmp_path / "c")
    file.write_text(file.read_text().replace("3.5", "0.5"))
    assert figures.read("family") == {}


def test_what_others_may_write_is_not_read(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "c")
    figures.add("family", {"a": 3.5})
    (tmp_path / "c").chmod(0o777)
    assert figures.read("family") == {}
    (tmp_path / "c").chmod(0o700)
    _file(tmp_path / "c").chmod(0o666)
    assert figures.read("family") == {}


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(blocked))
    assert table.epsilon([Entry(1.0, 0.01, 100)], 1e-5) == pytest.approx(0.718, abs=2e-3)
    assert blocked.read_text() == "in the way"


def test_figures_without_a_finite_value_are_not_kept(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "c")
    figures.add("family", {"a": float("inf"), "b": 1.0})
    assert figures.read("family") == {"b": 1.0}


def test_two_writers_leave_a_whole_file(tmp_path: Path) -> None:
    first, second = Figures(tmp_path / "c"), Figures(tmp_path / "c")
    first.add("family", {"a": 1.0})
    second.add("family", {"b": 2.0})
    assert first.read("family") == {"a": 1.0, "b": 2.0}
    assert [path.name for path in (tmp_path / "c").iterdir()] == [_file(tmp_path / "c").name]
