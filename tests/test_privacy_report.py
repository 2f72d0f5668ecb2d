"""What is said about an epsilon: the ledger's report, the statement beside a figure, the price for a group."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fed_dpprune.errors import LedgerError
from fed_dpprune.privacy import statement
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.ledger import Ledger
from fed_dpprune.privacy.report import ledger_report, ledger_text, recompute

DELTA, ENTRY = 1e-3, Entry(2.7, 0.5, 2)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "ledger.sqlite"
    with Ledger.create(file, "run", mode="simulation", delta=DELTA, accountant="rdp") as ledger:
        for number in (1, 2, 3):
            for client in ("0", "1", "10", "2"):
                if client != "2" or number < 3:
                    name = hashlib.sha256(f"{client} {number}".encode()).hexdigest()
                    ledger.charge(client, name, "the run", number, [ENTRY], rounds=20, max_epsilon=5.0)
        ledger.charge("1", "ab" * 16, "another", 1, [Entry(4.0, 0.25, 1)], max_epsilon=5.0)
    return file


def test_the_report_has_what_the_contract_names(path: Path) -> None:
    report = ledger_report(path)
    assert list(report["clients"]) == ["0", "1", "2", "10"]
    first = report["clients"]["0"]
    assert first["epsilon"] == table.epsilon([Entry(2.7, 0.5, 6)], DELTA, "rdp")
    assert (first["delta"], first["accountant"]) == (DELTA, table.version("rdp"))
    assert first["left"] == 5.0 - first["epsilon"]
    assert [(run["run"], run["rounds"], run["steps"]) for run in report["clients"]["1"]["runs"]] == [
        ("the run", 3, 6),
        ("another", 1, 1),
    ]
    assert report["chain"]["charges"] == 12 and report["chain"]["verified"] is True
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_figures_follow_from_the_entries(path: Path) -> None:
    report = ledger_report(path)
    recompute(report)
    report["clients"]["2"]["epsilon"] *= 0.9
    with pytest.raises(LedgerError, match="client 2"):
        recompute(report)


def test_the_text_says_who_spent_what_and_under_which_conditions(path: Path) -> None:
    text = ledger_text(ledger_report(path))
    for part in (
        "client 10: epsilon",
        "at delta 0.001",
        "left of 5",
        "run another: 1 round, 1 step",
        "filter",
        "poisson",
        "dp-accounting",
    ):
        assert part in text
    assert "12 charges" in text


def test_an_empty_ledger_says_so(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "l.sqlite", "run", mode="simulation", delta=DELTA).close()
    assert "nothing has been charged" in ledger_text(ledger_report(tmp_path / "l.sqlite"))


def test_a_damaged_ledger_reports_nothing(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(LedgerError):
        ledger_report(path)


def test_the_report_is_read_while_a_run_writes_and_leaves_nothing_behind(path: Path) -> None:
    with Ledger.open(path, "run", mode="simulation", accountant="rdp") as ledger:
        ledger.charge("0", "cd" * 16, "the run", 4, [ENTRY], rounds=20)
        assert ledger_report(path)["chain"]["charges"] == 13
    assert ledger_report(path)["chain"]["charges"] == 13
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_report_loads_nothing_heavy(path: Path) -> None:
    probe = (
        "import sys; from pathlib import Path; from fed_dpprune.privacy.report import ledger_report, ledger_text; "
        "ledger_text(ledger_report(Path(sys.argv[1]))); "
        "print({'torch', 'dp_accounting', 'opacus', 'scipy', 'flwr', 'ray'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", probe, str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert answer.stdout.strip() == "set()"


def test_a_statement_carries_every_condition() -> None:
    text = statement.statement(
        1.5, 1e-5, accountant="pld", noise_source="os-entropy", second=("rdp", 1.7), side_releases=("training-loss",)
    )
    for part in (
        "epsilon 1.500",
        "delta 1e-05",
        "adding or removing one example of one client",
        "poisson",
        "pld (dp-accounting",
        "rdp says 1.700",
        "the server",
        "training-loss",
    ):
        assert part in text
    assert "simulation" not in text


def test_a_simulation_says_that_its_noise_protects_nothing() -> None:
    assert "nothing is protected" in statement.statement(1.5, 1e-5, accountant="pld", noise_source="seeded-simulation")


def test_adding_up_rounds_says_much_more_than_composing_them() -> None:
    true = table.epsilon([Entry(2.7, 0.5, 40)], DELTA, "rdp")
    naive = statement.naive_sum([ENTRY], 20, DELTA, "rdp")
    assert naive == 20 * table.epsilon([ENTRY], DELTA / 20, "rdp") > 2 * true
    assert f"{naive:.3f}" in statement.naive_line(true, [ENTRY], 20, DELTA, "rdp")


# Exact values for adding or removing k examples: privacy loss distribution of the binomial Gaussian mixture.
@pytest.mark.parametrize(("people", "epsilon"), [(1, 1.829), (2, 3.979), (5, 11.64), (10, 27.9)])
def test_group_prices_have_the_known_values(people: int, epsilon: float) -> None:
    assert statement.group_price([Entry(1.0, 0.01, 1000)], people, 1e-5) == pytest.approx(epsilon, abs=0.02)


@pytest.mark.slow
def test_the_group_price_of_fifty_has_the_known_value() -> None:
    assert statement.group_price([Entry(1.0, 0.01, 1000)], 50, 1e-5) == pytest.approx(291, rel=1e-2)


def test_a_group_pays_more_than_its_size_under_the_fallback_bound_too() -> None:
    history = [Entry(4.0, 0.1, 20)]
    one = table.epsilon(history, DELTA, "rdp")
    bound = statement.group_price(history, 3, DELTA, "rdp")
    assert bound >= statement.group_price(history, 3, DELTA, "pld") > one
    assert statement.group_price([Entry(4.0, 1.0, 20)], 3, DELTA, "rdp") == table.epsilon([Entry(4.0 / 3, 1.0, 20)], DELTA, "rdp")


def test_a_group_has_at_least_one_example() -> None:
    with pytest.raises(ValueError, match="at least one"):
        statement.group_price([ENTRY], 0, DELTA)
    assert statement.group_price([], 5, DELTA) == 0.0


def test_every_place_that_shows_an_epsilon_says_under_which_conditions_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger's text, `compare`, and the picture of a run; plan and run print `statement`, tested above."""
    from fed_dpprune.console import Screen
    from fed_dpprune.study.compare import print_table, read_runs
    from fed_dpprune.study.figures import curves, style
    from tests import small_run

    small_run.run(small_run.config(**{"federation.rounds": 1}), tmp_path)
    drawn: list[str] = []
    monkeypatch.setattr(style, "write", lambda figure, path: drawn.append(figure.get_supxlabel()))
    curves.draw(tmp_path, tmp_path / "x.png")
    shown = io.StringIO()
    print_table(read_runs([tmp_path]), Screen(shown, shown))
    ledger = ledger_text(ledger_report(tmp_path / "ledger.sqlite"))
    for text in (drawn[0], shown.getvalue(), ledger):
        words = " ".join(text.split())
        assert all(
            word in words for word in ("one example", "poisson sampling", table.version("rdp"), f"against {statement.ADVERSARY}")
        )
