"""The config: one typed, frozen, validated tree, read from TOML, `--set key=value` or a Flower run-config.

Keys are kebab-case and dotted (`sparsity.freeze.rate`), the same everywhere. Every mistake is one line that names the
key. Keys whose feature is not here yet are refused when set (LATER below), never ignored.
Lives here: what can be checked without data. What needs the data (delta against client sizes) is in `plan.py`.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli_w
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fed_dpprune.errors import ConfigError

# Far past any schedule in use; a plan holds a figure for each round, and a slip of the keyboard must not fill the memory.
MOST_ROUNDS = 10_000

Value = bool | int | float | str | list[Any]
WIDEST, DEEPEST = 2**16, 64  # of model.hidden: beyond that a width is a slip, or an attack on who builds the net
LISTS_AS_TEXT = ","

# Keys that the contract fixes and whose feature lands later: key -> values that work today (None: only the default).
LATER: dict[str, tuple[Value, ...] | None] = {"policy.allow-releases": None}

_NOT_POISSON = (
    "batches of a fixed size are another mechanism, and accounted as Poisson sampling they leak more than is claimed",
    "every batch here is a Poisson sample; set privacy.expected-batch or privacy.sample-rate",
)
_SERVER_KNOWS = (
    "the server is the adversary and knows which clients it asked, so that choice hides nothing and lowers no epsilon",
    "set federation.clients-per-round, and every asked client pays in full",
)
# What is asked for elsewhere and refused here: (key, value or None for any) -> (why, what to do instead).
REFUSED: dict[tuple[str, str | None], tuple[str, str]] = {
    ("privacy.accountant", "gdp"): (
        '"gdp" is a central-limit estimate that reports less than is spent (0.49 for a true 2.1)',
        "use one of pld | rdp | prv",
    ),
    ("privacy.sampler", None): _NOT_POISSON,
    ("privacy.sampling", None): _NOT_POISSON,
    ("privacy.batch-size", None): _NOT_POISSON,
    ("privacy.amplification", None): _SERVER_KNOWS,
    ("privacy.client-sampling", None): _SERVER_KNOWS,
    ("privacy.client-sample-rate", None): _SERVER_KNOWS,
}


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Section(BaseModel):
    """A TOML table: frozen, kebab-case, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=_kebab, populate_by_name=True, allow_inf_nan=False
    )


def _int_is_float(value: Any) -> Any:
    """TOML and run-configs write 1 for 1.0."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _unset(value: Any) -> Any:
    """`""` means unset in every source."""
    return None if value == "" else _int_is_float(value)


def _split(value: Any) -> Any:
    """Run-configs have no lists: a comma string stands for one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(LISTS_AS_TEXT) if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _split_ints(value: Any) -> Any:
    parts = _split([value] if isinstance(value, int) and not isinstance(value, bool) else value)
    if isinstance(parts, tuple) and all(isinstance(p, str) and p.isdigit() for p in parts):
        return tuple(int(p) for p in parts)
    return parts


def _positive_widths(value: tuple[int, ...]) -> tuple[int, ...]:
    if any(width < 1 for width in value):
        raise ValueError("every width must be at least 1")
    if max(value, default=0) > WIDEST or len(value) > DEEPEST:
        raise ValueError(f"at most {DEEPEST} layers, each at most {WIDEST} wide")
    return value


Float = Annotated[float, BeforeValidator(_int_is_float)]
Positive = Annotated[float, BeforeValidator(_int_is_float), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(_int_is_float), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(_int_is_float), Field(gt=0, lt=1)]
Rate = Annotated[float, BeforeValidator(_int_is_float), Field(ge=0, lt=1)]
UnitShare = Annotated[float, BeforeValidator(_int_is_float), Field(gt=0, le=1)]
Momentum = Annotated[float, BeforeValidator(_int_is_float), Field(ge=0, lt=1)]
OptionalPositive = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_unset)]
OptionalShare = Annotated[Annotated[float, Field(gt=0, le=1)] | None, BeforeValidator(_unset)]
Count = Annotated[int, Field(ge=1)]
Words = Annotated[tuple[str, ...], BeforeValidator(_split)]
Widths = Annotated[tuple[int, ...], BeforeValidator(_split_ints), AfterValidator(_positive_widths)]


class Data(Section):
    """Which data, and how the clients share it."""

    dataset: str = "digits"
    partition: Literal["iid", "dirichlet", "shards", "natural"] = "iid"
    alpha: Positive = 0.5
    public: str = ""
    test_fraction: Fraction = 0.25


class Model(Section):
    """Which net, and from where its weights come."""

    name: str = "mlp"
    hidden: Widths = (128,)
    activation: Literal["tanh", "relu"] = "tanh"
    weights: str = ""
    freeze_layers: Annotated[Words, Field(max_length=1000)] = ()


class Federation(Section):
    """Who takes part, for how long, and what carries the messages."""

    backend: Literal["ray", "inline"] = "ray"
    clients: Count = 10
    clients_per_round: Annotated[int, Field(ge=0)] = 0
    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = 20
    local_steps: Count = 2
    min_clients: Count = 2
    reply_timeout: Positive = 600.0
    evaluate_every: Count = 1
    actors: Annotated[int, Field(ge=0)] = 0
    ray_address: str = ""

    @property
    def cohort(self) -> int:
        """Clients asked per round."""
        return self.clients_per_round or self.clients


class Prune(Section):
    """Pre-pruning: once, before training."""

    method: Literal["none", "random", "magnitude", "synflow", "snip", "file"] = "none"
    rate: Rate = 0.0
    scope: Literal["global", "layer"] = "global"
    inactive: Literal["zero", "hold"] = "zero"
    exempt: Words = ("bias", "norm")
    iterations: Annotated[int, Field(ge=1, le=1000)] = 100
    file: str = ""


class Freeze(Section):
    """Random freeze and its relatives: a support per run, round or step."""

    method: Literal["none", "random", "magnitude", "public", "change"] = "none"
    rate: Rate = 0.0
    ramp: Literal["constant", "linear", "cosine", "step"] = "linear"
    ramp_end: UnitShare = 1.0
    refresh: Literal["run", "round", "step"] = "round"
    odds: Literal["uniform", "layer-energy"] = "uniform"


class Drop(Section):
    """Selection and gradient dropping: a support per step inside the round's."""

    method: Literal["none", "random", "magnitude", "public"] = "none"
    rate: Rate = 0.0


class Sparsity(Section):
    """What lives, and the companions of sparsity."""

    granularity: Literal["element", "row", "channel", "layer"] = "element"
    shared: bool = True
    groups: Annotated[int, Field(ge=0)] = 0
    clip_scaling: Literal["none", "sqrt"] = "none"
    lr_scaling: Float = 0.0
    rescale: Literal["none", "d-over-k"] = "none"
    order: Literal["mask-then-clip", "clip-then-mask"] = "mask-then-clip"
    prune: Prune = Prune()
    freeze: Freeze = Freeze()
    drop: Drop = Drop()


class Privacy(Section):
    """The claim: exactly one of epsilon and noise-multiplier."""

    epsilon: OptionalPositive = None
    noise_multiplier: OptionalPositive = None
    delta: Fraction = 1e-5
    clip_norm: Positive = 1.0
    clipping: Literal["flat", "per-layer", "automatic"] = "flat"
    expected_batch: Positive = 64.0
    sample_rate: OptionalShare = None
    accountant: Literal["pld", "rdp", "prv"] = "pld"
    unit: Literal["example"] = "example"


class Policy(Section):
    """The client operator's own limits; in a deployment they come from the node-config."""

    max_epsilon: OptionalPositive = None
    min_noise_multiplier: NonNegative = 0.0
    max_sample_rate: UnitShare = 1.0
    max_steps_per_round: Count = 1000
    allow_releases: Words = ()
    allow_provenance: Words = ("random", "data-free", "public")


class Client(Section):
    """The client's optimiser, fed with released values only."""

    learning_rate: Positive = 1.0
    momentum: Momentum = 0.0
    weight_decay: NonNegative = 0.0


class Server(Section):
    """The server's optimiser on the aggregate."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive = 1.0
    momentum: Momentum = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"


class Wire(Section):
    """How values travel."""

    uplink: Literal["float32", "float16", "bfloat16", "int8", "int4", "level3", "level2", "sign"] = "float32"
    downlink: Literal["float32", "float16", "bfloat16", "int8", "int4", "level3", "level2", "sign"] = "float32"
    error_feedback: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"
    select: Literal["none", "top-k", "top-k-private"] = "none"
    select_rate: Rate = 0.0
    link: str = ""


class Engine(Section):
    """Speed only: nothing here may change a privacy figure."""

    backend: Literal["auto", "reference", "torch", "compiled"] = "auto"
    micro_batch: Annotated[int, Field(ge=0)] = 0


class Config(Section):
    """The whole tree."""

    name: str = ""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    data: Data = Data()
    model: Model = Model()
    federation: Federation = Federation()
    sparsity: Sparsity = Sparsity()
    privacy: Privacy = Privacy()
    policy: Policy = Policy()
    client: Client = Client()
    server: Server = Server()
    wire: Wire = Wire()
    engine: Engine = Engine()


def _fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, default) of every leaf, in the order of the contract."""
    for name, field in section.model_fields.items():
        key = prefix + _kebab(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, key + ".")
        else:
            yield key, field.default


KEYS: tuple[str, ...] = tuple(key for key, _ in _fields())
DEFAULTS: dict[str, Any] = dict(_fields())


def _nearest(key: str) -> str:
    """A hint for an unknown key: the nearest name, by the whole and by the last part."""
    close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.6)
    if not close:
        tails = {k.rsplit(".", 1)[-1]: k for k in KEYS}
        close = [tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], tails, n=1, cutoff=0.7)]
    return f"did you mean {close[0]!r}?" if close else "`fed-dpprune init` writes a config with every key"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *tables, leaf = key.split(".")
        node = tree
        for table in tables:
            node = node.setdefault(table, {})
        node[leaf] = value
    return tree


def _choices(key: str) -> str:
    """The allowed words of a key that has a fixed list, for error messages."""
    section: Any = Config
    *tables, leaf = key.split(".")
    for table in tables:
        section = section.model_fields[table.replace("-", "_")].annotation
    annotation = section.model_fields[leaf.replace("-", "_")].annotation
    return " | ".join(map(str, get_args(annotation))) if get_origin(annotation) is Literal else ""


def _explain(error: ValidationError, flat: Mapping[str, Any]) -> ConfigError:
    """The first mistake as one line: the key, what was given, what is allowed."""
    first = error.errors()[0]
    parts = [str(p) for p in first["loc"]]
    key = next((k for k in (".".join(parts[:n]) for n in range(len(parts), 0, -1)) if k in DEFAULTS), ".".join(parts))
    message = first["msg"].removeprefix("Value error, ")
    given = flat.get(key, first.get("input"))
    fix = f"use one of {_choices(key)}" if key in DEFAULTS and _choices(key) else f"its default is {_shown(DEFAULTS.get(key))}"
    return ConfigError(key, f"{given!r} is not allowed ({message[0].lower()}{message[1:]})", fix)


def _shown(value: Any) -> str:
    if value is None:
        return '""'
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value)) if isinstance(value, tuple) else repr(value).replace("'", '"')


def _one_of(config: Config) -> None:
    privacy = config.privacy
    if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        given = "neither is" if privacy.epsilon is None else "both are"
        raise ConfigError("privacy.epsilon and privacy.noise-multiplier", f"{given} set", "set exactly one of the two")


def _cross_checks(config: Config) -> None:
    """What needs more than one key, still without data."""
    _one_of(config)
    fed, sparsity = config.federation, config.sparsity
    natural = config.data.partition == "natural"
    if not natural and fed.clients_per_round > fed.clients:
        raise ConfigError(
            "federation.clients-per-round",
            f"{fed.clients_per_round} is more than federation.clients = {fed.clients}",
            "ask for at most all of them (0 means all)",
        )
    if not natural and fed.min_clients > fed.cohort:
        raise ConfigError(
            "federation.min-clients",
            f"{fed.min_clients} is more than the {fed.cohort} clients asked per round",
            "lower it or ask more clients",
        )
    for name, part in (("prune", sparsity.prune), ("freeze", sparsity.freeze), ("drop", sparsity.drop)):
        if part.method == "none" and part.rate > 0:
            raise ConfigError(
                f"sparsity.{name}.rate", f'{part.rate} is set but sparsity.{name}.method is "none"', "choose a method"
            )
    once = {"magnitude": "magnitude", "public": "snip"}
    if sparsity.freeze.method in once and sparsity.freeze.refresh == "run":
        raise ConfigError(
            "sparsity.freeze.refresh",
            f'by {sparsity.freeze.method}, "run" would freeze what pre-pruning holds',
            f'use sparsity.prune.method = "{once[sparsity.freeze.method]}" with sparsity.prune.inactive = "hold"',
        )
    if sparsity.groups and sparsity.shared:
        raise ConfigError("sparsity.groups", "one support for all clients makes no groups", "set sparsity.shared = false")
    if sparsity.freeze.method == "change" and sparsity.freeze.refresh != "round":
        raise ConfigError("sparsity.freeze.refresh", "the model changes between rounds only", "use round")
    if sparsity.freeze.method == "change" and (
        sparsity.freeze.ramp == "constant" or round(sparsity.freeze.ramp_end * fed.rounds) < 2
    ):
        raise ConfigError(
            "sparsity.freeze.ramp",
            "before the first round nothing has changed, so in it all must live",
            "use a ramp of 2 rounds up",
        )
    _check_public(config)
    _check_select(config.wire)
    if config.wire.error_feedback and config.wire.downlink == "float32":
        raise ConfigError("wire.error-feedback", "a float32 downlink leaves no error to feed back", "set wire.downlink")
    if config.wire.rounding == "stochastic" and not {config.wire.uplink, config.wire.downlink} & {"int8", "int4"}:
        raise ConfigError("wire.rounding", "only int8 and int4 can round by chance", "set wire.uplink or wire.downlink to one")
    if sparsity.prune.method == "file" and not sparsity.prune.file:
        raise ConfigError("sparsity.prune.file", 'it is empty but sparsity.prune.method is "file"', "name a saved support")


def _check_public(config: Config) -> None:
    """Scores of labelled data come from public data or not at all."""
    sparsity = config.sparsity
    users = {
        "sparsity.prune.method": sparsity.prune.method == "snip",
        "sparsity.freeze.method": sparsity.freeze.method == "public",
        "sparsity.drop.method": sparsity.drop.method == "public",
    }
    for key, reads in users.items():
        if reads and not config.data.public:
            raise ConfigError(key, "reads labelled examples, and on private ones it is refused", "declare data.public")
    by_change = sparsity.freeze.method == "change"
    shipped = by_change or users["sparsity.freeze.method"] or users["sparsity.drop.method"]
    if shipped and not sparsity.shared:
        raise ConfigError("sparsity.shared", "the server chooses one support for all clients", "leave it true")
    if by_change and users["sparsity.drop.method"]:
        raise ConfigError(
            "sparsity.drop.method", 'a freeze by "change" and a drop by public scores do not go together', "choose one"
        )
    if users["sparsity.drop.method"] and sparsity.freeze.method == "random" and sparsity.freeze.refresh == "step":
        raise ConfigError("sparsity.freeze.refresh", 'with drop by public scores, "step" is not offered', "use round or run")


def _check_select(wire: Wire) -> None:
    """Which values of an update leave: chosen after the noise, or not at all."""
    if wire.select == "top-k-private":
        raise ConfigError(
            "wire.select",
            "the positions of the largest private values are themselves private data, and the noise on the values does not "
            "cover them: no epsilon could be stated",
            'use "top-k", which selects after the noise, or sparsity.freeze.method = "change", which reads released models',
        )
    if wire.select == "none" and wire.select_rate > 0:
        raise ConfigError("wire.select-rate", f'{wire.select_rate} is set but wire.select is "none"', 'set wire.select = "top-k"')


def _refuse_later(config: Config) -> None:
    values = to_flat(config)
    for key, allowed in LATER.items():
        ok = (DEFAULTS_FLAT[key],) if allowed is None else (DEFAULTS_FLAT[key], *allowed)
        if values[key] not in ok:
            works = ", ".join(dict.fromkeys(_shown(v) for v in ok))
            raise ConfigError(key, f"{_shown(values[key])} is not available in this version", f"leave it at {works}")


def build(flat: Mapping[str, Any]) -> Config:
    """Validate dotted keys into a Config.

    Raises:
        ConfigError: Something refused for its privacy (with the reason), unknown key (with the nearest name), wrong type,
            impossible or contradictory value, or a key whose feature is not here yet.
    """
    tables = {key.rsplit(".", n)[0] for key in KEYS for n in range(1, key.count(".") + 1)}
    for key, value in flat.items():
        refused = REFUSED.get((key, None)) or REFUSED.get((key, str(value)))
        if refused:
            raise ConfigError(key, *refused)
        if key in tables:
            raise ConfigError(key, "is a table, not a value", f"write [{key}] and keys under it")
        if key not in DEFAULTS:
            raise ConfigError(key, "is not a config key", _nearest(key))
    try:
        config = Config.model_validate(_nest(flat))
    except ValidationError as error:
        raise _explain(error, flat) from None
    _refuse_later(config)
    _cross_checks(config)
    return config


def _parse_scalar(text: str) -> Any:
    """A `--set` value: a TOML scalar or list if it reads as one, else the bare word."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`key=value` strings of `--set` to dotted keys."""
    flat: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {pair}", "is not key=value", "for example --set federation.rounds=5")
        flat[key.strip()] = _parse_scalar(text.strip())
    return flat


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file and `--set` overrides.

    Raises:
        ConfigError: See `build`; also a missing file or a file that is not TOML.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(path), "no such config file", "`fed-dpprune init FILE` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), f"is not valid TOML ({error})", "see the line it names") from None
    return build({**flatten(tree), **parse_overrides(overrides or [])})


def to_flat(config: Config) -> dict[str, Value]:
    """Every key with its value: unset as "", tuples as lists."""

    def plain(value: Any) -> Value:
        if value is None:
            return ""
        return list(value) if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in flatten(config.model_dump(by_alias=True)).items()}


def to_run_config(config: Config) -> dict[str, bool | int | float | str]:
    """The same as Flower run-config values: lists become comma strings."""
    return {
        key: LISTS_AS_TEXT.join(map(str, value)) if isinstance(value, list) else value for key, value in to_flat(config).items()
    }


def to_toml(config: Config) -> str:
    """The resolved config as TOML; `load` reads it back to an equal Config."""
    return tomli_w.dumps(_nest(to_flat(config)))


DEFAULTS_FLAT: dict[str, Value] = to_flat(Config())
