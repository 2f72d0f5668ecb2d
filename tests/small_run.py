"""A federated run small enough for every test: real digits, a net of 1,210 weights, no Ray; and grids that look on.

`run` goes through `federation.run.execute`, the code of `fed-dpprune run`; only the picture is left out unless asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fed_dpprune import config as cfg
from fed_dpprune.data import registry as datasets
from fed_dpprune.federation import run as running
from fed_dpprune.federation import simulation
from fed_dpprune.federation.client import ClientRuntime, ClientSetup
from fed_dpprune.federation.facts import gather
from fed_dpprune.federation.guard import LedgerGuard
from fed_dpprune.federation.inline import InlineGrid
from fed_dpprune.federation.local_train import Share
from fed_dpprune.federation.model_store import SharedStore
from fed_dpprune.federation.observer import LogObserver
from fed_dpprune.federation.run import Outcome
from fed_dpprune.federation.secrets import OsSecrets, Secrets
from fed_dpprune.federation.workbench import Workbench, workbench
from fed_dpprune.privacy.ledger import Ledger
from fed_dpprune.privacy.policy import ClientPolicy
from fed_dpprune.records import read_lines

NPY_HEADER = 128
BASE: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "model.hidden": [16],
    "federation.backend": "inline",
    "federation.clients": 4,
    "federation.rounds": 4,
    "sparsity.prune.method": "synflow",
    "sparsity.prune.rate": 0.5,
    "sparsity.freeze.method": "random",
    "sparsity.freeze.rate": 0.8,
    "privacy.noise-multiplier": 1.2,
    "privacy.delta": 1e-4,
    "privacy.expected-batch": 40,
    "privacy.accountant": "rdp",
    "client.momentum": 0.9,
    "client.weight-decay": 0.01,
}


KEYS = {
    "": {"schema", "status", "reason", "name", "seed", "versions", "code_fingerprint"},
    "accuracy": {"last", "best", "best_round"},
    "loss": {"last"},
    "privacy": {
        "epsilon_max", "epsilon_median", "epsilon_by_client", "epsilon_other", "delta", "unit", "neighbouring", "sampler",
        "accountant", "adversary", "noise_source", "side_releases", "noise_multiplier", "clip_norm", "sample_rates",
        "nominal_sizes", "steps_by_client",
    },
    "bytes": {"uplink", "downlink"},
    "sparsity": {"parameters", "live_after_pruning", "live_by_round", "representation", "provenance"},
    "time": {"total_s", "start_s", "round_median_s", "client_compute_s", "overhead_per_round_s"},
}  # fmt: skip
ROUND_KEYS = {
    "round", "accuracy", "loss", "live", "digest", "epsilon_max", "bytes_up", "bytes_down", "clients", "wall_s",
}  # fmt: skip
CLIENT_KEYS = {
    "round", "client", "status", "nominal_size", "steps", "sample_rate", "noise_multiplier", "clip_norm", "epsilon",
    "bytes_up", "bytes_down", "compute_s",
}  # fmt: skip


def config(**changes: Any) -> cfg.Config:
    """BASE with changes; keys with dots and dashes come through `**{...}`."""
    return cfg.build({**BASE, **changes})


def node_config(folder: Path, partition: int = 0, **changes: Any) -> dict[str, Any]:
    """The node-config of one of four nodes that share the digits; a change to None drops the key."""
    node = {
        "partition-id": partition,
        "num-partitions": 4,
        "data": "digits",
        "nominal-size": 337,
        "classes": 10,
        "shape": "64",
        "ledger": str(folder / f"{partition}.sqlite"),
        "accountant": "rdp",
        "policy-delta": 1e-4,
        "policy-max-epsilon": 50.0,
        "policy-min-noise-multiplier": 1.0,
        **changes,
    }
    return {key: value for key, value in node.items() if value is not None}


class Tap(InlineGrid):
    """An inline grid that keeps what passes, and that a test may bend by overriding `asked` and `answered`.

    `requests` and `replies` hold (round, partition) -> the contents that travelled, oldest first; the reply is what the
    client's app returned, before the host takes its note of seconds off.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.partitions = {node: int(context.node_config["partition-id"]) for node, context in self._contexts.items()}
        self.requests: dict[tuple[int, int], list[RecordDict]] = {}
        self.replies: dict[tuple[int, int], list[RecordDict]] = {}
        self.order: list[tuple[int, int]] = []

    def asked(self, place: tuple[int, int], message: Message) -> None:
        """A train request is about to be handled by its client."""

    def answered(self, place: tuple[int, int], reply: Message) -> Message:
        """What the server gets instead of `reply`."""
        return reply

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        for message in batch:
            if message.metadata.message_type == "train":
                place = int(message.metadata.group_id), self.partitions[message.metadata.dst_node_id]
                self.requests.setdefault(place, []).append(message.content)
        return super().push_messages(batch)

    def _handle(self, message: Message) -> Message:
        if message.metadata.message_type != "train":
            return super()._handle(message)
        place = int(message.metadata.group_id), self.partitions[message.metadata.dst_node_id]
        self.asked(place, message)
        self.order.append(place)
        reply = super()._handle(message)
        if reply.has_content():
            self.replies.setdefault(place, []).append(reply.content)
        return self.answered(place, reply)


def run(
    conf: cfg.Config, out: Path, *, tap: Callable[..., InlineGrid] = Tap, picture: bool = False, **options: Any
) -> tuple[Outcome, Any]:
    """(outcome, grid) of one run; the grid is what `tap` made."""
    made: list[InlineGrid] = []

    def run_inline(clients: simulation.SimulatedClients, serve: Callable[[Grid], None]) -> None:
        number = len(clients.sizes)
        made.append(tap(clients.app(), [{"partition-id": p, "num-partitions": number} for p in range(number)]))
        serve(made[0])

    options.setdefault("observer", LogObserver())
    with patch.object(simulation, "run_inline", run_inline):
        if picture:
            outcome = running.execute(conf, out, **options)
        else:
            with patch("fed_dpprune.study.figures.curves.draw"):
                outcome = running.execute(conf, out, **options)
    return outcome, made[0] if made else None


def rounds(out: Path) -> list[dict[str, Any]]:
    """rounds.jsonl."""
    return list(read_lines(out / "rounds.jsonl"))


def clients(out: Path) -> list[dict[str, Any]]:
    """clients.jsonl."""
    return list(read_lines(out / "clients.jsonl"))


def summary(out: Path) -> dict[str, Any]:
    """summary.json."""
    return dict(json.loads((out / "summary.json").read_text()))


def assert_contract(out: Path) -> None:
    """Every file and key of section 4.3."""
    made = summary(out)
    for table, keys in KEYS.items():
        assert set(made[table] if table else made) >= keys, table
    for way in ("uplink", "downlink"):
        assert set(made["bytes"][way]) >= {"payload", "message", "dense_float32", "ratio"}
    for row in rounds(out):
        assert set(row) >= ROUND_KEYS
        assert set(row["clients"]) == {"asked", "answered", "refused", "rejected"}
    for row in clients(out):
        assert set(row) >= CLIENT_KEYS
    for name in ("config.toml", "ledger.sqlite", "model.safetensors", "checkpoint"):
        assert (out / name).exists(), name


def same(value: Any) -> Any:
    """A record without what two runs of one seed may differ in: seconds, versions, paths, backend, actors."""
    exempt = ("versions", "backend", "actors")
    if isinstance(value, dict):
        return {k: same(v) for k, v in value.items() if not k.endswith("_s") and k not in exempt}
    return [same(v) for v in value] if isinstance(value, list) else value


def result(out: Path) -> tuple[Any, Any, Any, bytes]:
    """All of a run that must be equal when it is done again."""
    return same(rounds(out)), same(clients(out)), same(summary(out)), (out / "model.safetensors").read_bytes()


def payload_bytes(content: RecordDict) -> int:
    """Bytes in the arrays of a message, without each container's header."""
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return sum(len(array.data) - NPY_HEADER for record in records for array in record.values())


def deflated(item: Any) -> int:
    """Serialised bytes of a Flower object and of everything below it, as Flower makes them."""
    return len(item.deflate()) + sum(deflated(child) for child in (item.children or {}).values())


def without_note(content: RecordDict) -> RecordDict:
    """A simulated client's reply without the seconds that its host takes off."""
    return RecordDict({name: record for name, record in content.items() if name != "simulation"})


def with_record(content: RecordDict, name: str, **changes: Any) -> RecordDict:
    """A copy with fields of one config record changed; None drops a field."""
    record = dict(content[name])
    for key, value in changes.items():
        record.pop(key.replace("_", "-"), None)
        if value is not None:
            record[key.replace("_", "-")] = value
    return RecordDict({**dict(content), name: ConfigRecord(record)})


@dataclass
class OwnClient:
    """A client with a deployment's ledger of its own, and a count of the gradients that it has computed."""

    runtime: ClientRuntime
    ledger: Ledger
    gradients: list[int]

    def charges(self) -> int:
        """Rows in its ledger."""
        return self.ledger.head().count


def own_client(conf: cfg.Config, partition: int, folder: Path, *, secrets: Secrets | None = None, **policy: Any) -> OwnClient:
    """A client as a SuperNode would run it, on its part of the digits; `secrets` are the system's unless given."""
    gathered = gather(conf)
    rows = gathered.parts[partition]
    ledger = Ledger.open_or_create(
        folder / "client.sqlite", f"partition {partition}", mode="deployment", delta=conf.privacy.delta, accountant="rdp"
    )
    gradients: list[int] = []

    class Counting:
        """The workbench's engine, counted: what runs when anything private is computed."""

        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

        def clipped_sum(self, x: Any, y: Any, clipping: Any) -> Any:
            gradients.append(len(x))
            return self._engine.clipped_sum(x, y, clipping)

    def bench() -> Workbench:
        made = workbench(conf.model, conf.engine, gathered.labels.input_shape, gathered.labels.classes)
        return replace(made, gradient=Counting(made.gradient))

    setup = ClientSetup(
        config=conf,
        partition=partition,
        nominal_size=len(rows),
        bench=bench,
        share=lambda: Share(datasets.load(conf.data, conf.seed).train, rows, len(rows)),
        secrets=secrets or OsSecrets(),
        store=SharedStore(folder / "models", gathered.layout.d),
        guard=LedgerGuard(ledger, ClientPolicy(**policy), {partition: len(rows)}),
        ledger="own",
    )
    return OwnClient(ClientRuntime(setup), ledger, gradients)
