"""Invariant 4: noise is fresh, its own stream, and nothing that is sent or configured can make it repeat."""

from __future__ import annotations

import ast
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fed_dpprune import config as cfg
from fed_dpprune.federation import apps
from fed_dpprune.federation.secrets import OsSecrets, SeededSecrets
from fed_dpprune.federation.terms import RoundTerms, from_wire

PACKAGE = Path(__file__).resolve().parents[1] / "fed_dpprune"


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    _, tap = small_run.run(small_run.config(), tmp_path_factory.mktemp("secrets") / "out")
    return {place: contents[0] for place, contents in tap.requests.items()}


@pytest.fixture(scope="module")
def terms(asked) -> RoundTerms:
    return from_wire(dict(asked[2, 1]["terms"]))


def changed(terms: RoundTerms, name: str) -> RoundTerms:
    value = getattr(terms, name)
    other = {str: "0" * 32, int: 2, float: 0.125, tuple: (1, 2)}[type(value)]
    return replace(terms, **{name: other if other != value else 1})


@pytest.mark.parametrize("name", [f.name for f in fields(RoundTerms) if f.name != "fingerprint"])
def test_seeded_noise_changes_when_anything_in_the_request_changes(terms, name):
    secrets = SeededSecrets(3)
    noise, other = (secrets.noise(t, 0).normal(2000) for t in (terms, changed(terms, name)))
    assert abs(np.corrcoef(noise, other)[0, 1]) < 5 / np.sqrt(2000)


def test_seeded_noise_is_the_same_for_the_same_request(terms):
    assert np.array_equal(SeededSecrets(3).noise(terms, 1).normal(9), SeededSecrets(3).noise(terms, 1).normal(9))


@pytest.mark.parametrize("other", ["step", "seed", "client"])
def test_seeded_noise_is_another_for_another_step_seed_or_client(terms, other):
    noise = SeededSecrets(3).noise(terms, 0).normal(2000)
    second = {
        "step": SeededSecrets(3).noise(terms, 1),
        "seed": SeededSecrets(4).noise(terms, 0),
        "client": SeededSecrets(3).noise(replace(terms, client=2), 0),
    }[other].normal(2000)
    assert abs(np.corrcoef(noise, second)[0, 1]) < 5 / np.sqrt(2000)


def test_batches_and_noise_are_streams_apart(terms):
    secrets = SeededSecrets(3)
    words = secrets.uniforms(terms, 0).words(2000).astype(np.float64)
    assert abs(np.corrcoef(words, secrets.noise(terms, 0).normal(2000))[0, 1]) < 5 / np.sqrt(2000)


def test_two_arms_of_a_study_see_the_same_batches(terms):
    secrets = SeededSecrets(3)
    one, other = (secrets.uniforms(t, 0).words(50) for t in (terms, replace(terms, noise_multiplier=9.0)))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("draw", [lambda s, t: s.noise(t, 0).normal(2000), lambda s, t: s.uniforms(t, 0).words(2000)])
def test_operating_system_secrets_never_repeat_whatever_is_seeded(terms, draw):
    import torch

    drawn = []
    for _ in range(3):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        drawn.append(draw(OsSecrets(), terms).astype(np.float64))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(drawn[one], drawn[other])[0, 1]) < 5 / np.sqrt(2000)


def test_the_two_kinds_are_labelled(terms):
    assert (OsSecrets().label, SeededSecrets(3).label) == ("os-entropy", "seeded-simulation")
    assert OsSecrets().noise(terms, 0).label == "os-entropy"
    assert SeededSecrets(3).noise(terms, 0).label == "seeded-simulation"


def test_a_simulations_summary_says_that_its_noise_is_seeded(tmp_path):
    outcome, _ = small_run.run(small_run.config(**{"federation.rounds": 1}), tmp_path)
    assert outcome.summary["privacy"]["noise_source"] == "seeded-simulation"


# --- nobody can ask for it ------------------------------------------------------------------------------------------------


def _users_of(name: str) -> set[str]:
    """Modules whose code mentions a name."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(ast.parse(path.read_text()))):
            found.add(path.relative_to(PACKAGE).as_posix())
    return found


def test_seeded_secrets_are_made_where_a_run_builds_its_own_clients_and_nowhere_else():
    assert _users_of("SeededSecrets") == {"federation/simulation.py", "federation/run.py"}
    run = ast.parse((PACKAGE / "federation" / "run.py").read_text())
    uses = [node for node in ast.walk(run) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "SeededSecrets"]
    labels = [node for node in ast.walk(run) if isinstance(node, ast.Attribute) and node.attr == "label"]
    assert all(any(use is label.value for label in labels) for use in uses), "run.py takes its label alone"


def _message(content: RecordDict, kind: str) -> Message:
    from fed_dpprune.federation.inline import InlineGrid

    grid = InlineGrid(apps.make_client_app(), [{}])
    return grid.create_message(content, kind, 1, "1")


def _context(node: dict[str, Any], run: dict[str, Any]) -> Context:
    return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)


@pytest.fixture
def seen(monkeypatch) -> list[Any]:
    """The set-up of every client that the app builds."""
    built: list[Any] = []
    real = apps.ClientSetup

    def watched(**keywords: Any) -> Any:
        built.append(real(**keywords))
        return built[-1]

    monkeypatch.setattr(apps, "ClientSetup", watched)
    return built


@pytest.fixture
def own(tmp_path) -> dict[str, Any]:
    """The node-config of partition 1."""
    return small_run.node_config(tmp_path, 1)


@pytest.mark.parametrize("seed", [0, 3, 12345])
def test_the_client_app_uses_the_systems_entropy_whatever_seed_it_is_configured_with(seen, asked, own, seed):
    run = cfg.to_run_config(small_run.config(seed=seed))
    content = small_run.with_record(asked[1, 1], "terms", seed=seed)
    apps.make_client_app()(_message(content, "train"), _context(own, run))
    assert [type(setup.secrets) for setup in seen] == [OsSecrets]


@pytest.mark.parametrize("key", ["noise-seed", "secrets", "seed", "simulation", "noise.source"])
@pytest.mark.parametrize("where", ["node", "run", "message"])
def test_no_key_of_any_source_asks_for_seeded_noise(seen, asked, own, key, where):
    """Such a key is refused, or it changes nothing that has to do with noise."""
    node, run, content = dict(own), cfg.to_run_config(small_run.config()), asked[1, 1]
    if where == "node":
        node[key] = "seeded-simulation"
    elif where == "run":
        run[key] = 7 if key == "seed" else "seeded-simulation"
    else:
        content = RecordDict({**dict(content), key: ConfigRecord({"seed": 7})})
    reply = apps.make_client_app()(_message(content, "train"), _context(node, run))
    assert reply.has_content()
    assert all(type(setup.secrets) is OsSecrets for setup in seen)
    label = OsSecrets.label
    assert all(setup.secrets.label == label for setup in seen)
    assert "hello" in reply.content or reply.content["reply"]["status"] in ("ok", "malformed-terms", "config-mismatch")


def test_a_node_whose_operator_named_no_ledger_computes_nothing(seen, asked, own, monkeypatch):
    monkeypatch.setattr("fed_dpprune.federation.client.train", lambda *a, **k: pytest.fail("private work"))
    run = cfg.to_run_config(small_run.config())
    del own["ledger"]
    reply = apps.make_client_app()(_message(asked[1, 1], "train"), _context(own, run))
    assert {name: dict(record) for name, record in reply.content.items()} == {"hello": {"status": "node-not-configured"}}
    assert not seen


def test_a_node_with_a_ledger_answers_and_says_that_it_is_its_own(asked, own):
    node = own
    run = cfg.to_run_config(small_run.config())
    app = apps.make_client_app()
    hello = app(_message(RecordDict(), "query"), _context(node, run)).content["hello"]
    assert (hello["ledger"], hello["partition-id"], hello["nominal-size"]) == ("own", 1, 337)
    reply = app(_message(asked[1, 1], "train"), _context(node, run))
    assert reply.content["reply"]["status"] == "ok"


@pytest.mark.parametrize(
    ("node", "run", "word"),
    [
        ({"partition-id": None}, {}, "node-not-configured"),
        ({"partition-id": "1"}, {}, "node-not-configured"),
        ({"partition-id": 9}, {}, "node-not-configured"),
        ({"nominal-size": 0}, {}, "node-not-configured"),
        ({"policy-max-epsilonn": 1.0}, {}, "node-not-configured"),
        ({"ledgr": "/x"}, {}, "node-not-configured"),
        ({}, {"privacy.epsilonn": 4.0}, "internal-error"),
    ],
)
def test_a_node_that_cannot_read_its_config_says_one_word(asked, tmp_path, node, run, word):
    config = {**cfg.to_run_config(small_run.config()), **run}
    for kind, content in (("query", RecordDict()), ("train", asked[1, 1])):
        own = small_run.node_config(tmp_path, 1, **node)
        reply = apps.make_client_app()(_message(content, kind), _context(own, config))
        assert {name: dict(record) for name, record in reply.content.items()} == {"hello": {"status": word}}


def test_a_nodes_own_limit_stops_it(asked, own):
    node = {**own, "policy-max-epsilon": 0.5}
    run = cfg.to_run_config(small_run.config())
    reply = apps.make_client_app()(_message(asked[1, 1], "train"), _context(node, run))
    assert reply.content["reply"]["status"] == "budget-exhausted"
