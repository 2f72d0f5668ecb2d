"""Simulated clients: the closure that `fed-dpprune run` hands to its runner, and how both runners are started.

The one place where seeded secrets are made: it builds the clients in the very process that the user started, and what it
builds travels to Ray's actors as a pickled object, never through a config or a message (invariant 4).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.data import registry as datasets
from fed_dpprune.data.dataset import Dataset
from fed_dpprune.errors import FedDPPruneError
from fed_dpprune.federation.client import ClientRuntime, ClientSetup, HostGuard, Received
from fed_dpprune.federation.dispatch import prompt_dispatch
from fed_dpprune.federation.facts import actors, gather
from fed_dpprune.federation.inline import InlineGrid
from fed_dpprune.federation.local_train import Share
from fed_dpprune.federation.model_store import SharedStore
from fed_dpprune.federation.secrets import SeededSecrets
from fed_dpprune.federation.terms import blake
from fed_dpprune.federation.workbench import Workbench, workbench
from fed_dpprune.places import make_folder, open_alone, require_alone
from fed_dpprune.records import write_atomically


@dataclass(frozen=True)
class SimulatedClients:
    """All that an actor needs to play any client of a run. Small: Ray ships it with every message.

    Attributes:
        config: The shared config.
        data: Its [data] with paths made absolute: an actor may have another working directory.
        partition: File with the rows of every client, drawn once by the driver.
        partition_digest: Of its content.
        models: Folder of the clients' models.
        sizes: Nominal sizes.
        d: Length of the parameter vector.
        home: The driver's working directory: where a user's own nets and loaders are imported from.
    """

    config: cfg.Config
    data: cfg.Data
    partition: Path
    partition_digest: str
    models: Path
    sizes: tuple[int, ...]
    d: int
    home: str

    def app(self) -> ClientApp:
        """The Flower app of these clients."""
        app = ClientApp()
        clients = self

        @app.train()
        def train(message: Message, context: Context) -> Message:
            return Message(clients.runtime(context).train(message.content), reply_to=message)

        @app.query()
        def query(message: Message, context: Context) -> Message:
            return Message(clients.runtime(context).hello(message.content), reply_to=message)

        return app

    def runtime(self, context: Context) -> ClientRuntime:
        """The client that a node plays."""
        if self.home not in sys.path:
            with contextlib.suppress(OSError):  # missing on this machine, or others can leave modules there
                require_alone(self.home)
                sys.path.append(self.home)
        partition = int(context.node_config["partition-id"])
        return ClientRuntime(
            ClientSetup(
                config=self.config,
                partition=partition,
                nominal_size=self.sizes[partition],
                bench=self._bench,
                share=lambda: Share(_dataset(self.data, self.config.seed).train, _parts(self)[partition], self.sizes[partition]),
                secrets=SeededSecrets(self.config.seed),
                store=_store(self.models, self.d),
                guard=HostGuard(),
                note_seconds=True,
                received=_received(self.models, self.partition_digest),
            )
        )

    def _bench(self) -> Workbench:
        dataset = _dataset(self.data, self.config.seed)
        return workbench(self.config.model, self.config.engine, dataset.input_shape, dataset.classes)


@lru_cache(maxsize=1)
def _dataset(data: cfg.Data, seed: int) -> Dataset:
    """The process's data set, loaded once."""
    return datasets.load(data, seed)


@lru_cache(maxsize=1)
def _received(folder: Path, run: str) -> Received:
    return Received()


@lru_cache(maxsize=2)
def _store(folder: Path, d: int) -> SharedStore:
    return SharedStore(folder, d)


@lru_cache(maxsize=2)
def _parts(clients: SimulatedClients) -> list[NDArray[np.int64]]:
    """The rows of every client: from the driver's file or, on a machine that does not have it, drawn again and checked.

    Raises:
        FedDPPruneError: The draw gave something else than the driver's.
    """
    try:
        with os.fdopen(open_alone(clients.partition), "rb") as opened, np.load(opened, allow_pickle=False) as file:
            rows, edges = file["rows"], file["edges"]
    except OSError:
        parts = gather(clients.config.model_copy(update={"data": clients.data})).parts
        rows, edges = pack_parts(parts)
    if _digest(rows, edges) != clients.partition_digest:
        raise FedDPPruneError("partition", "this machine draws other parts than the driver", "share the run directory")
    return [rows[start:end] for start, end in pairwise(edges)]


def pack_parts(parts: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All rows one after the other, and where each client's begin and end."""
    edges = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int64)
    return np.concatenate(parts).astype(np.int64), edges


def _digest(rows: NDArray[np.int64], edges: NDArray[np.int64]) -> str:
    return blake(edges.tobytes() + rows.tobytes())


def write_parts(path: Path, parts: list[NDArray[np.int64]]) -> str:
    """Write the partition file; returns its digest."""
    rows, edges = pack_parts(parts)
    blob = io.BytesIO()
    np.savez(blob, rows=rows, edges=edges)
    write_atomically(make_folder(path.parent) / path.name, blob.getvalue())
    return _digest(rows, edges)


def run_inline(clients: SimulatedClients, serve: Callable[[Grid], None]) -> None:
    """Everything in this process, on this thread."""
    number = len(clients.sizes)
    nodes = [{"partition-id": partition, "num-partitions": number} for partition in range(number)]
    serve(InlineGrid(clients.app(), nodes))


def run_ray(clients: SimulatedClients, serve: Callable[[Grid], None], stop: threading.Event) -> None:
    """Flower's simulation on Ray: `serve` is the ServerApp, on a thread of Flower's.

    Raises:
        FedDPPruneError: Ray could not be started, or died.
    """
    from flwr.simulation import run_simulation

    app = ServerApp()
    failure: list[BaseException] = []
    served = threading.Event()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            ring(grid)
            serve(grid)
        except BaseException as error:
            failure.append(error)
        finally:
            served.set()

    fed = clients.config.federation
    init: dict[str, Any] = {"include_dashboard": False, "configure_logging": False}
    if fed.ray_address:
        init["address"] = fed.ray_address
    else:
        init["num_cpus"] = actors(clients.config)
    try:
        with prompt_dispatch() as ring:
            run_simulation(
                server_app=app,
                client_app=clients.app(),
                num_supernodes=len(clients.sizes),
                backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": init},
            )
    except Exception as error:
        if not failure:
            stop.set()
            raise FedDPPruneError("ray", f"the simulation broke down ({type(error).__name__})", "see log.txt") from error
    if failure:
        raise failure[0]
    if not served.is_set():
        raise FedDPPruneError("ray", "the simulation ended before the run did", "see log.txt")
