"""The whole client as a black box in the hands of a hostile server, on two data sets that differ in one example.

Messages, terms, run-configs and weights come from a seeded grammar of legal and illegal ones; magnitudes are log-uniform
over float32. The clients draw their noise from the operating system. Whatever one of them does outside the payload's values,
the other must do too; before the noise their sums differ by the declared sensitivity at most; and no threshold on repeated
releases tells them apart better than the operator's (epsilon, delta) allows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from scipy.stats import beta

from fed_dpprune import config as cfg
from fed_dpprune.comm.codecs import table as codecs
from fed_dpprune.data.dataset import Examples
from fed_dpprune.data.sampling import SeededUniforms, Uniforms
from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.noise import NoiseSource
from fed_dpprune.errors import ConfigError
from fed_dpprune.federation import messages, uplink
from fed_dpprune.federation.broadcast import Parcel
from fed_dpprune.federation.client import ClientRuntime, ClientSetup
from fed_dpprune.federation.fingerprint import fingerprint
from fed_dpprune.federation.guard import LedgerGuard
from fed_dpprune.federation.local_train import Share
from fed_dpprune.federation.model_store import model_digest
from fed_dpprune.federation.secrets import OsSecrets
from fed_dpprune.federation.start import Start
from fed_dpprune.federation.supports import Supports, best_claim
from fed_dpprune.federation.terms import REPLY_CODES, RoundTerms, config_digest
from fed_dpprune.federation.workbench import Workbench, workbench
from fed_dpprune.plan import sample_rate
from fed_dpprune.privacy.accountants import table as accountants
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.ledger import Ledger
from fed_dpprune.privacy.policy import REFUSAL_CODES, ClientPolicy

SHAPE, CLASSES, ROWS, SIZE, DELTA = (6,), 3, 12, 20, 1e-5
CONFIDENCE = 1e-6  # chance of a false alarm
Floats = NDArray[np.float32]


# --- the two clients ------------------------------------------------------------------------------------------------------


def rows() -> tuple[Floats, NDArray[np.int64]]:
    """What both clients hold."""
    rng = np.random.default_rng(1)
    return rng.uniform(-1, 1, (ROWS, *SHAPE)).astype(np.float32), rng.integers(0, CLASSES, ROWS)


def _row(*values: float) -> Floats:
    return np.array(values, dtype=np.float32)


WORST: dict[str, tuple[Floats, int]] = {
    "nan": (_row(np.nan, 1, 1, 1, 1, 1), 0),
    "infinite": (_row(0, -np.inf, 0, 0, 0, 1), 1),
    "huge": (_row(*[3.4e38] * 6), 2),
    "no-data": (_row(0.5, -3.4e38, 0.1, 0.2, 0.3, 0.4), 1),
    "denormal": (_row(*[1e-45] * 6), 0),
    "large": (_row(*[1e3] * 6), 1),
    "ordinary": (_row(0.5, -0.5, 0.25, 0.125, 1, -1), 2),
    "label-past-the-classes": (_row(1, 1, 1, 1, 1, 1), CLASSES),
    "negative-label": (_row(1, 1, 1, 1, 1, 1), -1),
    "label-past-int32": (_row(1, 1, 1, 1, 1, 1), 2**40),
}


class Spy:
    """The engine, with every clipped sum noted; one that raised is noted as nothing."""

    def __init__(self, engine: Any, sums: list[Any]) -> None:
        self._engine, self._sums = engine, sums

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def clipped_sum(self, x: Any, y: Any, clipping: Clipping) -> Any:
        self._sums.append(None)
        total = self._engine.clipped_sum(x, y, clipping)
        self._sums[-1] = np.asarray(total, dtype=np.float64)
        return total


@dataclass(frozen=True)
class SystemNoise(OsSecrets):
    """The operating system's noise; coins that both clients share, so that the batches are neighbours too."""

    scale: float = 1.0

    def uniforms(self, terms: RoundTerms, step: int) -> Uniforms:
        return SeededUniforms(0, terms.key, step)

    def noise(self, terms: RoundTerms, step: int) -> NoiseSource:
        source = super().noise(terms, step)
        if self.scale == 1.0:
            return source
        whole = source.normal
        source.normal = lambda count: self.scale * whole(count)  # type: ignore[method-assign]
        return source


@dataclass
class Memory:
    """Models by digest."""

    held: dict[str, tuple[Start, int]] = field(default_factory=dict)

    def load(self, digest: str) -> tuple[Start, int] | None:
        return self.held.get(digest)

    def save(self, digest: str, begin: Start, version: int) -> None:
        self.held[digest] = (begin, version)


class Client:
    """A client on `rows`, or on those and one more."""

    def __init__(self, folder: Path, more: tuple[Floats, int] | None = None, scale: float = 1.0, **policy: Any) -> None:
        x, y = rows()
        if more is not None:
            x, y = np.vstack([x, more[0]]), np.append(y, more[1])
        self.share = Share(Examples(x, y), np.arange(len(x)), SIZE)
        self.ledger = Ledger.create(folder / "ledger.sqlite", "data", mode="simulation", delta=DELTA, accountant="rdp")
        self.guard = LedgerGuard(self.ledger, ClientPolicy(**policy), {0: SIZE})
        self.store, self.sums, self.scale = Memory(), [], scale

    def ask(self, conf: cfg.Config, content: RecordDict) -> RecordDict:
        """What it answers to one message of a run."""
        self.sums.clear()

        def bench() -> Workbench:
            made = _bench(conf)
            return replace(made, gradient=Spy(made.gradient, self.sums))

        return ClientRuntime(
            ClientSetup(
                config=conf, partition=0, nominal_size=SIZE, bench=bench, share=lambda: self.share,
                secrets=SystemNoise(scale=self.scale), store=self.store, guard=self.guard, ledger="own",
            )
        ).train(content)  # fmt: skip


def _bench(conf: cfg.Config) -> Workbench:
    return workbench(conf.model, cfg.Engine(), SHAPE, CLASSES)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., tuple[Client, Client]]]:
    made: list[Client] = []

    def neighbours(kind: str, scale: float = 1.0, **policy: Any) -> tuple[Client, Client]:
        for more in (None, WORST[kind]):
            made.append(Client(tmp_path / str(len(made)), more, scale, **policy))
        return made[-2], made[-1]

    yield neighbours
    for client in made:
        client.ledger.close()


# --- the grammar ----------------------------------------------------------------------------------------------------------


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def draw_config(rng: random.Random) -> cfg.Config:
    """A run-config of the server's choice; half of its numbers are extreme."""
    while True:
        try:
            return cfg.build(
                {
                    "model.name": rng.choice(["logistic", "mlp"]),
                    "model.hidden": [rng.choice([2, 5])],
                    "model.activation": rng.choice(["tanh", "relu"]),
                    "model.weights": "of-the-server.safetensors",
                    "federation.clients": 4,
                    "federation.rounds": 3,
                    "federation.local-steps": rng.choice([1, 1, 2]),
                    "privacy.noise-multiplier": log_uniform(rng, 0.5, 5),
                    "privacy.delta": DELTA,
                    "privacy.accountant": "rdp",
                    "privacy.clip-norm": rng.choice([1.0, log_uniform(rng, 1e-6, 1e6)]),
                    "privacy.clipping": rng.choice(["flat", "per-layer", "automatic"]),
                    "privacy.sample-rate": rng.choice([1.0, 0.5, log_uniform(rng, 1e-8, 1)]),
                    "sparsity.freeze.method": rng.choice(["none", "random"]),
                    "sparsity.freeze.rate": rng.choice([0.0, 0.5, 0.95]),
                    "sparsity.order": rng.choice(["mask-then-clip", "mask-then-clip", "clip-then-mask"]),
                    "sparsity.rescale": rng.choice(["none", "d-over-k"]),
                    "client.learning-rate": rng.choice([1.0, log_uniform(rng, 1e-30, 1e30)]),
                    "client.momentum": rng.choice([0.0, 0.9]),
                    "client.weight-decay": rng.choice([0.0, log_uniform(rng, 1e-30, 1e30)]),
                    "wire.uplink": rng.choice(codecs.NAMES),
                    "wire.rounding": rng.choice(["nearest", "nearest", "stochastic"]),
                }
            )
        except ConfigError:
            continue


def draw_weights(rng: random.Random, d: int) -> Floats:
    """A model of the server's choice: ordinary, of all magnitudes, or with values that are no numbers."""
    source = np.random.default_rng(rng.getrandbits(64))
    ordinary: Floats = source.uniform(-1, 1, d).astype(np.float32)
    kind = rng.choice(["ordinary", "wide", "wide", "huge", "zero", "not-finite"])
    if kind == "ordinary":
        return ordinary
    if kind == "zero":
        return ordinary * np.float32(0)
    exponents = source.uniform(-149, 127.9, d) if kind != "huge" else source.uniform(120, 127.9, d)
    wide: Floats = (np.sign(ordinary) * np.exp2(exponents)).astype(np.float32)
    if kind == "not-finite":
        wide[source.integers(d)] = rng.choice([np.nan, np.inf, -np.inf])
    return wide


def request(conf: cfg.Config, weights: Floats, run: str, round: int = 1, **changes: Any) -> RecordDict:
    """A legal request: the whole model with a round's terms."""
    bench = _bench(conf)
    maker = ClientRuntime(ClientSetup(conf, 0, SIZE, lambda: bench, None, None, None, None))  # type: ignore[arg-type]
    survivors = maker._draw_survivors(weights, conf.seed, bench)
    live = Supports(conf, bench.layout, survivors, conf.seed).of(round, 0, weights)
    terms = RoundTerms(
        run=run, round=round, rounds=conf.federation.rounds, fingerprint=fingerprint(), config=config_digest(conf),
        layout=bench.layout.digest, seed=conf.seed, survivors=survivors.digest, survivor_count=survivors.k,
        digest=live.support.digest, live=live.support.k, provenance=best_claim(conf), model=model_digest(weights), client=0,
        sample_rate=sample_rate(conf.privacy, SIZE), noise_multiplier=conf.privacy.noise_multiplier or 1.0,
        clip_norm=conf.privacy.clip_norm, steps=conf.federation.local_steps, learning_rate=conf.client.learning_rate,
        delta=conf.privacy.delta, accountant=conf.privacy.accountant, unit=conf.privacy.unit,
    )  # fmt: skip
    parcel = Parcel("resync", "", weights.astype("<f4").tobytes())
    return messages.train_request(replace(terms, **changes).to_wire(), parcel)


def bent(rng: random.Random, content: RecordDict) -> RecordDict:
    """A message with one to three fields of a record replaced, dropped or added, or a record dropped."""
    if rng.random() < 0.1:
        gone = rng.choice(list(content))
        return RecordDict({name: record for name, record in content.items() if name != gone})
    name = rng.choice(["terms", "terms", "request"])
    record = dict(content[name])
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = rng.choice([*record, "new", "odds", "shipped", "answered"])
        old = record.get(key)
        if rng.random() < 0.1:
            record.pop(key, None)
        elif isinstance(old, float):
            record[key] = rng.choice([0.0, -old, old * 1.01, math.nan, math.inf, 1e300, 5e-324, 1e-40])
        elif isinstance(old, str):
            record[key] = rng.choice(["", "0" * 32, old[::-1], old.upper(), "x" * 10_000, "pld", "private", "sync", "replay"])
        else:
            record[key] = rng.choice([0, -1, 1, 2, 2**31, 2**62, "x", 0.5, [], [1], [2**40, 2**40], ["a"], [1] * 1000])
    return RecordDict({**dict(content), name: ConfigRecord(record)})


class Killed(BaseException):
    """The process ends here."""


def observed(client: Client, conf: cfg.Config, content: RecordDict, kill: str) -> dict[str, Any]:
    """All that a server, or the operator's ledger, sees of one message but the values in the payload."""

    def die(*_: Any) -> Any:
        raise Killed

    try:
        if kill:
            setattr(client.guard, kill, die)
        reply = client.ask(conf, content)
    except Killed:
        return {"killed": True, "ledger": client.ledger.head(), "models": sorted(client.store.held)}
    finally:
        client.guard.__dict__.pop(kill, None)
    assert reply["reply"]["status"] in REPLY_CODES.keys() | REFUSAL_CODES.keys()
    return {
        "fields": dict(reply["reply"]),
        "records": {name: list(record) for name, record in reply.items()},
        "length": len(messages.payload_of(reply, "update")),
        "message": messages.message_bytes(reply),
        "ledger": client.ledger.head(),
        "models": sorted(client.store.held),
    }


def conversation(seed: int, count: int) -> Iterator[tuple[cfg.Config, RecordDict, str]]:
    """(run-config, message, where the process dies) of `count` messages; a repeat asks the last one again."""
    rng = random.Random(seed)
    conf = draw_config(rng)
    content = request(conf, draw_weights(rng, _bench(conf).layout.d), f"{rng.getrandbits(128):032x}")
    for number in range(count):
        if number % 6 == 0:
            conf = draw_config(rng)
        way = rng.choice(["legal", "legal", "legal", "bent", "repeat", "killed", "other-config"])
        if way in ("repeat", "other-config"):
            yield conf if way == "repeat" else draw_config(rng), content, ""
            continue
        weights, run = draw_weights(rng, _bench(conf).layout.d), f"{rng.getrandbits(128):032x}"
        content = request(conf, weights, run, rng.choice([1, 1, 2, 3]))
        if way == "bent":
            content = bent(rng, content)
        if way == "killed":
            yield conf, content, rng.choice(["admit", "keep"])
        yield conf, content, ""


# --- what must hold -------------------------------------------------------------------------------------------------------


def _alike(pair: Any, kind: str, seed: int, count: int) -> None:
    without, with_one = pair(kind)
    answers: dict[str, int] = {}
    for conf, content, kill in conversation(seed, count):
        seen = [observed(client, conf, content, kill) for client in (without, with_one)]
        assert seen[0] == seen[1]
        word = seen[0].get("fields", {}).get("status", "killed")
        answers[word] = answers.get(word, 0) + 1
    assert answers["ok"] > count / 5  # else nothing was tried
    assert len(answers) > 3


@pytest.mark.parametrize("kind", WORST)
def test_everything_but_the_payloads_values_is_the_same_on_neighbouring_data(pair, kind):
    _alike(pair, kind, 100 + list(WORST).index(kind), 40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORST)
def test_everything_but_the_payloads_values_is_the_same_over_thousands_of_messages(pair, kind):
    _alike(pair, kind, 7000 + list(WORST).index(kind), 3000)


def _moves(pair: Any, kind: str, seed: int, count: int) -> None:
    without, with_one = pair(kind)
    compared = 0
    for conf, content, kill in conversation(seed, count):
        for client in (without, with_one):
            observed(client, conf, content, kill)
        if not without.sums and not with_one.sums:
            continue
        first, second = without.sums[0], with_one.sums[0]  # later steps start from weights of another noise
        assert first is not None and second is not None, "a sum depends on the data in whether it exists"
        terms = content["terms"]
        bound = Clipping(terms["clip-norm"], conf.privacy.clipping).sensitivity(_bench(conf).layout)
        assert np.linalg.norm(second - first) <= bound * (1 + 1e-9), kind
        compared += 1
    assert compared > count / 10


@pytest.mark.parametrize("kind", WORST)
def test_one_example_moves_the_sum_before_the_noise_by_at_most_the_declared_sensitivity(pair, kind):
    _moves(pair, kind, 300 + list(WORST).index(kind), 40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORST)
def test_one_example_moves_no_sum_by_more_over_thousands_of_messages(pair, kind):
    _moves(pair, kind, 9000 + list(WORST).index(kind), 3000)


# --- membership -----------------------------------------------------------------------------------------------------------

CANARY = (_row(8, 0, 0, 0, 0, 0), 0)
ATTACKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "saturated": {
        "client.learning-rate": 1e30,
        "privacy.clip-norm": 1e6,
        "client.weight-decay": 1e20,
        "federation.local-steps": 2,
    },
    "one-bit": {"wire.uplink": "sign"},
}


def epsilon_beaten(hits: int, false_alarms: int, trials: int) -> float:
    """A lower bound on epsilon at DELTA, right with chance 1 - CONFIDENCE, from a threshold test (Clopper and Pearson 1934)."""
    each = CONFIDENCE / 4  # two rates, either way round
    bounds = [0.0]
    for good, bad in ((hits, false_alarms), (trials - false_alarms, trials - hits)):
        low = float(beta.ppf(each, good, trials - good + 1)) if good else 0.0
        high = float(beta.ppf(1 - each, bad + 1, trials - bad)) if bad < trials else 1.0
        if low > DELTA:
            bounds.append(math.log((low - DELTA) / high))
    return max(bounds)


def _attack(folder: Path, attack: str, trials: int, scale: float = 1.0) -> tuple[float, float]:
    """(epsilon that a test of membership proves, epsilon that one release costs): the canary fills one direction."""
    conf = cfg.build(
        {
            "model.name": "logistic", "model.weights": "of-the-server", "federation.rounds": 1, "federation.clients": 4,
            "federation.local-steps": 1, "privacy.noise-multiplier": 4.0, "privacy.sample-rate": 1.0, "privacy.delta": DELTA,
            "privacy.accountant": "rdp", "sparsity.prune.method": "none", **ATTACKS[attack],
        }
    )  # fmt: skip
    layout, steps = _bench(conf).layout, conf.federation.local_steps
    weights = np.zeros(layout.d, dtype=np.float32)
    clients = [Client(folder / str(place), more, scale) for place, more in enumerate([None, CANARY])]
    rng = random.Random(5)

    def release(client: Client) -> NDArray[np.float64]:
        content = request(conf, weights, f"{rng.getrandbits(128):032x}")
        reply = client.ask(conf, content)
        assert messages.freeze(client.ask(conf, content)) == messages.freeze(reply)  # asking again gives nothing new
        values = uplink.decode(conf.wire, messages.payload_of(reply, "update"), layout.d).astype(np.float64)
        assert attack != "saturated" or np.abs(values).max() == np.finfo(np.float32).max
        return values / max(1.0, np.abs(values).max())

    content = request(conf, weights, f"{rng.getrandbits(128):032x}")
    for client in clients:
        client.ask(conf, content)
    direction = clients[0].sums[0] - clients[1].sums[0]
    scores = [[float(release(client) @ direction) for _ in range(trials + 40)] for client in clients]
    threshold = (np.mean(scores[0][:40]) + np.mean(scores[1][:40])) / 2  # from releases that are not counted
    false_alarms, hits = (sum(score > threshold for score in found[40:]) for found in scores)
    for client in clients:
        client.ledger.close()
    return epsilon_beaten(hits, false_alarms, trials), accountants.epsilon([Entry(4.0, 1.0, steps)], DELTA, "rdp")


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_threshold_on_releases_beats_the_operators_epsilon(tmp_path, attack):
    proven, claimed = _attack(tmp_path, attack, 150)
    assert proven <= claimed


def test_the_membership_test_has_teeth(tmp_path):
    """With a thirtieth of the noise it proves more than is claimed."""
    proven, claimed = _attack(tmp_path, "plain", 150, scale=1 / 30)
    assert proven > claimed


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_threshold_on_thousands_of_releases_beats_the_operators_epsilon(tmp_path, attack):
    proven, claimed = _attack(tmp_path, attack, 5000)
    assert proven <= claimed
