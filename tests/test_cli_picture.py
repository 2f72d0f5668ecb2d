"""`plan --picture`: how the clients share the labels."""

from __future__ import annotations

from fed_dpprune import cli


def test_plan_draws_the_partition_on_request(tmp_path, capsys):
    config = tmp_path / "small.toml"
    config.write_text('[privacy]\nnoise-multiplier = 2.0\ndelta = 1e-3\n[data]\npartition = "dirichlet"\n')
    assert cli.main(["plan", str(config), "--json", "--picture", str(tmp_path / "parts.png")]) == 0
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("{")
