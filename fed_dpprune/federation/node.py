"""One node's own view: what its operator declared, its data, its ledger. Imports no flwr until a simulated client is built.

A SuperNode serves from its operator's node-config alone: data, shape, classes, nominal size, ledger, accountant and limits.
Nothing in a run-config, a message or the private data moves any of them, and none has a default. Until a request is
charged, nothing here opens the data; after the charge, data that cannot be read are no rows, and the release is noise.

A client of Flower's own simulation is another class: `is_simulated` says when, and a node with one key of an operator's
never is one.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.data import node_rows, partition
from fed_dpprune.data import registry as datasets
from fed_dpprune.data.dataset import Dataset, Examples
from fed_dpprune.data.node_rows import Declared, Rows
from fed_dpprune.dotted import is_path
from fed_dpprune.errors import ConfigError, LedgerError
from fed_dpprune.federation.guard import LedgerGuard
from fed_dpprune.federation.local_train import Share
from fed_dpprune.federation.workbench import Workbench, workbench
from fed_dpprune.models import registry as nets
from fed_dpprune.models.spec import TORCHVISION, ModelSpec, from_config
from fed_dpprune.privacy import policy as policies
from fed_dpprune.privacy.ledger import Ledger
from fed_dpprune.privacy.node_values import missing, texts, whole
from fed_dpprune.privacy.policy import ClientPolicy

if TYPE_CHECKING:
    from fed_dpprune.federation.client import Guard
    from fed_dpprune.federation.terms import RoundTerms

_log = logging.getLogger(__name__)

IDENTITY = "the data of this node"
REQUIRED = (
    "partition-id", "data", "nominal-size", "classes", "shape", "ledger", "accountant", *policies.REQUIRED_KEYS,
)  # fmt: skip
OPTIONAL = ("allow-code", "num-partitions", *(key for key in policies.NODE_KEYS if key not in policies.REQUIRED_KEYS))
KEYS = (*REQUIRED, *OPTIONAL)
SIMULATION_KEYS = frozenset({"partition-id", "num-partitions"})  # all that Flower's simulation engine sets
# Keys of a run-config that may name code. What they name runs on a node only if `allow-code` lists exactly that.
CODE_KEYS = ("model.name",)
# Coordinates of the largest net that a run-config can make a node build: room for a ResNet-50 or a ConvNeXt-T. Building and
# proving one takes about 100 bytes a coordinate, 3 GiB at the bound. Code of the operator's own list is not held to it: it
# is given the declared shape and classes alone, so its size is the operator's choice.
LARGEST_NET = 2**25


@dataclass(frozen=True)
class NodeConfig:
    """What a node's operator declared; all of it is fixed before the first message.

    Attributes:
        partition: Its partition id.
        partitions: How many nodes share the data; 1 when they are this node's alone.
        data: What to read, see `data.node_rows.read`.
        declared: Shape and classes of every row.
        nominal_size: N_c, published.
        ledger: Its file, an absolute path.
        policy: The limits, with delta and accountant.
        allow_code: Dotted paths that a run-config may name.
    """

    partition: int
    partitions: int
    data: str
    declared: Declared
    nominal_size: int
    ledger: Path
    policy: ClientPolicy
    allow_code: tuple[str, ...]

    @property
    def accountant(self) -> str:
        """That the ledger counts by."""
        if self.policy.accountant is None:
            raise missing("accountant")
        return self.policy.accountant


def read_node_config(node: Mapping[str, Any]) -> NodeConfig:
    """The operator's node-config, complete and checked; no file is opened.

    Raises:
        ConfigError: An unknown key, a required one that is missing, a value of the wrong type or impossible.
    """
    for key in node:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"node-config {key}", "is not a key", f"did you mean {near!r}?")
    for key in REQUIRED:
        if key not in node:
            raise missing(key)
    number, partitions = whole(node, "partition-id", least=0), whole(node, "num-partitions", least=1, default=1)
    if number >= partitions > 1:
        raise ConfigError("node-config partition-id", f"{number} of {partitions} partitions", "count from 0")
    data = _text(node, "data")
    node_rows.check_name(data)
    return NodeConfig(
        partition=number,
        partitions=partitions,
        data=data,
        declared=_declared(node),
        nominal_size=whole(node, "nominal-size", least=1),
        ledger=_ledger(node),
        policy=ClientPolicy.from_node_config(node),
        allow_code=_allowed(node),
    )


def _text(node: Mapping[str, Any], key: str) -> str:
    value = node[key]
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"node-config {key}", f"{value!r} is not a name", f'write {key} = "...", in quotes')
    return value


def _declared(node: Mapping[str, Any]) -> Declared:
    shape, classes = node_rows.parse_shape(node["shape"]), node["classes"]
    if type(classes) is int:
        return Declared(shape, whole(node, "classes", least=2))
    names = texts(node, "classes", default=())
    if len(names) < 2 or len(set(names)) != len(names):
        why = f"{classes!r} is neither a number of at least 2 nor a list of different names"
        raise ConfigError("node-config classes", why, 'write 10, or "cat,dog" for folders of images')
    return Declared(shape, len(names), names)


def _ledger(node: Mapping[str, Any]) -> Path:
    path = Path(_text(node, "ledger")).expanduser()
    if not path.is_absolute():  # else a SuperNode started in another folder would begin a second budget
        raise ConfigError("node-config ledger", f"{str(path)!r} is not a whole path", "begin it with / or ~")
    return path


def _allowed(node: Mapping[str, Any]) -> tuple[str, ...]:
    paths = texts(node, "allow-code", default=())
    for path in paths:
        if not is_path(path):
            why = f"{path!r} is not a dotted path"
            raise ConfigError("node-config allow-code", why, 'list exact paths, "package.module:name"; leave it out for none')
    return paths


# --- the two kinds of node --------------------------------------------------------------------------------------------


class DeployedNode:
    """A SuperNode.

    Args:
        facts: Its operator's.
        config: From the run-config: of it the node takes the net, the method and the claim, never data, engine or policy.

    Raises:
        ConfigError: The run-config names code that the operator did not allow, a net that does not fit the declared shape,
            or one of more than LARGEST_NET coordinates; nothing has been built then.
    """

    word = "own"

    def __init__(self, facts: NodeConfig, config: cfg.Config) -> None:
        for key in CODE_KEYS:
            path = str(cfg.to_flat(config)[key])
            ours = path.startswith(TORCHVISION)  # one of torchvision's own classifiers, by a list
            if is_path(path) and not ours and path not in facts.allow_code:
                advice = f'its operator may add allow-code = "{path}" to its node-config'
                raise ConfigError(key, f"{path!r} would run code of this node", advice)
        self.facts, self.config = facts, config
        self.partition, self.nominal_size = facts.partition, facts.nominal_size
        self.guard: Guard = OwnLedger(facts)
        size = nets.coordinates(self.spec)
        if size is not None and size > LARGEST_NET:
            why = f"{config.model.name} has {size} coordinates here, and a node builds no net of more than {LARGEST_NET}"
            raise ConfigError("model.name and model.hidden", why, "choose a smaller net")

    @property
    def spec(self) -> ModelSpec:
        """Which net, for the declared shape and classes."""
        return from_config(self.config.model, self.facts.declared.shape, self.facts.declared.classes)

    def bench(self) -> Workbench:
        """The net and its engine; which engine is no business of a run-config."""
        return workbench(self.config.model, cfg.Engine(), self.facts.declared.shape, self.facts.declared.classes)

    def share(self) -> Share:
        """Its private rows, still unread."""
        return UnreadShare(self.facts)


class UnreadShare(Share):
    """A node's rows, read when a step first takes them: after the charge, whoever asks for the share and when.

    Nothing may come of reading but an update, so data that cannot be read are no rows.

    Args:
        facts: The operator's.
    """

    def __init__(self, facts: NodeConfig) -> None:
        object.__setattr__(self, "_facts", facts)
        object.__setattr__(self, "nominal_size", facts.nominal_size)

    def __getattr__(self, name: str) -> Any:
        """Read, at the first use of `examples` or `indices`."""
        if name not in ("examples", "indices"):
            raise AttributeError(name)
        examples, indices = _read_share(self._facts)
        object.__setattr__(self, "examples", examples)
        object.__setattr__(self, "indices", indices)
        return getattr(self, name)


def _read_share(facts: NodeConfig) -> tuple[Examples, NDArray[np.int64]]:
    """A node's examples and the numbers of those that are its own; none of either where the data cannot be read."""
    try:
        rows = _rows(facts.data, facts.declared)
        mine = node_rows.owned(rows, facts.partition, facts.partitions)
    except Exception:
        _log.exception("node-config data: %s cannot be read; this update is noise alone", facts.data)
        return node_rows.nothing(facts.declared), np.zeros(0, dtype=np.int64)
    if mine.size < rows.total:
        _log.info("%d of %d rows are this node's and fit its declaration", mine.size, rows.total)
    return rows.examples, mine


@lru_cache(maxsize=1)
def _rows(data: str, declared: Declared) -> Rows:
    """The process's data, read once."""
    return node_rows.read(data, declared)


class OwnLedger:
    """A node's ledger and limits, opened when a request is to be charged: a hello or a malformed request writes nothing.

    Args:
        facts: The operator's.
    """

    def __init__(self, facts: NodeConfig) -> None:
        self._facts = facts
        self._open: LedgerGuard | None = None

    def _guard(self) -> LedgerGuard:
        if self._open is None:
            facts = self._facts
            self._open = LedgerGuard(lambda: open_ledger(facts), facts.policy, {facts.partition: facts.nominal_size})
        return self._open

    def screen(self, terms: RoundTerms) -> None:
        """The limits alone; see `guard.LedgerGuard`."""
        self._guard().screen(terms)

    def admit(self, terms: RoundTerms) -> bytes | None:
        """Charge, or give back what was stored; see `guard.LedgerGuard`."""
        return self._guard().admit(terms)

    def keep(self, terms: RoundTerms, reply: bytes) -> bytes:
        """Store the reply before it leaves."""
        return self._guard().keep(terms, reply)


def open_ledger(facts: NodeConfig) -> Ledger:
    """The node's ledger, made where there is none.

    Raises:
        LedgerError: It cannot be trusted or written, or counts at another delta than the operator's.
    """
    delta = facts.policy.delta
    if delta is None:
        raise missing("policy-delta")
    ledger = Ledger.open_or_create(
        facts.ledger, IDENTITY, mode="deployment", delta=delta, accountant=facts.accountant, unit=policies.UNIT
    )
    if ledger.delta != delta:
        ledger.close()
        why = f"counts at delta {ledger.delta:g}, policy-delta says {delta:g}"
        raise LedgerError(str(facts.ledger), why, "write the ledger's delta into this node's file, for good")
    return ledger


class SimulatedNode:
    """A client of Flower's own simulation: the run-config is its user's, the host of the run charges for it.

    Args:
        config: From the run-config.
        node: Exactly what Flower's engine sets.
    """

    word = "host"

    def __init__(self, config: cfg.Config, node: Mapping[str, Any]) -> None:
        from fed_dpprune.federation.client import HostGuard

        self.config = config
        self.partition = whole(node, "partition-id", least=0)
        self._partitions = whole(node, "num-partitions", least=1)
        self.guard: Guard = HostGuard()
        if self.partition >= len(self._parts()):
            raise ConfigError("node-config partition-id", f"{self.partition} of {len(self._parts())} partitions", "count from 0")
        self.nominal_size = len(self._parts()[self.partition])

    def _parts(self) -> list[NDArray[np.int64]]:
        return _parts(self.config.data, self._partitions, self.config.seed)

    @property
    def spec(self) -> ModelSpec:
        """Which net, for the run's data set."""
        labels = datasets.labels(self.config.data, self.config.seed)
        return from_config(self.config.model, labels.input_shape, labels.classes)

    def bench(self) -> Workbench:
        """The net and its engine."""
        spec = self.spec
        return workbench(self.config.model, self.config.engine, spec.input_shape, spec.classes)

    def share(self) -> Share:
        """Its part of the run's data set."""
        rows = self._parts()[self.partition]
        return Share(_dataset(self.config.data, self.config.seed).train, rows, self.nominal_size)


@lru_cache(maxsize=1)
def _dataset(data: cfg.Data, seed: int) -> Dataset:
    return datasets.load(data, seed)


@lru_cache(maxsize=1)
def _parts(data: cfg.Data, clients: int, seed: int) -> list[NDArray[np.int64]]:
    """The rows of every client of a simulation, drawn once in this process."""
    labels = datasets.labels(data, seed)
    return partition.draw(data, clients, labels.y, labels.natural, seed)


def is_simulated(node: Mapping[str, Any]) -> bool:
    """Whether this is a client of Flower's simulation, by two facts that no run-config and no message can make.

    Its node-config holds exactly the two keys that Flower's engine sets, and this call is made by an actor of that
    engine. A SuperNode's app runs in a process of its own and never in such an actor, and a node with a single key of an
    operator's is a deployment's wherever it runs.
    """
    return set(node) == SIMULATION_KEYS and _inside_flowers_simulation()


def _inside_flowers_simulation() -> bool:
    """Whether Flower's Ray actor is among the callers. That Ray is installed, imported or started says nothing."""
    module = sys.modules.get("flwr.simulation.ray_transport.ray_actor")
    run = getattr(getattr(module, "VirtualClientEngineActor", None), "run", None)
    code = getattr(run, "__code__", None)
    frame = sys._getframe()
    while code is not None and frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
