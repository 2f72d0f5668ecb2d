"""A checkpoint that another version wrote is refused in one line, not by a KeyError."""

from __future__ import annotations

import json

import pytest

from fed_dpprune import cli


@pytest.mark.parametrize("part", ["broadcast", "meter", "steps"])
def test_a_checkpoint_with_another_state_is_refused_by_name(tmp_path, capfd, part):
    config, out = tmp_path / "small.toml", tmp_path / "run"
    config.write_text(
        "[privacy]\nnoise-multiplier = 2.0\ndelta = 1e-3\n[federation]\nclients = 2\nrounds = 1\n[model]\nhidden = [4]\n"
    )
    assert cli.main(["run", str(config), "--backend", "inline", "--out", str(out)]) == 0
    state = out / "checkpoint" / "state.json"
    head = json.loads(state.read_text())
    del head["state"][part]
    state.write_text(json.dumps(head))
    capfd.readouterr()
    code = cli.main(["run", str(config), "--backend", "inline", "--out", str(out), "--resume"])
    assert code == 2
    assert "was written by another version" in capfd.readouterr().err
