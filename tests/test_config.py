"""The config: every mistake is one line that names the key; every source gives the same tree."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fed_dpprune import config as cfg
from fed_dpprune.errors import ConfigError
from fed_dpprune.starter import COMMENTS, starter

OK = {"privacy.epsilon": 4.0}


def mistake(**changes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        cfg.build({**OK, **changes})
    assert "\n" not in str(caught.value)
    return caught.value


# --- unknown keys, wrong types, impossible values -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("privacy.epsilonn", "privacy.epsilon"),
        ("sparsity.freez.rate", "sparsity.freeze.rate"),
        ("federation.round", "federation.rounds"),
        ("learning-rate", "learning-rate"),
        ("data.clients", "federation.clients"),
        ("privacy.clip_norm", "privacy.clip-norm"),
        ("Seed", "seed"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key, nearest):
    error = mistake(**{key: 1})
    assert error.what == key
    assert nearest in error.fix


def test_an_unknown_key_like_no_other_says_where_all_keys_are():
    assert "fed-dpprune init" in mistake(**{"zzz": 1}).fix


@pytest.mark.parametrize("key", ["privacy", "sparsity.freeze", "sparsity"])
def test_a_table_is_no_value(key):
    assert mistake(**{key: 1}).what == key


WRONG_TYPES = [
    ("federation.rounds", 2.5),
    ("federation.rounds", "5"),
    ("federation.rounds", True),
    ("federation.clients", [10]),
    ("privacy.delta", "small"),
    ("privacy.epsilon", True),
    ("privacy.clip-norm", True),
    ("data.dataset", 7),
    ("wire.error-feedback", 1),
    ("wire.error-feedback", "true"),
    ("model.hidden", "wide"),
    ("model.hidden", [12.5]),
    ("model.hidden", True),
    ("seed", "one"),
    ("seed", 1.0),
]


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES)
def test_a_value_of_another_type_is_refused(key, value):
    error = mistake(**{key: value})
    assert error.what == key
    assert repr(value) in error.why


IMPOSSIBLE = [
    ("privacy.epsilon", 0.0),
    ("privacy.epsilon", -1.0),
    ("privacy.delta", 0.0),
    ("privacy.delta", 1.0),
    ("privacy.clip-norm", 0.0),
    ("privacy.clip-norm", float("nan")),
    ("privacy.clip-norm", float("inf")),
    ("privacy.expected-batch", 0),
    ("privacy.sample-rate", 1.5),
    ("privacy.sample-rate", 0.0),
    ("sparsity.prune.rate", 1.0),
    ("sparsity.prune.rate", -0.1),
    ("sparsity.freeze.rate", 1.0),
    ("sparsity.freeze.ramp-end", 0.0),
    ("sparsity.drop.rate", 2),
    ("federation.rounds", 0),
    ("federation.clients", -1),
    ("federation.clients-per-round", -1),
    ("federation.local-steps", 0),
    ("federation.reply-timeout", 0),
    ("data.test-fraction", 0),
    ("data.test-fraction", 1),
    ("data.alpha", 0.0),
    ("model.hidden", [0]),
    ("client.learning-rate", 0),
    ("client.momentum", 1.0),
    ("client.weight-decay", -0.1),
    ("server.learning-rate", -1.0),
    ("policy.max-sample-rate", 0.0),
    ("policy.max-epsilon", 0.0),
    ("seed", 2**63),
    ("engine.micro-batch", -1),
]


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused(key, value):
    assert mistake(**{key: value}).what == key


CHOICES = [key for key in cfg.KEYS if cfg._choices(key)]


@pytest.mark.parametrize("key", CHOICES)
def test_a_word_that_is_no_choice_is_refused_with_the_choices(key):
    error = mistake(**{key: "nonsense"})
    assert error.what == key
    assert " | " in error.fix or error.fix.startswith("use one of ")
    assert cfg._choices(key) in error.fix


@pytest.mark.parametrize("given", [{}, {"privacy.epsilon": 4.0, "privacy.noise-multiplier": 1.0}, {"privacy.epsilon": ""}])
def test_exactly_one_of_epsilon_and_noise_multiplier_is_set(given):
    with pytest.raises(ConfigError, match="set exactly one of the two"):
        cfg.build(given)


CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("federation.clients-per-round", {"federation.clients": 3, "federation.clients-per-round": 4}),
    ("federation.min-clients", {"federation.clients": 3, "federation.min-clients": 4}),
    ("federation.min-clients", {"federation.clients-per-round": 3, "federation.min-clients": 4}),
    ("sparsity.prune.rate", {"sparsity.prune.rate": 0.5}),
    ("sparsity.freeze.rate", {"sparsity.freeze.rate": 0.5}),
    ("sparsity.drop.rate", {"sparsity.drop.rate": 0.5}),
    ("sparsity.prune.file", {"sparsity.prune.method": "file"}),
    ("sparsity.freeze.refresh", {"sparsity.freeze.method": "magnitude", "sparsity.freeze.refresh": "run"}),
    (
        "sparsity.freeze.refresh",
        {"data.public": "digits[0:50]", "sparsity.freeze.method": "public", "sparsity.freeze.refresh": "run"},
    ),
]


@pytest.mark.parametrize(("what", "changes"), CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_refused(what, changes):
    assert mistake(**changes).what == what


def test_what_can_only_be_known_with_natural_clients_is_not_judged_before():
    conf = cfg.build({**OK, "data.partition": "natural", "federation.clients": 1, "federation.clients-per-round": 3})
    assert conf.federation.clients_per_round == 3


def _other(key: str) -> cfg.Value:
    """A value of the key's own type that is not its default."""
    default = cfg.DEFAULTS_FLAT[key]
    return {bool: True, int: 1, float: 0.5, list: ["loss"], str: "something"}[type(default)]


def test_a_key_whose_feature_lands_later_is_refused_with_a_line_that_says_so():
    for key, allowed in cfg.LATER.items():
        options = [c for c in cfg._choices(key).split(" | ") if c not in (allowed or ()) and c != cfg.DEFAULTS_FLAT[key]]
        error = mistake(**{key: options[0] if options and options[0] else _other(key)})
        assert error.what == key
        assert "not available in this version" in error.why
        assert error.fix.startswith("leave it at")


def test_the_refusal_of_later_keys_reads_the_list(monkeypatch):
    monkeypatch.setitem(cfg.LATER, "wire.uplink", ("int8",))
    assert cfg.build({**OK, "wire.uplink": "int8"}).wire.uplink == "int8"
    assert "not available" in mistake(**{"wire.uplink": "int4"}).why


# --- sources --------------------------------------------------------------------------------------------------------------

FULL: dict[str, Any] = {
    "name": "x", "seed": 7, "data.partition": "dirichlet", "data.alpha": 0.25, "model.hidden": [64, 32],
    "model.freeze-layers": ["0.*"], "federation.clients": 5, "federation.rounds": 3, "federation.min-clients": 1,
    "sparsity.prune.method": "random", "sparsity.prune.rate": 0.5, "sparsity.prune.exempt": ["bias", "head"],
    "sparsity.freeze.method": "random", "sparsity.freeze.rate": 0.9, "privacy.noise-multiplier": 1.5,
    "policy.max-epsilon": 8, "wire.uplink": "int8", "server.optimizer": "adam",
}  # fmt: skip


def test_toml_gives_back_the_config(tmp_path):
    conf = cfg.build(FULL)
    path = tmp_path / "x.toml"
    path.write_text(cfg.to_toml(conf))
    assert cfg.load(path) == conf


def test_a_run_config_gives_back_the_config():
    conf = cfg.build(FULL)
    values = cfg.to_run_config(conf)
    assert cfg.build(values) == conf
    assert {type(v) for v in values.values()} <= {bool, int, float, str}
    assert values["model.hidden"] == "64,32"
    assert values["privacy.epsilon"] == ""


def test_overrides_give_back_the_config(tmp_path):
    conf = cfg.build(FULL)
    path = tmp_path / "x.toml"
    path.write_text("")
    pairs = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in cfg.to_run_config(conf).items()]
    assert cfg.load(path, pairs) == conf


def test_a_flat_config_has_every_key_of_the_tree():
    assert tuple(cfg.to_flat(cfg.Config())) == cfg.KEYS
    assert cfg.to_flat(cfg.Config()) == cfg.DEFAULTS_FLAT


def test_an_override_wins_over_the_file(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("seed = 1\n[privacy]\nepsilon = 1.0\n[federation]\nrounds = 9\n")
    conf = cfg.load(path, ["federation.rounds=2", "name=it is", "model.hidden=[8]", "privacy.epsilon=2"])
    assert (conf.federation.rounds, conf.seed, conf.name, conf.model.hidden) == (2, 1, "it is", (8,))
    assert conf.privacy.epsilon == 2.0


@pytest.mark.parametrize("pair", ["rounds", "=5", " =5"])
def test_an_override_without_key_or_value_is_refused(tmp_path, pair):
    path = tmp_path / "x.toml"
    path.write_text("")
    with pytest.raises(ConfigError, match="is not key=value"):
        cfg.load(path, [pair])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed = ", "not valid TOML"),
        ("[a\n", "not valid TOML"),
        ("seed = 1\nseed = 2\n", "not valid TOML"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_is_no_toml_is_refused_in_one_line(tmp_path, text, why):
    path = tmp_path / "x.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=why) as caught:
        cfg.load(path)
    assert caught.value.what == str(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        cfg.load(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        cfg.load(tmp_path)


def test_a_config_cannot_be_changed():
    conf = cfg.build(OK)
    with pytest.raises(Exception, match="frozen"):
        conf.federation.rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize(("given", "value"), [(4, 4.0), (4.5, 4.5), ("", None)])
def test_numbers_and_unset_read_alike_from_every_source(given, value):
    conf = cfg.build({"privacy.noise-multiplier": 1.0, "policy.max-epsilon": given})
    assert conf.policy.max_epsilon == value


@pytest.mark.parametrize(("given", "value"), [("", ()), ("64", (64,)), (64, (64,)), ("64, 32", (64, 32)), ([64, 32], (64, 32))])
def test_widths_read_alike_from_every_source(given, value):
    assert cfg.build({**OK, "model.hidden": given}).model.hidden == value


# --- init -----------------------------------------------------------------------------------------------------------------


def test_the_starter_loads_with_every_key_and_a_word_on_each(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(starter())
    cfg.load(path)
    assert set(cfg.flatten(tomllib.loads(starter()))) == set(cfg.KEYS)
    assert set(COMMENTS) == set(cfg.KEYS)


@pytest.mark.parametrize("path", sorted((Path(__file__).resolve().parents[1] / "configs").rglob("*.toml")), ids=lambda p: p.stem)
def test_every_preset_says_its_command_in_its_first_comment(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#")
    assert "fed-dpprune" in "".join(line for line in text.splitlines()[:6] if line.startswith("#"))
    if "studies" not in path.parts and "deployment" not in path.parts:
        cfg.load(path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("privacy.accountant", "gdp", "reports less than is spent"),
        ("privacy.sampler", "fixed", "another mechanism"),
        ("privacy.sampling", "shuffle", "another mechanism"),
        ("privacy.batch-size", 64, "another mechanism"),
        ("privacy.amplification", "clients", "knows which clients it asked"),
        ("privacy.client-sampling", True, "knows which clients it asked"),
        ("privacy.client-sample-rate", 0.1, "knows which clients it asked"),
    ],
)
def test_what_would_understate_epsilon_is_refused_with_the_reason(key, value, reason):
    with pytest.raises(ConfigError, match=reason):
        cfg.build({"privacy.epsilon": 1.0, key: value})


@pytest.mark.parametrize(
    ("key", "most", "more"),
    [("model.freeze-layers", "x," * 1000, "x," * 1001), ("sparsity.prune.iterations", 1000, 1001)],
    ids=["patterns", "iterations"],
)
def test_what_a_config_makes_every_node_repeat_is_bounded(key, most, more):
    cfg.build({**OK, key: most})
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        cfg.build({**OK, key: more})


@pytest.mark.parametrize("hidden", [[99999999999], "99999999999", [2**16 + 1], [1] * 65], ids=str)
def test_hidden_layers_have_largest_widths_and_a_largest_number(hidden):
    with pytest.raises(ConfigError, match=r"model\.hidden.*at most 64 layers, each at most 65536 wide"):
        cfg.build({**OK, "model.hidden": hidden})
    assert cfg.build({**OK, "model.hidden": [2**16] * 64}).model.hidden == (2**16,) * 64
