"""The ServerApp of `flwr run` among nodes with ledgers of their own, in one process: what a deployment records and charges."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import small_run
from flwr.app import Message

from fed_dpprune import config as cfg
from fed_dpprune.errors import RunStopped
from fed_dpprune.federation import apps
from fed_dpprune.federation.run import serve_app
from fed_dpprune.privacy.ledger import Ledger

ABSENT = 2


class Nodes(small_run.Tap):
    """Four SuperNodes as their operators started them."""

    def __init__(self, conf: cfg.Config, folder: Path, **own: dict[str, Any]) -> None:
        nodes = [small_run.node_config(folder, p, **own.get(f"node{p}", {})) for p in range(4)]
        super().__init__(apps.make_client_app(), nodes)
        for context in self._contexts.values():
            context.run_config = cfg.to_run_config(conf)


class OneSilent(Nodes):
    """Node ABSENT computes in round 2, and its answer is lost."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [m for m in super().pull_messages(message_ids) if not self._lost(m)]

    def _lost(self, message: Message) -> bool:
        return message.metadata.group_id == "2" and self.partitions[message.metadata.src_node_id] == ABSENT


def serve(conf: cfg.Config, grid: Nodes) -> Path:
    """Run to the end; the run directory."""
    with patch("fed_dpprune.study.figures.curves.draw"):
        serve_app(grid, conf, threading.Event())
    return Path("runs") / conf.name


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def charged(folder: Path, partition: int) -> int:
    with Ledger.read(folder / f"{partition}.sqlite") as ledger:
        return sum(entry.steps for entry in ledger.history(f"partition {partition}"))


def test_every_node_charges_its_own_ledger_what_the_server_records(tmp_path):
    conf = small_run.config()
    out = serve(conf, Nodes(conf, tmp_path))
    made = small_run.summary(out)
    assert made["status"] == "complete"
    assert (made["privacy"]["noise_source"], made["privacy"]["simulation"]) == ("os-entropy", False)
    for partition in range(4):
        assert charged(tmp_path, partition) == made["privacy"]["steps_by_client"][str(partition)] == 8
    assert not (out / "ledger.sqlite").exists()
    assert {row["compute_s"] for row in small_run.clients(out)} == {None}


def test_no_two_deployments_of_one_config_are_alike(tmp_path):
    conf = small_run.config()
    models = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        models.append((serve(conf, Nodes(conf, tmp_path / place)) / "model.safetensors").read_bytes())
        (Path("runs") / conf.name).rename(tmp_path / f"done-{place}")
    assert models[0] != models[1]


def test_a_node_that_fell_silent_is_counted_as_charged_and_comes_back(tmp_path):
    conf = small_run.config(**{"federation.reply-timeout": 2.0, "federation.rounds": 3})
    out = serve(conf, OneSilent(conf, tmp_path))
    rows = [row for row in small_run.clients(out) if row["client"] == ABSENT]
    assert [row["status"] for row in rows] == ["answered", "silent", "answered"]
    assert [row["steps"] for row in rows] == [2, 2, 2]
    assert charged(tmp_path, ABSENT) == 6


def test_a_nodes_own_limit_stops_it_alone_and_is_not_counted(tmp_path):
    conf = small_run.config()
    out = serve(conf, Nodes(conf, tmp_path, node1={"policy-max-epsilon": 1.8}))
    made = small_run.summary(out)
    assert made["status"] == "complete"
    rows = [row for row in small_run.clients(out) if row["client"] == 1]
    assert [(row["status"], row["steps"]) for row in rows] == [("answered", 2), ("answered", 2), ("refused", 0), ("refused", 0)]
    assert charged(tmp_path, 1) == made["privacy"]["steps_by_client"]["1"] == 4
    assert made["privacy"]["epsilon_by_client"]["1"] <= 1.8


def test_a_node_without_a_ledger_takes_no_part(tmp_path):
    conf = small_run.config()
    with pytest.raises(RunStopped, match="node-not-configured"):
        serve(conf, Nodes(conf, tmp_path, node3={"ledger": None}))
    assert not list(tmp_path.glob("*.sqlite"))


def test_a_run_that_stops_short_is_recorded_and_raised(tmp_path):
    conf = small_run.config()
    limits = {f"node{p}": {"policy-max-epsilon": 1.8} for p in range(4)}
    with pytest.raises(RunStopped, match="budget-exhausted"):
        serve(conf, Nodes(conf, tmp_path, **limits))
    made = small_run.summary(Path("runs") / conf.name)
    assert (made["status"], made["rounds"]) == ("stopped", 2)


def test_a_declared_size_sets_the_rate_and_the_divisor(tmp_path):
    conf = small_run.config()
    out = serve(conf, Nodes(conf, tmp_path, node0={"nominal-size": 400}))
    made = small_run.summary(out)["privacy"]
    assert made["nominal_sizes"] == {"0": 400, "1": 337, "2": 337, "3": 337}
    assert made["sample_rates"]["0"] == 0.1


def test_clients_per_round_holds_in_a_deployment_too(tmp_path):
    conf = small_run.config(**{"federation.clients-per-round": 2})
    out = serve(conf, Nodes(conf, tmp_path))
    assert {row["clients"]["asked"] for row in small_run.rounds(out)} == {2}


class Simulated(Nodes):
    """The clients of Flower's simulation: the engine's node-config, and every message handled by its actor."""

    def __init__(self, conf: cfg.Config, folder: Path) -> None:
        super().__init__(conf, folder)
        for partition, context in enumerate(self._contexts.values()):
            context.node_config = {"partition-id": partition, "num-partitions": 4}

    def _handle(self, message: Message) -> Message:
        from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor

        class Actor(VirtualClientEngineActor):
            pass

        handle = super()._handle
        return Actor().run(lambda: lambda message, context: handle(message), message, "0", None)[1]


def test_flowers_own_simulation_is_labelled_as_one(tmp_path, capfd):
    conf = small_run.config(**{"federation.rounds": 2})
    made = small_run.summary(serve(conf, Simulated(conf, tmp_path)))
    assert (made["status"], made["privacy"]["simulation"]) == ("complete", True)
    assert made["privacy"]["nominal_sizes"] == {str(p): 337 for p in range(4)}
    assert not list(tmp_path.glob("*.sqlite"))
