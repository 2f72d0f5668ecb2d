"""The Flower apps for `flwr run` and for SuperNodes: `server/app.py` and `client/app.py` call the two makers below.

The config comes from Flower's run-config, whose keys are the config's dotted names. What concerns one node comes from
its operator's node-config, and from nowhere else: data, nominal size, ledger, policy. Secrets are the operating system's.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.data import partition
from fed_dpprune.data import registry as datasets
from fed_dpprune.data.dataset import Dataset
from fed_dpprune.dotted import is_path
from fed_dpprune.errors import ClientFault, ConfigError, FedDPPruneError
from fed_dpprune.federation.client import ClientRuntime, ClientSetup, Guard, HostGuard
from fed_dpprune.federation.guard import LedgerGuard
from fed_dpprune.federation.local_train import Share
from fed_dpprune.federation.model_store import pack_model, unpack_model
from fed_dpprune.federation.secrets import OsSecrets
from fed_dpprune.federation.start import Start
from fed_dpprune.federation.terms import RoundTerms, blake
from fed_dpprune.federation.workbench import Workbench, workbench
from fed_dpprune.models import registry as nets
from fed_dpprune.models.spec import from_config
from fed_dpprune.privacy.ledger import Ledger
from fed_dpprune.privacy.policy import ClientPolicy

_log = logging.getLogger(__name__)

NODE_KEYS = ("partition-id", "num-partitions", "data", "nominal-size", "ledger", "allow-code")


class ContextStore:
    """A client's model in Flower's own per-node state: lost when a SuperNode restarts, and then resynchronised.

    Args:
        state: `context.state`; lives in the SuperNode (deployment) or in the driver (simulation).
        d: Length of the parameter vector.
    """

    NAME = "fed-dpprune.model"

    def __init__(self, state: RecordDict, d: int) -> None:
        self._state, self._d = state, d

    def load(self, digest: str) -> tuple[Start, int] | None:
        """The model, if it is the one of that digest."""
        names, held = self._state.get(f"{self.NAME}.digest"), self._state.get(self.NAME)
        if not isinstance(names, ConfigRecord) or names.get("digest") != digest or not isinstance(held, ArrayRecord):
            return None
        return unpack_model(held["blob"].numpy().tobytes(), self._d)

    def save(self, digest: str, begin: Start, version: int) -> None:
        """Keep the newest model only."""
        blob = np.frombuffer(pack_model(begin, version), dtype=np.uint8)
        self._state[self.NAME] = ArrayRecord({"blob": Array(blob)})
        self._state[f"{self.NAME}.digest"] = ConfigRecord({"digest": digest})


class NoLedger:
    """For a node whose operator named no ledger: nothing private is computed."""

    def admit(self, terms: RoundTerms) -> bytes | None:
        """Refuse."""
        raise ClientFault("no-ledger", "node-config has no ledger")

    def keep(self, terms: RoundTerms, reply: bytes) -> bytes:
        """Nothing was computed."""
        raise ClientFault("no-ledger", "node-config has no ledger")


def _inside_ray() -> bool:
    """Whether this process is a Ray worker, which means: a client of Flower's simulation. A SuperNode's never is."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@lru_cache(maxsize=1)
def _dataset(data: cfg.Data, seed: int) -> Dataset:
    return datasets.load(data, seed)


@lru_cache(maxsize=1)
def _parts(data: cfg.Data, clients: int, seed: int) -> list[NDArray[np.int64]]:
    """The rows of every client of a simulation, drawn once in this process."""
    labels = datasets.labels(data, seed)
    return partition.draw(data, clients, labels.y, labels.natural, seed)


def _number(node: Mapping[str, Any], key: str, *, least: int) -> int:
    value = node.get(key)
    if type(value) is not int or value < least:
        raise ConfigError(
            f"node-config {key}", f"{value!r} is not a whole number of at least {least}", f"set {key} for this node"
        )
    return value


class Node:
    """One node's view of its own config: which data, how large, which ledger.

    Args:
        config: From the run-config.
        node: Its node-config.
    """

    def __init__(self, config: cfg.Config, node: Mapping[str, Any]) -> None:
        unknown = [key for key in node if key not in NODE_KEYS and not key.startswith("policy-")]
        if unknown:
            raise ConfigError(f"node-config {unknown[0]}", "is not a key", f"use {', '.join(NODE_KEYS)} and policy-*")
        self.config = config
        self.partition = _number(node, "partition-id", least=0)
        self._own_data = str(node.get("data", ""))
        own = {"dataset": self._own_data, "public": ""}  # a public range is one of the server's data set
        data = config.data.model_copy(update=own) if self._own_data else config.data
        self.data = data
        self._partitions = config.federation.clients
        if not self._own_data and "num-partitions" in node:
            self._partitions = _number(node, "num-partitions", least=1)
        self._refuse_foreign_code(bool(node.get("allow-code", False)))
        self.ledger = str(node.get("ledger", ""))
        self.nominal_size = _number(node, "nominal-size", least=1) if "nominal-size" in node else len(self.rows())
        self.policy = ClientPolicy.from_node_config(node)

    def _refuse_foreign_code(self, allowed: bool) -> None:
        """A dotted path runs code of the node's: a run-config may name one only where the operator says `allow-code`.

        Raises:
            ConfigError: It does, and the operator has not.
        """
        for key, path in (("model.name", self.config.model.name), ("data.dataset", self.config.data.dataset)):
            shared = key == "model.name" or not self._own_data
            if shared and is_path(path) and not allowed and not _inside_ray():
                raise ConfigError(key, f"{path!r} would run code of this node", "set allow-code = true in its node-config")

    def rows(self) -> NDArray[np.int64]:
        """This client's rows: all of a data set of its own, else its part of the shared one."""
        if self._own_data:
            return np.arange(len(_dataset(self.data, self.config.seed).train), dtype=np.int64)
        parts = _parts(self.data, self._partitions, self.config.seed)
        if self.partition >= len(parts):
            raise ConfigError("node-config partition-id", f"{self.partition} of {len(parts)} partitions", "count from 0")
        return parts[self.partition]

    def share(self) -> Share:
        """Its private data."""
        return Share(_dataset(self.data, self.config.seed).train, self.rows(), self.nominal_size)

    def bench(self) -> Workbench:
        """Its net and engine."""
        labels = datasets.labels(self.data, self.config.seed)
        return workbench(self.config.model, self.config.engine, labels.input_shape, labels.classes)

    def warn_of_other_data(self, ledger: Ledger) -> None:
        """Tell this node's own log when the data are not those that the ledger was opened with; nothing leaves the node."""
        share = self.share()
        rows, labels = share.examples.take(share.indices)
        if not ledger.same_data(blake(labels.tobytes() + rows.tobytes())):
            _log.warning("%s was opened with other data; what was spent before still counts", self.ledger)

    def guard(self) -> tuple[Guard, str]:
        """Who charges, and the word for it in the hello."""
        if self.ledger:
            privacy = self.config.privacy
            ledger = Ledger.open_or_create(
                Path(self.ledger).expanduser(),
                "the data of this node",
                mode="deployment",
                delta=min(privacy.delta, self.policy.delta or 1.0),
                accountant=privacy.accountant,
                unit=privacy.unit,
            )
            return LedgerGuard(ledger, self.policy, {self.partition: self.nominal_size}), "own"
        return (HostGuard(), "host") if _inside_ray() else (NoLedger(), "none")


def _runtime(context: Context, *, greeting: bool = False) -> ClientRuntime:
    config = cfg.build(context.run_config)
    node = Node(config, context.node_config)
    guard, ledger = node.guard()
    if greeting and isinstance(guard, LedgerGuard):
        node.warn_of_other_data(guard.ledger)
    labels = datasets.labels(node.data, config.seed)
    d = nets.layout(from_config(config.model, labels.input_shape, labels.classes)).d
    return ClientRuntime(
        ClientSetup(
            config=config,
            partition=node.partition,
            nominal_size=node.nominal_size,
            bench=node.bench,
            share=node.share,
            secrets=OsSecrets(),
            store=ContextStore(context.state, d),
            guard=guard,
            ledger=ledger,
        )
    )


def _failed(message: Message, error: Exception) -> Message:
    """What leaves when a node cannot even read its config: a word."""
    _log.error("%s", error) if isinstance(error, FedDPPruneError) else _log.exception("the client failed")
    hello = {"status": "internal-error"}
    return Message(RecordDict({"hello": ConfigRecord(dict(hello))}), reply_to=message)


def make_client_app() -> ClientApp:
    """The ClientApp of `client/app.py`."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        try:
            return Message(_runtime(context, greeting=True).hello(message.content), reply_to=message)
        except Exception as error:
            return _failed(message, error)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            runtime = _runtime(context)
        except Exception as error:
            return _failed(message, error)
        return Message(runtime.train(message.content), reply_to=message)

    return app


def _speak() -> None:
    """Let this package's own messages through to Flower's log, and nobody else's."""
    logger = logging.getLogger("fed_dpprune")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel(logging.INFO)
    logger.propagate = False


def make_server_app() -> ServerApp:
    """The ServerApp of `server/app.py`: the same server as `fed-dpprune run`, on Flower's own runtime."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from fed_dpprune.federation.run import serve_app

        _speak()
        serve_app(grid, cfg.build(context.run_config), threading.Event())

    return app
