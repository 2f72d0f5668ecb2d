"""A SuperNode serves from its operator's facts alone: none is missing, none is guessed, none is moved by anybody else."""

from __future__ import annotations

import logging
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fed_dpprune import bundles
from fed_dpprune import config as cfg
from fed_dpprune.errors import ConfigError, LedgerError
from fed_dpprune.federation import apps, node
from fed_dpprune.federation import workbench as workbenches
from fed_dpprune.federation.inline import InlineGrid
from fed_dpprune.federation.terms import from_wire
from fed_dpprune.federation.workbench import workbench
from fed_dpprune.models import foreign, registry
from fed_dpprune.privacy.ledger import Ledger

SIMULATED = {"partition-id": 1, "num-partitions": 4}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> RecordDict:
    """A first round's request to partition 1."""
    _, tap = small_run.run(small_run.config(**{"federation.rounds": 1}), tmp_path_factory.mktemp("node") / "out")
    return tap.requests[1, 1][0]


@pytest.fixture
def own(tmp_path) -> dict[str, Any]:
    return small_run.node_config(tmp_path, 1)


def message(content: RecordDict, kind: str) -> Message:
    return InlineGrid(apps.make_client_app(), [{}]).create_message(content, kind, 1, "1")


def answer(node_config: dict[str, Any], content: RecordDict | None = None, **run: Any) -> dict[str, Any]:
    """What a node's app answers to a hello, or to a train request; `run` changes the run-config."""
    conf = {**cfg.to_run_config(small_run.config(**{"federation.rounds": 1})), **run}
    kind = "query" if content is None else "train"
    context = Context(run_id=1, node_id=1, node_config=dict(node_config), state=RecordDict(), run_config=conf)
    node._rows.cache_clear()
    reply = apps.make_client_app()(message(content or RecordDict(), kind), context)
    return {name: dict(record) for name, record in reply.content.items()}


def status(found: dict[str, Any]) -> str:
    return str(found.get("reply", found.get("hello"))["status"])


# --- required, typed, without a default -------------------------------------------------------------------------------

CONTRACT = {
    "partition-id", "data", "nominal-size", "classes", "shape", "ledger", "accountant", "policy-delta",
    "policy-max-epsilon", "policy-min-noise-multiplier",
}  # fmt: skip
OPTIONAL = {
    "allow-code", "policy-allow-releases", "policy-allow-provenance", "policy-max-clip-norm", "policy-max-sample-rate",
    "policy-max-steps-per-round", "num-partitions",
}  # fmt: skip


def test_the_keys_are_the_contracts():
    assert (set(node.REQUIRED), set(node.OPTIONAL)) == (CONTRACT, OPTIONAL)


@pytest.mark.parametrize("key", sorted(CONTRACT))
def test_a_node_that_lacks_a_key_does_not_serve_and_its_log_says_which(own, asked, key, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fed_dpprune"), "propagate", True)
    del own[key]
    for content in (None, asked):
        assert answer(own, content) == {"hello": {"status": "node-not-configured"}}
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(lines) == 2
    assert all(f"node-config {key}: is missing" in line and "add " + key in line and "\n" not in line for line in lines)
    assert not list(Path(str(own.get("ledger", "/nowhere"))).parent.glob("*.sqlite*"))


@pytest.mark.parametrize("key", [*sorted(CONTRACT | OPTIONAL)])
def test_a_misspelt_key_is_an_error_that_names_the_nearest(own, key):
    own[key + "s"] = own.pop(key, 1)
    with pytest.raises(ConfigError, match=f"node-config {key}s: .*did you mean '{key}'"):
        node.read_node_config(own)


INTEGERS = ("partition-id", "nominal-size", "num-partitions", "policy-max-steps-per-round")
NUMBERS = (
    "policy-delta", "policy-max-epsilon", "policy-min-noise-multiplier", "policy-max-clip-norm", "policy-max-sample-rate",
)  # fmt: skip
WORDS = ("data", "ledger", "accountant")
LISTS = ("allow-code", "policy-allow-releases", "policy-allow-provenance")
WRONG = [
    *((key, value) for key in INTEGERS for value in (True, False, "3", 3.0, -1, math.nan, "false", [3], None)),
    *((key, value) for key in NUMBERS for value in (True, "0.1", "", 0, 0.0, -1.0, math.nan, math.inf, -math.inf, 10**400)),
    *((key, value) for key in WORDS for value in (True, 3, "", "  ", ["pld"])),
    *((key, value) for key in LISTS for value in (True, False, 3, [3], {"a": 1})),
    ("allow-code", "false"),
    ("allow-code", "true"),
    ("allow-code", "my.module"),
    ("policy-allow-provenance", "private"),
    ("policy-allow-provenance", "random,anything"),
    ("policy-max-sample-rate", 1.5),
    ("policy-delta", 1 / 337),
    ("policy-delta", 0.5),
    ("accountant", "gdp"),
    ("accountant", "PLD"),
    ("classes", 1),
    ("classes", True),
    ("classes", 10.0),
    ("classes", "10"),
    ("classes", "cat,cat"),
    ("shape", "64.0"),
    ("ledger", "here/ledger.sqlite"),
    ("partition-id", 4),
    ("data", "nowhere"),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_a_value_of_another_type_or_outside_its_range_is_refused_by_name(own, key, value):
    own[key] = value
    with pytest.raises(ConfigError, match="node-config " + key):
        node.read_node_config(own)


def test_every_key_reaches_the_policy_or_the_node(own):
    own |= {
        "data": "/x/mine.npz",
        "shape": "28x28x3",
        "classes": 7,
        "policy-max-sample-rate": 0.5,
        "policy-max-steps-per-round": 7,
        "policy-max-clip-norm": 2,
        "policy-allow-releases": "training-loss",
        "policy-allow-provenance": ["random", "public"],
        "allow-code": "a.b:c, d:e",
    }
    facts = node.read_node_config(own)
    policy = facts.policy
    assert (facts.declared.shape, facts.declared.classes, facts.nominal_size, facts.partition) == ((3, 28, 28), 7, 337, 1)
    assert (policy.delta, policy.max_epsilon, policy.min_noise_multiplier, policy.accountant) == (1e-4, 50.0, 1.0, "rdp")
    assert (policy.max_sample_rate, policy.max_steps_per_round, policy.max_clip_norm) == (0.5, 7, 2.0)
    assert (policy.allow_releases, policy.allow_provenance) == (("training-loss",), ("random", "public"))
    assert facts.allow_code == ("a.b:c", "d:e")


# --- public facts are not made from private data ----------------------------------------------------------------------


def rows(path: Path, *, x: Any = None, y: Any = None) -> str:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 64)).astype("f4") if x is None else x
    y = rng.integers(0, 10, 60) if y is None else y
    np.savez(path, x_train=x, y_train=y)
    return str(path)


def neighbours(tmp_path: Path) -> Iterator[str]:
    """Data sets that differ in one example, or cannot be read at all."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 64)), rng.integers(0, 10, 60)
    yield rows(tmp_path / "plain.npz", x=x, y=y)
    yield rows(tmp_path / "one-more.npz", x=np.vstack([x, x[:1]]), y=np.append(y, 3))
    yield rows(tmp_path / "nan.npz", x=np.vstack([x, np.full((1, 64), np.nan)]), y=np.append(y, 3))
    yield rows(tmp_path / "higher.npz", x=np.vstack([x, x[:1]]), y=np.append(y, 10))
    yield rows(tmp_path / "lower.npz", x=np.vstack([x, x[:1]]), y=np.append(y, -1))
    yield rows(tmp_path / "huge.npz", x=np.vstack([x, np.full((1, 64), 1e300)]), y=np.append(y, 1))
    yield rows(tmp_path / "none.npz", x=x[:0], y=y[:0])
    yield rows(tmp_path / "wide.npz", x=np.zeros((60, 65)), y=y)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 not")
    yield str(broken)
    yield str(tmp_path / "absent.npz")
    yield str(tmp_path)


def test_the_hello_is_equal_on_all_data(tmp_path):
    hellos = [answer(small_run.node_config(tmp_path, 1, data=data, **{"num-partitions": None})) for data in neighbours(tmp_path)]
    assert all(hello == hellos[0] for hello in hellos)
    assert (status(hellos[0]), hellos[0]["hello"]["nominal-size"]) == ("ok", 337)


@pytest.mark.parametrize("partitions", [None, 4])
def test_status_and_length_of_an_update_are_equal_on_all_data(tmp_path, asked, partitions):
    seen = set()
    for number, data in enumerate(neighbours(tmp_path)):
        ledger = str(tmp_path / f"ledger{number}.sqlite")
        found = answer(small_run.node_config(tmp_path, 1, data=data, ledger=ledger, **{"num-partitions": partitions}), asked)
        update = found["update"]["values" if "values" in found["update"] else next(iter(found["update"]))]
        seen.add((status(found), len(update.data), tuple(sorted(found))))
    assert len(seen) == 1
    assert next(iter(seen))[0] == "ok"


def test_data_that_cannot_be_read_are_no_rows_after_the_charge_and_the_operator_is_told(own, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fed_dpprune"), "propagate", True)
    node._rows.cache_clear()
    facts = node.read_node_config({**own, "data": "/nowhere/at/all.npz"})
    share = node.DeployedNode(facts, small_run.config()).share()
    assert (len(share.examples), share.indices.size, share.nominal_size) == (0, 0, 337)
    assert "cannot be read" in caplog.text


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that this process opens, from Python's own audit events."""
    seen: list[str] = []
    active = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active[0] and event in ("open", "os.listdir", "os.scandir", "glob.glob"):
            seen.append(str(arguments[0]))

    sys.addaudithook(hook)
    yield seen
    active[0] = False


def test_before_the_charge_the_data_are_not_opened(tmp_path, asked, opened):
    data = rows(tmp_path / "private.npz")
    opened.clear()
    own = small_run.node_config(tmp_path, 1, data=data, **{"num-partitions": None})
    assert status(answer(own)) == "ok"
    assert status(answer(own | {"policy-min-noise-multiplier": 9.0}, asked)) == "noise-multiplier-below-policy"
    assert status(answer(own, small_run.with_record(asked, "terms", digest="0" * 32))) == "digest-mismatch"
    assert data not in opened
    assert status(answer(own, asked)) == "ok"
    assert data in opened


def test_a_share_is_read_when_a_step_first_takes_its_rows(tmp_path, opened):
    data = rows(tmp_path / "private.npz")
    opened.clear()
    node._rows.cache_clear()
    facts = node.read_node_config(small_run.node_config(tmp_path, 1, data=data, **{"num-partitions": None}))
    share = node.DeployedNode(facts, small_run.config()).share()
    assert (share.nominal_size, data in opened) == (337, False)
    assert (share.indices.size, len(share.examples), data in opened) == (60, 60, True)


def test_a_hello_or_a_malformed_request_writes_no_ledger(own, asked):
    answer(own)
    answer(own, RecordDict({"terms": ConfigRecord({"protocol": 1})}))
    answer(own, small_run.with_record(asked, "terms", fingerprint="0" * 32))
    assert status(answer(own, small_run.with_record(asked, "terms", noise_multiplier=0.001))) == "noise-multiplier-below-policy"
    assert not Path(own["ledger"]).exists()
    assert status(answer(own, asked)) == "ok"
    with Ledger.read(Path(own["ledger"])) as ledger:
        assert ledger.delta == 1e-4


def test_a_ledger_that_counts_at_another_delta_is_not_charged(own, asked):
    assert status(answer(own, asked)) == "ok"
    facts = node.read_node_config(own | {"policy-delta": 2e-4})
    with pytest.raises(LedgerError, match=r"delta.*0\.0001.*0\.0002"):
        node.open_ledger(facts)


# --- no key of a run-config reaches the node's files, data, engine or limits ------------------------------------------

ELSEWHERE = "/nowhere/named-by-a-server"
HARMLESS = {
    "data.dataset": f"{ELSEWHERE}.npz",
    "data.public": f"{ELSEWHERE}.npz[0:5]",
    "data.test-fraction": 0.9,
    "data.partition": "dirichlet",
    "data.alpha": 0.01,
    "seed": 77,
    "model.weights": f"{ELSEWHERE}.safetensors",
    "policy.max-epsilon": 1e9,
    "policy.max-steps-per-round": 10**6,
    "engine.micro-batch": 3,
    "engine.backend": "reference",
    "federation.clients": 99,
    "wire.link": "wifi",
}


@pytest.mark.parametrize("key", HARMLESS)
def test_a_run_config_moves_neither_rows_nor_engine_nor_size_nor_layout(own, key, monkeypatch):
    benches = []
    monkeypatch.setattr(node, "workbench", lambda *a: benches.append(a[1:]))
    facts = node.read_node_config(own)
    changed = cfg.build({**small_run.BASE, key: HARMLESS[key], "federation.clients-per-round": 2})
    found = [node.DeployedNode(facts, conf) for conf in (small_run.config(), changed)]
    shares = [made.share() for made in found]
    for made in found:
        made.bench()
    assert np.array_equal(shares[0].indices, shares[1].indices)
    assert shares[0].examples is shares[1].examples
    assert [s.nominal_size for s in shares] == [337, 337]
    assert benches[0] == benches[1] == (cfg.Engine(), (64,), 10)
    assert found[0].spec.input_shape == found[1].spec.input_shape


@pytest.mark.parametrize("kind", ["hello", "train"])
@pytest.mark.parametrize(
    "run",
    [
        {"data.dataset": f"{ELSEWHERE}.npz", "data.public": f"{ELSEWHERE}.npz"},
        {"data.dataset": f"{ELSEWHERE}/folder"},
        {"data.dataset": "named_by_a_server:rows"},
        {"model.weights": f"{ELSEWHERE}.safetensors"},
        {"model.weights": f"{ELSEWHERE}.pt", "sparsity.prune.inactive": "hold"},
        {"sparsity.prune.method": "file", "sparsity.prune.file": f"{ELSEWHERE}.npz", "sparsity.prune.rate": 0.0},
    ],
    ids=str,
)
def test_no_path_of_a_run_config_is_opened(own, asked, opened, run, kind):
    digest = cfg.build({**cfg.to_run_config(small_run.config(**{"federation.rounds": 1})), **run})
    from fed_dpprune.federation.terms import config_digest

    content = None if kind == "hello" else small_run.with_record(asked, "terms", config=config_digest(digest))
    found = answer(own, content, **run)
    assert status(found) != "node-not-configured"
    assert kind == "train" or status(found) == "ok"
    assert [path for path in opened if "server" in path] == []
    assert "named_by_a_server" not in sys.modules


def test_code_that_a_run_config_names_runs_only_where_its_exact_path_is_allowed(own, tmp_path, monkeypatch):
    (tmp_path / "served_net.py").write_text(
        "from torch import nn\n\ndef net(shape, classes):\n    return nn.Sequential(nn.Linear(shape[0], classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "served_net:net"
    for allowed in (None, "", "served_net:other", "served_net:net2", "served:net", "a:b,served_net:nets"):
        own["allow-code"] = allowed
        refused = answer({key: value for key, value in own.items() if value is not None}, **{"model.name": name})
        assert refused == {"hello": {"status": "internal-error"}}
        assert "served_net" not in sys.modules
    for allowed in (name, f"a:b,{name}", [name]):
        own["allow-code"] = allowed
        assert status(answer(own, **{"model.name": name})) == "ok"


def test_torchvisions_own_nets_are_no_code_of_the_nodes(own):
    facts = node.read_node_config({**own, "shape": "32x32x3"})
    conf = cfg.build({**small_run.BASE, "model.name": "torchvision:resnet18"})
    assert node.DeployedNode(facts, conf).spec.name == "torchvision:resnet18"


@pytest.mark.parametrize("kind", ["hello", "train"])
@pytest.mark.parametrize(
    "run", [{"model.hidden": "12000,12000"}, {"model.hidden": "65536," * 64}, {"model.name": "torchvision:vit_h_14"}], ids=str
)
def test_a_net_too_large_for_a_node_is_one_word_before_it_is_built(own, asked, run, kind, monkeypatch, caplog):
    def built(*_: Any) -> None:
        raise AssertionError("built")

    for module, name in ((registry, "layout"), (registry, "build"), (foreign, "build"), (apps.nets, "layout")):
        monkeypatch.setattr(module, name, built)
    with caplog.at_level(logging.ERROR):
        found = answer({**own, "shape": "28x28"}, None if kind == "hello" else asked, **run)
    assert found == {"hello": {"status": "internal-error"}}
    assert f"no net of more than {node.LARGEST_NET}" in caplog.text
    assert not Path(own["ledger"]).exists()


def test_the_largest_net_of_a_node_is_one_of_exactly_so_many_coordinates(own, monkeypatch):
    facts = node.read_node_config(own)
    size = registry.layout(node.DeployedNode(facts, small_run.config()).spec).d
    monkeypatch.setattr(node, "LARGEST_NET", size)
    node.DeployedNode(facts, small_run.config())
    monkeypatch.setattr(node, "LARGEST_NET", size - 1)
    with pytest.raises(ConfigError, match=f"has {size} coordinates"):
        node.DeployedNode(facts, small_run.config())


def test_a_net_that_is_not_fit_is_proven_once(monkeypatch):
    calls = []

    def refuse(*_: Any) -> None:
        calls.append(1)
        raise ConfigError("model", "mixes the examples of a batch", "leave that out")

    monkeypatch.setattr(workbenches, "_built", refuse)
    monkeypatch.setattr(workbenches, "_refused", {})
    for _ in range(3):
        with pytest.raises(ConfigError, match="mixes the examples"):
            workbench(cfg.Model(hidden=(3,)), cfg.Engine(), (7,), 2)
    assert len(calls) == 1


def test_a_loader_of_the_operators_own_needs_no_further_word(own, tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(
        "import numpy as np\nfrom fed_dpprune.data.dataset import Examples\n\n"
        "def rows(data, seed):\n    return Examples(np.ones((5, 64), dtype='f4'), np.arange(5))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    facts = node.read_node_config({**own, "data": "own_rows:rows", "num-partitions": 1, "partition-id": 0})
    node._rows.cache_clear()
    assert node.DeployedNode(facts, small_run.config()).share().indices.size == 5


def test_the_net_is_the_declared_one(own):
    facts = node.read_node_config({**own, "shape": "8x8", "classes": 7})
    bench = node.DeployedNode(facts, small_run.config()).bench()
    assert (bench.spec.input_shape, bench.spec.classes) == ((1, 8, 8), 7)
    assert bench is workbench(small_run.config().model, cfg.Engine(), (1, 8, 8), 7)


def test_terms_for_a_net_of_another_shape_are_refused_before_the_charge(own, asked):
    assert from_wire(dict(asked["terms"])).client == 1
    assert status(answer({**own, "classes": 11}, asked)) == "config-mismatch"
    assert not Path(own["ledger"]).exists()


# --- who is a simulation ----------------------------------------------------------------------------------------------


def in_a_flower_actor(call: Any) -> Any:
    """`call`, made by the method of Flower's Ray actor that answers a simulated client's message."""
    from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor

    class Actor(VirtualClientEngineActor):
        pass

    def app(**_: Any) -> Any:
        return call()

    return Actor().run(lambda: app, None, "0", None)[1]


def test_a_client_of_flowers_simulation_is_one_by_its_caller_and_by_its_node_config():
    assert in_a_flower_actor(lambda: node.is_simulated(SIMULATED))
    hello = in_a_flower_actor(lambda: answer(SIMULATED))
    assert (status(hello), hello["hello"]["ledger"], hello["hello"]["nominal-size"]) == ("ok", "host", 337)


@pytest.mark.parametrize("key", sorted((CONTRACT | OPTIONAL) - set(SIMULATED)))
def test_a_node_with_one_key_of_an_operators_is_never_simulated(tmp_path, key):
    full = small_run.node_config(tmp_path, 1)
    lone = {**SIMULATED, key: full.get(key, "x")}
    assert not in_a_flower_actor(lambda: node.is_simulated(lone))
    assert in_a_flower_actor(lambda: answer(lone)) == {"hello": {"status": "node-not-configured"}}


@pytest.mark.parametrize("lone", [{}, {"partition-id": 1}, {"num-partitions": 4}])
def test_a_node_config_that_is_not_the_engines_own_is_not_simulated(lone):
    assert not in_a_flower_actor(lambda: node.is_simulated(lone))


def test_a_module_of_ray_makes_no_simulation(monkeypatch, asked, opened, tmp_path):
    """A SuperNode without an operator's keys is not configured, whatever is imported and whatever a server names."""
    ray = types.ModuleType("ray")
    ray.is_initialized = lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    server = {"data.dataset": str(tmp_path / "server.npz"), "federation.backend": "ray"}
    for content in (None, asked):
        assert answer(SIMULATED, content, **server) == {"hello": {"status": "node-not-configured"}}
    assert server["data.dataset"] not in opened


# --- whose code runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", bundles.WORDS)
def test_a_hello_is_logged_with_whose_code_the_supernode_runs(own, caplog, monkeypatch, word):
    monkeypatch.setattr(logging.getLogger("fed_dpprune"), "propagate", True)
    monkeypatch.setattr(bundles, "of_this_process", lambda: word)
    caplog.set_level(logging.INFO, logger="fed_dpprune")
    answer(own)
    said = {(r.getMessage(), r.levelno) for r in caplog.records if "this SuperNode" in r.getMessage()}
    assert said == {(f"this SuperNode {bundles.WORDS[word]}", logging.INFO if word == bundles.SIGNED else logging.WARNING)}


@pytest.mark.parametrize("kind", ["query", "train"])
def test_a_message_without_content_gets_a_word_and_no_text(own, kind):
    from flwr.app import Error

    asked = message(RecordDict(), kind)
    empty = Message(Error(code=1, reason="made up"), metadata=asked.metadata)
    run = cfg.to_run_config(small_run.config())
    context = Context(run_id=1, node_id=1, node_config=own, state=RecordDict(), run_config=run)
    reply = apps.make_client_app()(empty, context)
    assert {name: dict(record) for name, record in reply.content.items()} == {"hello": {"status": "internal-error"}}
