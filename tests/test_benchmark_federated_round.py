"""The benchmark of whole rounds: same work on every side, honest arithmetic, one clear line without data."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def small_work(tmp_path):
    """Made-up pictures for four clients of 30 rows."""
    from federated_peers import Work

    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (130, 28, 28)).astype(np.uint8), draw.integers(0, 10, 130)
    np.savez(tmp_path / "rows.npz", x_train=x[:120], y_train=y[:120], x_test=x[120:], y_test=y[120:], classes=np.int64(10))
    np.savez(tmp_path / "parts.npz", rows=np.arange(120), edges=np.arange(0, 121, 30))
    return Work("tanh-cnn", str(tmp_path / "rows.npz"), str(tmp_path / "parts.npz"), clients=4, batch=10, delta=1e-3)


@pytest.mark.parametrize("model", ["tanh-cnn", "dp-cnn"])
def test_the_peers_net_is_ours(model):
    import torch
    from federated_peers import NETS, build_ours

    theirs, ours = NETS[model](), build_ours(model)
    assert [p.shape for p in theirs.parameters()] == [p.shape for p in ours.parameters()]
    for target, source in zip(theirs.parameters(), ours.parameters(), strict=True):
        target.data.copy_(source.data)
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(theirs(x), ours(x))


def test_our_config_is_the_same_work(small_work):
    import federated_round as bench

    config = bench.our_config(small_work, 3, "inline")
    fed, privacy = config.federation, config.privacy
    assert (fed.clients, fed.local_steps, fed.rounds, fed.actors) == (4, 2, 3, 2)
    assert fed.cohort == 4
    assert (privacy.noise_multiplier, privacy.clip_norm, privacy.expected_batch, privacy.delta) == (1.0, 1.0, 10.0, 1e-3)
    assert config.sparsity.freeze.rate == pytest.approx(0.9)
    assert config.model.name == "tanh-cnn"


def test_the_plain_loop_learns_from_every_client(small_work):
    from federated_peers import serve_loop

    seen = []
    serve_loop(small_work, 2, seen.append)
    assert len(seen) == 2
    assert all(s["compute_s"] > 0 and s["epsilon_s"] == 0 for s in seen)


def test_the_peers_client_is_private_and_asks_for_epsilon_only_when_told(small_work):
    from federated_peers import NETS, PARTS, flower_client
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict

    from fed_dpprune.federation.inline import InlineGrid

    before = NETS["tanh-cnn"]().state_dict()
    for epsilon in (True, False):
        app = flower_client(small_work, NETS["tanh-cnn"], epsilon=epsilon)
        grid = InlineGrid(app, [{"partition-id": 1, "num-partitions": 4}])
        content = RecordDict({"arrays": ArrayRecord(before), "config": ConfigRecord({"lr": 0.1})})
        (reply,) = grid.send_and_receive([grid.create_message(content, "train", 1, "1")])
        assert reply.has_content()
        metrics = dict(reply.content["metrics"])
        assert ("epsilon" in metrics) == epsilon
        assert (metrics["epsilon_s"] > 0) == epsilon
        assert metrics["client_s"] == pytest.approx(sum(metrics[p] for p in PARTS[:3]), rel=0.01)
        after = reply.content["arrays"].to_torch_state_dict()
        assert all(not (after[name] == value).all() for name, value in before.items())


def test_time_inside_a_watched_function_counts_once():
    import federated_round as bench

    def inner():
        time.sleep(0.03)

    def outer():
        owner.inner()
        time.sleep(0.01)
        timers.leave_out(0.005)

    timers, owner = bench.Timers(), SimpleNamespace(inner=inner, outer=outer)
    timers.watch(owner, "inner", "a")
    timers.watch(owner, "outer", "b")
    owner.outer()
    found = timers.take()
    assert found["a"] == pytest.approx(0.03, abs=0.02) and found["a"] >= 0.03
    assert 0.005 <= found["b"] < found["a"]
    assert timers.take() == {}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux")
def test_cpu_seconds_are_those_of_the_whole_tree():
    import federated_round as bench

    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True); input()"
    nested = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    before = bench.tree_cpu(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "done\n"
    spent = bench.tree_cpu(os.getpid()) - before
    child.communicate("\n")
    assert spent >= 0.3


def test_a_gate_times_from_release_to_end():
    import federated_round as bench

    lines, turns = io.StringIO(), io.StringIO("go\ngo\n")
    gate = bench.Gate(lines, turns)
    gate.reached({"client_s": 1.0})
    time.sleep(0.02)
    gate.reached({"client_s": 2.0})
    first, second = map(json.loads, lines.getvalue().splitlines())
    assert (first["round"], second["round"]) == (1, 2)
    assert second["wall_s"] >= 0.02
    assert second["client_s"] == 2.0


def _player(bench, system, walls):
    rounds = [{"wall_s": w, "cpu_s": 2 * w, "client_s": w, "compute_s": w / 2, "server_s": w / 4} for w in walls]
    return bench.Player(system, None, Path("log"), 0.0, rounds)


def test_the_start_is_not_in_the_figures_and_the_parts_add_up():
    import federated_round as bench

    row = bench.row("tanh-cnn", _player(bench, "ours-ray", [50.0, 9.0, 1.0, 3.0, 2.0]), 50.0)
    assert row["seconds_per_round"] == 2.0
    assert row["cpu_seconds_per_round"] == 4.0
    assert (row["fastest_s"], row["slowest_s"], row["start_s"]) == (1.0, 3.0, 50.0)
    assert sum(row["parts"].values()) == pytest.approx(2.0)
    assert row["parts"]["waiting_s"] == pytest.approx(0.5)


def test_speedup_is_the_published_peer_over_ours_on_ray():
    import federated_round as bench

    rows = [
        bench.row("tanh-cnn", _player(bench, system, [9.0, 9.0, wall]), 1.0)
        for system, wall in (("ours-ray", 0.5), ("flower-opacus", 2.5), ("flower-opacus-no-epsilon", 1.0))
    ]
    assert bench.speedups(rows) == {"tanh-cnn": 5.0}
    assert bench.speedups(rows[1:]) == {}
    assert "5.00 times as fast" in bench.table(rows)


def _run(*arguments, **environment):
    command = [sys.executable, str(BENCHMARKS / "federated_round.py"), *arguments]
    plain = {k: v for k, v in os.environ.items() if k != "FED_DPPRUNE_DATA"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=plain | environment)


def test_without_data_it_says_so_in_one_line():
    done = _run("--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "federated_round: FED_DPPRUNE_DATA: is not set; name a folder that holds FashionMNIST/raw"
    ]


def test_an_unknown_system_is_named():
    done = _run("--systems", "ours-rya")
    assert done.returncode == 2
    assert "'ours-rya' is not one of ours-ray" in done.stderr


@pytest.mark.slow
def test_systems_take_turns_and_give_the_contracts_rows(small_work, tmp_path):
    import federated_round as bench

    told = []
    rows = bench.measure(small_work, ["ours-inline", "plain-loop"], 2, tmp_path, told.append)
    assert [r["system"] for r in rows] == ["ours-inline", "plain-loop"]
    for row in rows:
        assert {"model", "system", "seconds_per_round", "cpu_seconds_per_round", "client_compute_s"} <= set(row)
        assert 0 < row["client_compute_s"] <= row["seconds_per_round"] < row["start_s"]
        assert sum(row["parts"].values()) == pytest.approx(row["seconds_per_round"], rel=0.5)
    turns = [line for line in told if "round" in line]
    assert turns[0].endswith("ours-inline") and turns[1].endswith("plain-loop")


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FED_DPPRUNE_DATA"), reason="FED_DPPRUNE_DATA is not set: no Fashion-MNIST")
def test_one_json_object_comes_out():
    arguments = ("--models", "tanh-cnn", "--rounds", "1", "--systems", "ours-ray,flower-opacus", "--json")
    done = _run(*arguments, FED_DPPRUNE_DATA=os.environ["FED_DPPRUNE_DATA"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"machine", "rows", "speedup"}
    assert found["speedup"]["tanh-cnn"] > 1
