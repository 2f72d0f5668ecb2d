"""The Flower apps for `flwr run` and for SuperNodes: `server/app.py` and `client/app.py` call the two makers below.

The config comes from Flower's run-config, whose keys are the config's dotted names. What concerns one node comes from
its operator's node-config, and from nowhere else (`node.py`). Secrets are the operating system's.
"""

from __future__ import annotations

import logging
import sys
import threading

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fed_dpprune import bundles
from fed_dpprune import config as cfg
from fed_dpprune.errors import ConfigError, FedDPPruneError
from fed_dpprune.federation import node as nodes
from fed_dpprune.federation.client import ClientRuntime, ClientSetup
from fed_dpprune.federation.model_store import pack_model, unpack_model
from fed_dpprune.federation.secrets import OsSecrets
from fed_dpprune.federation.start import Start
from fed_dpprune.models import registry as nets

_log = logging.getLogger(__name__)

# All that leaves a node whose operator has not said what it needs; its own log says which key.
NOT_CONFIGURED = "node-not-configured"


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


def _runtime(context: Context) -> ClientRuntime:
    """The client that this process plays, from public facts and the operator's: no private data are read here.

    Raises:
        NotConfigured: The node-config is incomplete or wrong.
        ConfigError: The run-config is.
    """
    try:
        facts = None if nodes.is_simulated(context.node_config) else nodes.read_node_config(context.node_config)
    except ConfigError as error:
        raise NotConfigured(error.what, error.why, error.fix) from None
    config = cfg.build(context.run_config)
    node = nodes.SimulatedNode(config, context.node_config) if facts is None else nodes.DeployedNode(facts, config)
    return ClientRuntime(
        ClientSetup(
            config=config,
            partition=node.partition,
            nominal_size=node.nominal_size,
            bench=node.bench,
            share=node.share,
            secrets=OsSecrets(),
            store=ContextStore(context.state, nets.layout(node.spec).d),
            guard=node.guard,
            ledger=node.word,
        )
    )


class NotConfigured(ConfigError):
    """A node-config that is incomplete or wrong: the node does not serve."""


def _failed(message: Message, error: Exception) -> Message:
    """What leaves when a node cannot even read its config: a word, the same for every kind of message."""
    _log.error("%s", error) if isinstance(error, FedDPPruneError) else _log.exception("the client failed")
    hello = {"status": NOT_CONFIGURED if isinstance(error, NotConfigured) else "internal-error"}
    return Message(RecordDict({"hello": ConfigRecord(dict(hello))}), reply_to=message)


def _speak_to_the_operator() -> None:
    """Where nobody has set up logging, as in the process of a SuperNode's app: to its output, which is the node's log."""
    if not logging.getLogger().handlers:
        _speak()


def _say_whose_code_this_is(context: Context) -> None:
    """One line in a SuperNode's own log: whether it accepts signed app bundles alone."""
    if not nodes.is_simulated(context.node_config):
        found = bundles.of_this_process()
        _log.log(logging.INFO if found == bundles.SIGNED else logging.WARNING, "this SuperNode %s", bundles.WORDS[found])


def make_client_app() -> ClientApp:
    """The ClientApp of `client/app.py`."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        _speak_to_the_operator()
        try:
            _say_whose_code_this_is(context)
            return Message(_runtime(context).hello(message.content), reply_to=message)
        except Exception as error:
            return _failed(message, error)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        _speak_to_the_operator()
        try:
            runtime, content = _runtime(context), message.content
        except Exception as error:
            return _failed(message, error)
        return Message(runtime.train(content), reply_to=message)

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
