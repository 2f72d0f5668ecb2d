"""`node init` and `node check`: a node's file from its data, and everything looked through before it serves."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fed_dpprune import cli, doctor, node_file
from fed_dpprune.federation import node
from fed_dpprune.privacy.ledger import Ledger


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory of this user's alone, with a file of 1,347 rows of which 7 have a value that is not finite."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1347, 13)).astype("f4")
    x[:7, 3] = np.nan
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=rng.integers(0, 3, 1347))
    return tmp_path


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["node", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_a_file_made_from_data_is_what_flower_takes_and_passes_the_check(here, capsys):
    code, out, err = call(capsys, "init", "mine.npz", "-o", "node.toml")
    assert (code, err) == (0, "")
    assert "node check node.toml" in out
    from flwr.common.config import parse_config_args

    read = parse_config_args(["node.toml"])
    facts = node.read_node_config(read)
    assert set(read) == set(node.REQUIRED)
    assert (facts.nominal_size, facts.declared.classes, facts.declared.shape) == (1300, 3, (13,))
    assert Path(facts.data) == here / "mine.npz"
    assert facts.policy.delta == 1e-5 and facts.policy.delta <= 1 / (10 * facts.nominal_size)
    code, out, err = call(capsys, "check", "node.toml")
    assert (code, err) == (0, "")
    assert "1347 rows, 1340 fit, 7 do not" in out
    assert "the node may serve" in out
    assert not list(here.glob("ledger*"))


def test_the_file_says_what_becomes_public_and_holds_no_exact_count(here, capsys):
    _, text, _ = call(capsys, "init", "mine.npz")
    assert "become PUBLIC" in text and "rounded to the nearest" in text
    assert "1347" not in text and "1340" not in text
    assert tomllib.loads(text)["nominal-size"] == 1300
    for key in node.KEYS:
        assert key in text, key


def test_what_the_operator_names_is_what_the_file_holds(here, capsys):
    wishes = (
        "--partition-id 1 --num-partitions 4 --ledger l/x.sqlite --max-epsilon 2.5 --min-noise-multiplier 0.8 --delta 1e-6 "
        "--accountant rdp"
    )
    _, text, _ = call(capsys, "init", "digits", *wishes.split())
    facts = node.read_node_config(tomllib.loads(text))
    assert (facts.partition, facts.partitions, facts.ledger, facts.accountant) == (1, 4, here / "l" / "x.sqlite", "rdp")
    policy = facts.policy
    assert (policy.max_epsilon, policy.min_noise_multiplier, policy.delta) == (2.5, 0.8, 1e-6)


@given(count=st.integers(0, 10**7))
def test_a_rounded_size_has_two_digits_and_is_near(count):
    size = node_file.rounded(count)
    step = max(10, 10 ** (len(str(count)) - 2))
    assert size % step == 0 and size >= 10
    assert abs(size - count) <= step / 2 or (size == 10 and count < 10)


@given(size=st.integers(1, 10**9))
def test_a_proposed_delta_is_the_power_of_ten_below_a_tenth_of_the_inverse(size):
    delta = node_file.proposed_delta(size)
    assert delta <= 1 / (10 * size) * (1 + 1e-12) and 10 * delta * 10 * size >= 1 - 1e-12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mine.npz", "--max-epsilon", "inf"), "policy-max-epsilon"),
        (("mine.npz", "--max-epsilon", "0"), "policy-max-epsilon"),
        (("mine.npz", "--delta", "0.5"), "policy-delta"),
        (("mine.npz", "--accountant", "gdp"), "accountant"),
        (("mine.npz", "--partition-id", "3", "--num-partitions", "2"), "partition-id"),
        (("nowhere.npz",), "nowhere.npz"),
        (("nowhere",), "nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line_and_writes_nothing(here, capsys, arguments, words):
    code, out, err = call(capsys, "init", *arguments, "-o", "node.toml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err and err.startswith("fed-dpprune: ")
    assert not (here / "node.toml").exists()


def test_a_file_that_is_there_is_left_alone(here, capsys):
    (here / "node.toml").write_text("mine")
    code, _, err = call(capsys, "init", "mine.npz", "-o", "node.toml")
    assert code == 2 and "exists already" in err
    assert (here / "node.toml").read_text() == "mine"


def with_changes(here: Path, capsys, *changes: tuple[str, str]) -> tuple[int, str, str]:
    call(capsys, "init", "mine.npz", "-o", "node.toml")
    text = (here / "node.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (here / "node.toml").write_text(text)
    return call(capsys, "check", "node.toml")


CHANGES: dict[str, tuple[tuple[str, str], str]] = {
    "missing": (('accountant = "pld"\n', ""), "node-config accountant: is missing"),
    "text": (("policy-max-epsilon = 3.0", 'policy-max-epsilon = "3.0"'), "node-config policy-max-epsilon"),
    "misspelt": (("policy-max-epsilon", "policy-max-epsilom"), "did you mean 'policy-max-epsilon'"),
    "list": (("# allow-code = ", "allow-code = []  # "), "Flower's node-config cannot carry"),
    "data": (("mine.npz", "other.npz"), "other.npz"),
    "shape": (('shape = "13"', 'shape = "12"'), "no row fits"),
    "not TOML": (("nominal-size = 1300", "nominal-size = "), "is not TOML"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_wrong_is_named_and_ends_in_2(here, capsys, change):
    code, out, err = with_changes(here, capsys, CHANGES[change][0])
    assert code == 2
    assert CHANGES[change][1] in err and err.count("\n") == 1
    assert "may serve" not in out


def test_a_ledger_that_others_can_read_or_that_counts_otherwise_ends_in_2(here, capsys):
    call(capsys, "init", "mine.npz", "-o", "node.toml")
    facts = node.read_node_config(node_file.load(here / "node.toml"))
    node.open_ledger(facts).close()
    code, out, _ = call(capsys, "check", "node.toml")
    assert code == 0 and "the chain holds" in out
    facts.ledger.chmod(0o644)
    code, _, err = call(capsys, "check", "node.toml")
    assert code == 2 and str(facts.ledger) in err
    facts.ledger.chmod(0o600)
    code, _, err = with_changes_of(here, capsys, "policy-delta = 1e-05", "policy-delta = 1e-06")
    assert code == 2 and "counts at delta 1e-05" in err


def with_changes_of(here: Path, capsys, old: str, new: str) -> tuple[int, str, str]:
    path = here / "node.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return call(capsys, "check", "node.toml")


def test_a_ledger_that_is_gone_and_one_in_an_open_place_end_in_2(here, capsys):
    call(capsys, "init", "mine.npz", "-o", "node.toml")
    facts = node.read_node_config(node_file.load(here / "node.toml"))
    node.open_ledger(facts).close()
    facts.ledger.unlink()
    code, _, err = call(capsys, "check", "node.toml")
    assert code == 2 and "mark" in err
    (here / "open").mkdir()
    (here / "open").chmod(0o777)
    code, _, err = with_changes_of(here, capsys, f"{here}/ledger-0/", f"{here}/open/")
    assert code == 2 and "everybody can write it" in err
    code, _, err = with_changes_of(here, capsys, f"{here}/open/", f"{here}/open/a/b/")
    assert code == 2 and "everybody can write it" in err and str(here / "open") in err
    (here / "open").chmod(0o1777)  # in which a folder of one's own stays one's own
    assert call(capsys, "check", "node.toml")[0] == 0
    code, _, err = with_changes_of(here, capsys, f"{here}/open/a/b/", f"{here}/open/")
    assert code == 2 and "everybody can write it" in err


def test_a_ledger_to_be_made_below_a_folder_of_others_ends_in_2(here, capsys):
    call(capsys, "init", "mine.npz", "-o", "node.toml")
    (here / "open" / "mine").mkdir(parents=True, mode=0o700)
    (here / "open").chmod(0o777)  # the parent is this user's alone, and can be renamed by everybody
    code, _, err = with_changes_of(here, capsys, f"{here}/ledger-0/", f"{here}/open/mine/")
    assert code == 2 and "everybody can write it" in err


def test_data_that_others_can_change_are_a_warning(here, capsys):
    call(capsys, "init", "mine.npz", "-o", "node.toml")
    assert "others could change" not in call(capsys, "check", "node.toml")[1]
    (here / "mine.npz").chmod(0o666)
    code, out, err = call(capsys, "check", "node.toml")
    assert (code, err) == (0, "")
    assert f"others could change these data: {here / 'mine.npz'} has mode 666" in out and "may serve" in out


def test_a_picture_that_others_can_change_is_a_warning(here, capsys, monkeypatch):
    monkeypatch.setenv("FED_DPPRUNE_CACHE", str(here / "cache"))
    for name in ("cat", "dog"):
        (here / "set" / "train" / name).mkdir(parents=True)
        for number in range(5):
            Image.new("L", (3, 2), number).save(here / "set" / "train" / name / f"{number}.png")
    call(capsys, "init", "set", "-o", "node.toml")
    (here / "set" / "train" / "cat" / "none.png").symlink_to("nowhere.png")
    assert "others could change" not in call(capsys, "check", "node.toml")[1]
    (here / "set" / "train" / "dog" / "3.png").chmod(0o646)
    code, out, _ = call(capsys, "check", "node.toml")
    assert code == 0 and "3.png has mode 646" in out


def test_a_check_writes_nothing(here, capsys):
    call(capsys, "init", "mine.npz", "-o", "node.toml")
    before = sorted(os.listdir(here))
    call(capsys, "check", "node.toml")
    assert sorted(os.listdir(here)) == before


def test_versions_that_do_not_fit_end_in_2(here, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "misfits", lambda: ["torch 1.0: torch>=2.4 is needed"])
    call(capsys, "init", "mine.npz", "-o", "node.toml")
    code, out, err = call(capsys, "check", "node.toml")
    assert code == 2 and "torch 1.0" in err and "does not serve" in out


def test_a_node_that_shares_a_file_is_told_how_many_rows_are_its_own(here, capsys):
    call(capsys, "init", "mine.npz", "-o", "node.toml", "--num-partitions", "3", "--partition-id", "2")
    code, out, _ = call(capsys, "check", "node.toml")
    assert code == 0 and "partition 2's of 3" in out


@pytest.mark.parametrize("arguments", [("--help",), ("init", "--help"), ("check", "--help")])
def test_help_shows_examples(capsys, arguments):
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert "fed-dpprune node init" in out and "fed-dpprune node check" in out and "--trusted-entities" in out


def test_the_ledger_of_a_made_file_opens(here, capsys):
    call(capsys, "init", "mine.npz", "-o", "node.toml")
    facts = node.read_node_config(node_file.load(here / "node.toml"))
    node.open_ledger(facts).close()
    with Ledger.read(facts.ledger) as ledger:
        assert ledger.delta == 1e-5
