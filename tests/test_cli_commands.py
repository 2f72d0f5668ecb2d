"""The commands in one process: exit codes, one line for each mistake, and nothing written for it."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import small_run

from fed_dpprune import cli
from fed_dpprune import config as cfg

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with one config, `small.toml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(cfg.to_toml(small_run.config(**{"federation.rounds": 2})))
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def refused(capsys, *arguments: str, code: int = 2) -> str:
    """The one line on stderr of a command that ends with `code`."""
    before = names(Path.cwd())
    try:
        got = cli.main(list(arguments))
    except SystemExit as stop:
        got = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert got == code
    assert out == ""
    assert err.startswith("fed-dpprune: ")
    assert err.count("\n") == 1
    assert names(Path.cwd()) == before
    return err


MISTAKES = {
    "unknown key": (["federation.round=5"], "'federation.rounds'"),
    "wrong type": (["federation.rounds=many"], "federation.rounds"),
    "impossible value": (["sparsity.freeze.rate=1.0"], "sparsity.freeze.rate"),
    "both": (["privacy.epsilon=4"], "set exactly one of the two"),
    "neither": (['privacy.noise-multiplier=""'], "neither is set"),
    "delta": (["privacy.delta=0.01"], "not below 1/N of client"),
    "batch": (["privacy.expected-batch=338"], "larger than every client"),
    "too many asked": (["federation.clients-per-round=5"], "more than federation.clients = 4"),
    "too many clients": (["federation.clients=5000"], "federation.clients"),
    "no data": (["data.dataset=nowhere"], "data.dataset"),
    "no file": (["data.dataset=nowhere.npz"], "nowhere.npz"),
    "no net": (["model.name=nowhere"], "model.name"),
    "not key=value": (["rounds"], "is not key=value"),
}


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_mistake_is_one_line_with_exit_2_and_nothing_written(here, capsys, command, case):
    pairs, text = MISTAKES[case]
    overrides = [word for pair in pairs for word in ("--set", pair)]
    assert text in refused(capsys, command, "small.toml", *overrides)


def test_pruning_that_cuts_the_net_is_refused_before_anything_is_written(here, capsys):
    """Only scoring can tell; it is done before the run directory is made."""
    pairs = ["sparsity.granularity=layer", "sparsity.prune.rate=0.9"]
    arguments = [word for pair in pairs for word in ("--set", pair)]
    code = cli.main(["run", "small.toml", *arguments])
    assert code == 2
    assert names(here) == ["small.toml"]
    assert "sparsity.prune.rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["run"], "CONFIG"),
        (["run", "small.toml", "--backend", "cloud"], "cloud"),
        (["run", "small.toml", "--resume", "--force"], "contradict"),
        (["run", "nowhere.toml"], "no such config file"),
        (["run", "small.toml", "--resume"], "holds no run to resume"),
        (["run", "small.toml", "--out", "small.toml"], "is a file"),
        (["run", "small.toml", "--out", "small.toml/x"], "cannot be made"),
        (["ledger", "nowhere.sqlite"], "no such ledger"),
        (["ledger", "small.toml"], "small.toml"),
        (["compare", "nowhere", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_are_one_line_with_exit_2(here, capsys, arguments, text):
    assert text in refused(capsys, *arguments)


def test_init_writes_a_config_that_plans(here, capsys):
    assert cli.main(["init", "my.toml"]) == 0
    assert cli.main(["plan", "my.toml", "--set", "federation.rounds=1"]) == 0
    assert "noise" in capsys.readouterr().out


def test_init_does_not_overwrite(here, capsys):
    assert "exists already" in refused(capsys, "init", "small.toml")


def test_init_into_nowhere_is_refused(here, capsys):
    assert "cannot be written" in refused(capsys, "init", "nowhere/my.toml")


def test_init_without_a_file_prints_the_config(here, capsys):
    assert cli.main(["init"]) == 0
    (here / "printed.toml").write_text(capsys.readouterr().out)
    cfg.load(here / "printed.toml")


# --- run ------------------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_summary_and_the_paths(here, capfd):
    assert cli.main(["run", "small.toml", "--out", "runs/a"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "complete after 2 of 2 rounds" in out
    assert "wrote      runs/a/" in out
    for name in ("summary.json", "rounds.jsonl", "clients.jsonl", "ledger.sqlite", "model.safetensors", "curves.png", "log.txt"):
        assert name in out
        assert (here / "runs" / "a" / name).exists()
    made = small_run.summary(here / "runs" / "a")
    assert f"{made['accuracy']['last']:.4f}" in out
    assert f"epsilon {made['privacy']['epsilon_max']:.3f}"[:10] in out
    assert "adding up one round at a time would have said" in out


def test_a_run_on_a_filled_folder_is_refused(here, capsys):
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("...")
    assert "is not empty" in refused(capsys, "run", "small.toml", "--out", "mine")


def test_force_replaces_a_run_and_nothing_else(here, capfd):
    arguments = ["run", "small.toml", "--out", "a"]
    assert cli.main(arguments) == 0
    (here / "a" / "left.txt").write_text("mine")
    assert cli.main([*arguments, "--force"]) == 2
    assert "'left.txt'" in capfd.readouterr().err
    assert (here / "a" / "summary.json").exists()
    (here / "a" / "left.txt").unlink()
    assert cli.main([*arguments, "--force", "--set", "seed=9"]) == 0
    assert small_run.summary(here / "a")["seed"] == 9
    assert len(small_run.rounds(here / "a")) == 2


def test_a_second_run_without_out_gets_a_folder_of_its_own(here, capfd):
    for _ in range(2):
        assert cli.main(["run", "small.toml"]) == 0
    assert {p.name for p in (here / "runs").iterdir()} == {"small", "small-2"}
    assert cli.main(["run", "small.toml", "--resume"]) == 0
    assert {p.name for p in (here / "runs").iterdir()} == {"small", "small-2"}


def test_a_resumed_run_under_another_config_is_refused(here, capsys):
    assert cli.main(["run", "small.toml", "--out", "a"]) == 0
    capsys.readouterr()
    text = refused(capsys, "run", "small.toml", "--out", "a", "--resume", "--set", "seed=9")
    assert "another seed" in text


def test_a_budget_that_ends_a_run_is_exit_3_with_one_line(here, capfd):
    assert cli.main(["run", "small.toml", "--out", "a", "--set", "policy.max-epsilon=1.5"]) == 3
    out, err = capfd.readouterr()
    assert err.startswith("fed-dpprune: round 2: 0 of 4 clients answered")
    assert err.count("\n") == 1
    assert "stopped after 1 of 2 rounds" in out
    assert small_run.summary(here / "a")["status"] == "stopped"


def test_a_failure_is_exit_1_with_one_line_and_a_traceback_in_the_log(here, capfd, monkeypatch):
    from fed_dpprune.federation import aggregate

    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's own, which no user has
    monkeypatch.setattr(aggregate.ServerOptimizer, "step", lambda *a: 1 / 0)
    assert cli.main(["run", "small.toml", "--out", "a"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("fed-dpprune: ")
    assert err.count("\n") == 1
    assert "log.txt" in err
    assert "ZeroDivisionError" in (here / "a" / "log.txt").read_text()


def test_debug_shows_the_traceback(here, monkeypatch):
    from fed_dpprune.federation import aggregate

    monkeypatch.setattr(aggregate.ServerOptimizer, "step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "small.toml", "--out", "a", "--debug"])
    assert small_run.summary(here / "a")["status"] == "failed"


def test_a_warning_of_the_plan_is_shown(here, capfd):
    pairs = ["data.partition=dirichlet", "data.alpha=0.3", "privacy.expected-batch=300"]
    arguments = [word for pair in pairs for word in ("--set", pair)]
    assert cli.main(["run", "small.toml", "--out", "a", *arguments]) == 0
    assert "have fewer examples than privacy.expected-batch" in capfd.readouterr().out


def test_a_mistake_in_a_process_of_its_own_is_one_line_too(here):
    done = subprocess.run(
        [sys.executable, "-m", "fed_dpprune.cli", "run", "small.toml", "--set", "privacy.delta=0.5", "--out", "a"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fed-dpprune: privacy.delta: ")
    assert done.stderr.count("\n") == 1
    assert names(here) == ["small.toml"]
