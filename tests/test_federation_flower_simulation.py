"""The client app of `client/app.py` in Flower's own simulation, on Ray: simulated by who calls it, and labelled so."""

from __future__ import annotations

import time

import pytest
import small_run
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fed_dpprune import config as cfg
from fed_dpprune.federation import messages
from fed_dpprune.federation.terms import config_digest

pytestmark = pytest.mark.ray

CONFIG = small_run.config(**{"federation.clients": 2, "federation.min-clients": 2, "federation.rounds": 1})


def served_client() -> ClientApp:
    """The app as a bundle has it, but for the run-config, which `run_simulation` does not carry."""
    app = ClientApp()
    run = cfg.to_run_config(CONFIG)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        from fed_dpprune.federation.apps import make_client_app

        served = Context(context.run_id, context.node_id, context.node_config, context.state, dict(run))
        return make_client_app()(message, served)

    return app


def test_both_clients_say_that_their_host_charges_and_a_task_that_is_no_client_is_not_simulated():
    import ray
    from flwr.simulation import run_simulation

    app, hellos, outside = ServerApp(), [], []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < 2:
            time.sleep(0.1)
        hello = RecordDict({"hello": ConfigRecord({"config": config_digest(CONFIG)})})
        asked = [Message(hello, dst_node_id=node, message_type=messages.QUERY, group_id="0") for node in grid.get_node_ids()]
        hellos.extend(dict(reply.content["hello"]) for reply in grid.send_and_receive(asked))

        @ray.remote(num_cpus=0)
        def elsewhere() -> bool:
            from fed_dpprune.federation.node import is_simulated

            return is_simulated({"partition-id": 0, "num-partitions": 2})

        outside.append(ray.get(elsewhere.remote()))

    run_simulation(
        server_app=app,
        client_app=served_client(),
        num_supernodes=2,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}},
    )
    assert sorted((hello["status"], hello["partition-id"], hello["ledger"]) for hello in hellos) == [
        ("ok", 0, "host"),
        ("ok", 1, "host"),
    ]
    assert outside == [False]
