"""A run's outputs: the contract's keys, every epsilon recomputed by dp-accounting, and who was trained on."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import numpy as np
import pytest
import small_run

from fed_dpprune import cli
from fed_dpprune import config as cfg
from fed_dpprune.data import registry as datasets
from fed_dpprune.federation.facts import gather

UNEVEN = {"data.partition": "dirichlet", "data.alpha": 1.0, "federation.clients-per-round": 3, "federation.rounds": 5}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(config, run directory, outcome) of a run with uneven clients, some asked per round, and its picture."""
    conf = small_run.config(**UNEVEN)
    out = tmp_path_factory.mktemp("done") / "out"
    outcome, _ = small_run.run(conf, out, picture=True)
    assert outcome.status == "complete"
    return conf, out, outcome


def test_every_file_and_key_of_the_contract_is_there(done):
    small_run.assert_contract(done[1])


def test_the_summary_that_is_written_is_the_one_that_is_returned(done):
    assert small_run.summary(done[1]) == json.loads(json.dumps(done[2].summary))


def test_a_run_draws_its_picture(done):
    assert (done[1] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_resolved_config_reads_back_as_the_config(done):
    conf, out, _ = done
    assert cfg.build(cfg.flatten(tomllib.loads((out / "config.toml").read_text()))) == conf


def test_accuracy_without_a_word_is_the_last_rounds(done):
    rows, made = small_run.rounds(done[1]), small_run.summary(done[1])
    assert made["accuracy"]["last"] == rows[-1]["accuracy"]
    best = max(rows, key=lambda row: row["accuracy"])
    assert (made["accuracy"]["best"], made["accuracy"]["best_round"]) == (best["accuracy"], best["round"])
    assert made["loss"]["last"] == rows[-1]["loss"]


def test_epsilon_is_cumulative_by_client(done):
    rows, made = small_run.clients(done[1]), small_run.summary(done[1])
    for client in range(4):
        mine = [row for row in rows if row["client"] == client]
        values = [row["epsilon"] for row in mine]
        assert values == sorted(values)
        assert made["privacy"]["epsilon_by_client"][str(client)] == (values[-1] if values else 0.0)
        assert made["privacy"]["steps_by_client"][str(client)] == sum(row["steps"] for row in mine)


def recomputed(rows: list[dict[str, Any]], delta: float, accountant: str) -> float:
    """Epsilon of one client's lines, by dp-accounting and nothing of ours."""
    import dp_accounting
    from dp_accounting import pld, rdp

    made = rdp.RdpAccountant() if accountant == "rdp" else pld.PLDAccountant(value_discretization_interval=1e-3)
    for row in rows:
        if row["steps"]:
            noise = dp_accounting.GaussianDpEvent(row["noise_multiplier"])
            made.compose(dp_accounting.PoissonSampledDpEvent(row["sample_rate"], noise), row["steps"])
    return float(made.get_epsilon(delta))


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_every_epsilon_follows_from_clients_jsonl_by_dp_accounting(tmp_path, accountant):
    conf = small_run.config(**UNEVEN, **{"privacy.accountant": accountant})
    small_run.run(conf, tmp_path)
    rows, made = small_run.clients(tmp_path), small_run.summary(tmp_path)["privacy"]
    for client in range(4):
        mine = [row for row in rows if row["client"] == client]
        told = made["epsilon_by_client"][str(client)]
        assert recomputed(mine, conf.privacy.delta, accountant) == pytest.approx(told, abs=2e-3)


def test_the_largest_and_the_median_epsilon_are_over_all_clients(done):
    made = small_run.summary(done[1])["privacy"]
    values = list(made["epsilon_by_client"].values())
    assert len(values) == 4
    assert made["epsilon_max"] == max(values)
    assert made["epsilon_median"] == pytest.approx(float(np.median(values)))
    assert set(made["epsilon_other"]) == {"pld"}
    assert made["epsilon_other"]["pld"] < made["epsilon_max"]


def test_rates_follow_from_nominal_sizes(done):
    conf, out, _ = done
    made = small_run.summary(out)["privacy"]
    for client, size in made["nominal_sizes"].items():
        assert made["sample_rates"][client] == min(1.0, conf.privacy.expected_batch / size)
    for row in small_run.clients(out):
        assert row["sample_rate"] == made["sample_rates"][str(row["client"])]


def test_representation_sparsity_is_the_mean_frozen_share_over_steps(done):
    live = [row["live"] for row in small_run.rounds(done[1])]
    expected = 1 - sum(live) / len(live) / 1210
    assert small_run.summary(done[1])["sparsity"]["representation"] == pytest.approx(expected)


def test_no_clients_rows_are_test_rows(done):
    """Over the run: the partition that the clients read, against the split that evaluation reads."""
    conf, out, _ = done
    file = np.load(out / "checkpoint" / "partition.npz")
    rows, edges = file["rows"], file["edges"]
    dataset = datasets.load(conf.data, conf.seed)
    assert len(edges) == 5
    assert np.array_equal(np.sort(rows), np.arange(len(dataset.train)))
    assert len(dataset.train) + len(dataset.test) == 1797
    assert np.array_equal(rows, np.concatenate(gather(conf).parts))


def test_clients_never_take_a_row_that_evaluation_has(monkeypatch, tmp_path):
    """By content: no batch holds one of the held-out images, but for digits that were drawn twice in the data itself."""
    from fed_dpprune.dpsgd.gradient import PrivateGradient

    conf = small_run.config(**{"privacy.expected-batch": 300.0, "federation.rounds": 2})
    dataset = datasets.load(conf.data, conf.seed)

    def names(x: Any) -> set[bytes]:
        return {row.tobytes() for row in np.ascontiguousarray(np.asarray(x), dtype=np.float32)}

    train, test = (names(part.take(np.arange(len(part)))[0]) for part in (dataset.train, dataset.test))
    seen: set[bytes] = set()
    summed = PrivateGradient.clipped_sum

    def watched(self, x, y, clipping):
        seen.update(names(x))
        return summed(self, x, y, clipping)

    monkeypatch.setattr(PrivateGradient, "clipped_sum", watched)
    small_run.run(conf, tmp_path)
    assert len(seen) > 0.9 * len(train)
    assert seen <= train
    assert not seen & (test - train)


# --- what reads a run -----------------------------------------------------------------------------------------------------


def test_ledger_json_says_what_each_client_spent(done, capsys):
    _, out, outcome = done
    assert cli.main(["ledger", str(out / "ledger.sqlite"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= {"clients", "chain"}
    assert found["chain"]["verified"] is True
    for client, spent in found["clients"].items():
        assert set(spent) >= {"epsilon", "delta", "accountant", "runs"}
        assert spent["epsilon"] == pytest.approx(outcome.summary["privacy"]["epsilon_by_client"][client], abs=1e-9)
        assert sum(run["steps"] for run in spent["runs"]) == outcome.summary["privacy"]["steps_by_client"][client]


def test_ledger_in_words_names_every_client(done, capsys):
    assert cli.main(["ledger", str(done[1] / "ledger.sqlite"), "--recompute"]) == 0
    out = capsys.readouterr().out
    assert all(f"client {client}: epsilon" in out for client in range(4))
    assert "chain verified" in out


def test_compare_json_puts_runs_side_by_side(done, tmp_path, capsys):
    small_run.run(small_run.config(**{"wire.uplink": "int8"}), tmp_path / "int8")
    assert cli.main(["compare", str(done[1]), str(tmp_path / "int8"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    text = json.dumps(found)
    for out in (done[1], tmp_path / "int8"):
        made = small_run.summary(out)
        assert str(made["accuracy"]["last"]) in text
        assert str(made["bytes"]["uplink"]["payload"]) in text


def test_a_finished_run_says_how_it_ended(done):
    made = small_run.summary(done[1])
    assert (made["status"], made["reason"], made["rounds"], made["rounds_planned"]) == ("complete", "", 5, 5)


def test_an_unexpected_failure_leaves_readable_outputs(tmp_path, monkeypatch):
    from fed_dpprune.federation import aggregate

    real = aggregate.ServerOptimizer.step

    def breaking(self, weights, support, mean, number):
        if number == 3:
            raise ZeroDivisionError("oh")
        return real(self, weights, support, mean, number)

    monkeypatch.setattr(aggregate.ServerOptimizer, "step", breaking)
    outcome, _ = small_run.run(small_run.config(), tmp_path)
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
    made = small_run.summary(tmp_path)
    assert (made["status"], made["rounds"], made["reason"]) == ("failed", 2, "ZeroDivisionError: oh")
    assert made["privacy"]["steps_by_client"] == dict.fromkeys("0123", 6), "round 3 was charged"
    assert len(small_run.rounds(tmp_path)) == 2
    monkeypatch.undo()
    assert small_run.run(small_run.config(), tmp_path, resume=True)[0].status == "complete"
