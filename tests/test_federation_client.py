"""A client between a server that may be hostile and its own ledger: typed refusals, charges before work, one reply a request."""

from __future__ import annotations

import math
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import small_run
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from small_run import OwnClient, own_client, with_record

from fed_dpprune import config as cfg
from fed_dpprune.data.sampling import SeededUniforms, Uniforms
from fed_dpprune.dpsgd.noise import NoiseSource, SeededNoise
from fed_dpprune.errors import ClientFault, LedgerError, WireError
from fed_dpprune.federation import broadcast, messages
from fed_dpprune.federation import client as client_module
from fed_dpprune.federation.client import ClientRuntime
from fed_dpprune.federation.model_store import model_digest
from fed_dpprune.federation.secrets import OsSecrets, SeededSecrets
from fed_dpprune.federation.supports import Supports
from fed_dpprune.federation.terms import REPLY_CODES, RoundTerms, config_digest, from_wire
from fed_dpprune.plan import sample_rate
from fed_dpprune.privacy.policy import REFUSAL_CODES

CODES = REPLY_CODES.keys() | REFUSAL_CODES.keys()
WHO = 1


@pytest.fixture(scope="module")
def conf() -> cfg.Config:
    return small_run.config()


@pytest.fixture(scope="module")
def simulated(conf, tmp_path_factory):
    """What client WHO was asked, round by round, and what its simulated self answered."""
    _, tap = small_run.run(conf, tmp_path_factory.mktemp("simulated") / "out")
    asked = {number: tap.requests[number, WHO][0] for number in range(1, 5)}
    answered = {number: small_run.without_note(tap.replies[number, WHO][0]) for number in range(1, 5)}
    return asked, answered


@pytest.fixture(scope="module")
def asked(simulated) -> dict[int, RecordDict]:
    return simulated[0]


@pytest.fixture
def client(conf, tmp_path) -> OwnClient:
    """A client that has answered round 1."""
    return own_client(conf, WHO, tmp_path)


@pytest.fixture
def met(client, asked) -> OwnClient:
    assert status(client.runtime.train(asked[1])) == "ok"
    return client


def status(reply: RecordDict) -> str:
    return str(reply["reply"]["status"])


def frozen(reply: RecordDict) -> bytes:
    return messages.freeze(reply)


def assert_refused(client: OwnClient, content: RecordDict, code: str | None = None) -> None:
    """A typed refusal: nothing charged, no gradient, nothing but the word and the echoes."""
    before = client.charges(), len(client.gradients)
    reply = client.runtime.train(content)
    assert (client.charges(), len(client.gradients)) == before
    assert set(reply) == {"reply"}
    assert set(reply["reply"]) == set(messages.REPLY_FIELDS)
    assert status(reply) in CODES - {"ok"}
    if code:
        assert status(reply) == code


# --- answers --------------------------------------------------------------------------------------------------------------


def test_a_client_with_its_own_ledger_answers_what_a_simulated_one_does(conf, simulated, tmp_path):
    asked, answered = simulated
    client = own_client(conf, WHO, tmp_path, secrets=SeededSecrets(conf.seed))
    for number, content in asked.items():
        assert frozen(client.runtime.train(content)) == frozen(answered[number])
    assert client.charges() == len(asked)


def test_steps_executed_are_steps_charged(met, conf):
    (entry,) = met.ledger.history(str(WHO))
    assert entry.steps == len(met.gradients) == conf.federation.local_steps


def test_a_reply_holds_the_allowed_fields_and_one_array_alone(client, asked):
    reply = client.runtime.train(asked[1])
    assert set(reply) == {"reply", "update"}
    assert set(reply["reply"]) == {"status", "request", "round", "digest", "fingerprint"}
    assert list(reply["update"]) == ["payload"]
    assert len(messages.payload_of(reply, "update")) == 4 * asked[1]["terms"]["live"]


def test_a_hello_holds_public_facts_alone(client):
    hello = client.runtime.hello(RecordDict())
    assert set(hello) == {"hello"}
    assert set(hello["hello"]) == {"status", "partition-id", "nominal-size", "ledger", "fingerprint", "config"}


def test_only_the_noised_values_depend_on_the_data(conf, asked, tmp_path):
    """Other data under identical randomness: every field, the number of bytes and every refusal are the same."""
    other = own_client(conf, WHO, tmp_path / "other", secrets=SeededSecrets(conf.seed))
    mine = own_client(conf, WHO, tmp_path / "mine", secrets=SeededSecrets(conf.seed))
    share = mine.runtime._setup.share()
    other.runtime._setup.share = lambda: type(share)(share.examples, share.indices[::-1][:30], share.nominal_size)
    replies = [c.runtime.train(asked[1]) for c in (mine, other)]
    assert dict(replies[0]["reply"]) == dict(replies[1]["reply"])
    payloads = [messages.payload_of(r, "update") for r in replies]
    assert len(payloads[0]) == len(payloads[1])
    assert payloads[0] != payloads[1]
    assert messages.message_bytes(replies[0]) == messages.message_bytes(replies[1])
    bent = with_record(asked[2], "terms", noise_multiplier=0.0)
    assert frozen(mine.runtime.train(bent)) == frozen(other.runtime.train(bent))


def test_an_empty_batch_is_released_as_noise_and_charged(asked, tmp_path):
    conf = small_run.config(**{"privacy.expected-batch": 0.01})
    client = own_client(conf, WHO, tmp_path, secrets=SeededSecrets(0))
    rate = sample_rate(conf.privacy, 337)
    reply = client.runtime.train(with_record(asked[1], "terms", config=config_digest(conf), sample_rate=rate))
    values = np.frombuffer(messages.payload_of(reply, "update"), dtype="<f4")
    assert client.gradients == [0, 0]
    assert status(reply) == "ok"
    one_step = 1.2 * 1.0 / (rate * 337)  # momentum 0.9: the first step's noise counts 1.9 times
    assert np.std(values) == pytest.approx(one_step * math.hypot(1.9, 1.0), rel=0.15)
    assert client.charges() == 1


# --- a hostile server -----------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
FORGED = "0" * 32
HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("zero noise", {"noise_multiplier": 0.0}, "noise-multiplier-below-policy"),
    ("negative noise", {"noise_multiplier": -1.2}, "noise-multiplier-below-policy"),
    ("noise that is no number", {"noise_multiplier": NAN}, "noise-multiplier-below-policy"),
    ("infinite noise", {"noise_multiplier": INF}, "noise-multiplier-below-policy"),
    ("huge rate", {"sample_rate": 1.0}, "sample-rate-mismatch"),
    ("negative rate", {"sample_rate": -0.1}, "sample-rate-mismatch"),
    ("rate that is no number", {"sample_rate": NAN}, "sample-rate-mismatch"),
    ("too many steps", {"steps": 1001}, "config-mismatch"),
    ("one step more than the config's", {"steps": 3}, "config-mismatch"),
    ("noise that no accountant takes", {"noise_multiplier": 1e-300}, "noise-multiplier-below-policy"),
    ("noise past every range", {"noise_multiplier": 1e300}, "noise-multiplier-below-policy"),
    ("another delta below 1/N", {"delta": 9e-5}, "delta-mismatch"),
    ("a smaller delta", {"delta": 1e-9}, "delta-mismatch"),
    ("another accountant", {"accountant": "prv"}, "accountant-mismatch"),
    ("another unit", {"unit": "client"}, "accountant-mismatch"),
    ("denormal learning rate", {"learning_rate": 5e-324}, "malformed-terms"),
    ("learning rate past float32", {"learning_rate": 1e308}, "malformed-terms"),
    ("digest of a million digits", {"run": "a" * 10**6}, "malformed-terms"),
    ("digest of capitals", {"model": "A" * 32}, "malformed-terms"),
    ("word of a million letters", {"accountant": "a" * 10**6}, "malformed-terms"),
    ("a million odds", {"odds": [1] * 10**6}, "malformed-terms"),
    ("more survivors than coordinates", {"survivor_count": 2**62}, "digest-mismatch"),
    ("no steps", {"steps": 0}, "malformed-terms"),
    ("negative steps", {"steps": -2}, "malformed-terms"),
    ("large delta", {"delta": 0.5}, "delta-above-policy"),
    ("zero delta", {"delta": 0.0}, "delta-above-policy"),
    ("delta that is no number", {"delta": NAN}, "delta-above-policy"),
    ("huge clip norm", {"clip_norm": 1e9}, "clip-norm-out-of-range"),
    ("negative clip norm", {"clip_norm": -1.0}, "clip-norm-out-of-range"),
    ("clip norm that is no number", {"clip_norm": NAN}, "clip-norm-out-of-range"),
    ("learning rate that is no number", {"learning_rate": NAN}, "malformed-terms"),
    ("infinite learning rate", {"learning_rate": INF}, "malformed-terms"),
    ("negative learning rate", {"learning_rate": -1.0}, "malformed-terms"),
    ("private support", {"provenance": "private"}, "provenance-not-allowed"),
    ("support that claims more than its config allows", {"provenance": "random"}, "config-mismatch"),
    ("provenance of no list", {"provenance": "trust-me"}, "config-mismatch"),
    ("provenance that is no word", {"provenance": "trust me"}, "malformed-terms"),
    ("forged support digest", {"digest": FORGED}, "digest-mismatch"),
    ("forged model digest", {"model": FORGED}, "digest-mismatch"),
    ("forged survivors", {"survivors": FORGED}, "digest-mismatch"),
    ("forged layout", {"layout": FORGED}, "config-mismatch"),
    ("other live count", {"live": 17}, "digest-mismatch"),
    ("negative live count", {"live": -1}, "malformed-terms"),
    ("other code", {"fingerprint": FORGED}, "code-mismatch"),
    ("other config", {"config": FORGED}, "config-mismatch"),
    ("other protocol", {"protocol": 1}, "protocol-mismatch"),
    ("another client's terms", {"client": 2}, "config-mismatch"),
    ("endless schedule", {"rounds": 2**62}, "config-mismatch"),
    ("round past the end", {"round": 5}, "malformed-terms"),
    ("round 0", {"round": 0}, "malformed-terms"),
    ("text for a number", {"steps": "2"}, "malformed-terms"),
    ("whole number for a fraction", {"clip_norm": 1}, "malformed-terms"),
    ("an unknown field", {"seed_of_the_noise": 7}, "malformed-terms"),
    ("a missing field", {"clip_norm": None}, "malformed-terms"),
    ("odds that no draw uses", {"odds": [1, 2]}, "malformed-terms"),
]


@pytest.mark.parametrize(("changes", "code"), [pytest.param(c, w, id=n.replace(" ", "-")) for n, c, w in HOSTILE])
def test_hostile_terms_are_refused_with_nothing_computed_or_charged(met, asked, changes, code):
    assert_refused(met, with_record(asked[2], "terms", **changes), code)


def _other_payloads(content: RecordDict) -> dict[str, RecordDict]:
    blob = messages.payload_of(content, "model")

    def holding(record: Any) -> RecordDict:
        return RecordDict({**dict(content), "model": record})

    def array(values: Any) -> ArrayRecord:
        return ArrayRecord({"payload": Array(values)})

    raw = np.frombuffer(blob, dtype=np.uint8)
    return {
        "shorter": holding(array(raw[:-4])),
        "longer": holding(array(np.concatenate([raw, raw[:4]]))),
        "empty": RecordDict({name: record for name, record in content.items() if name != "model"}),
        "floats": holding(array(raw.view("<f4"))),
        "square": holding(array(raw.reshape(2, -1))),
        "two-arrays": holding(ArrayRecord({"payload": Array(raw), "more": Array(raw)})),
        "no-array": holding(ConfigRecord({"payload": blob})),
        "other-values": holding(array(raw ^ 1)),
        "not-finite": holding(array(np.full(len(raw) // 4, np.nan, dtype="<f4").view(np.uint8))),
    }


@pytest.mark.parametrize(
    "case", ["shorter", "longer", "empty", "floats", "square", "two-arrays", "no-array", "other-values", "not-finite"]
)
def test_a_malformed_payload_is_refused_with_nothing_computed_or_charged(met, asked, case):
    assert_refused(met, _other_payloads(asked[2])[case])


@pytest.mark.parametrize("record", ["terms", "request"])
def test_a_request_without_its_records_is_refused(met, asked, record):
    assert_refused(met, RecordDict({n: r for n, r in asked[2].items() if n != record}), "malformed-terms")


@pytest.mark.parametrize("changes", [{"kind": "dance"}, {"kind": "start"}, {"base": FORGED}, {"base": None}, {"odds": [1]}])
def test_a_request_that_does_not_fit_is_refused(met, asked, changes):
    assert_refused(met, with_record(asked[2], "request", **changes))


def _mutated(content: RecordDict, rng: random.Random) -> RecordDict:
    """The request with one to three fields of one of its records replaced, dropped or added."""
    name = rng.choice(["terms", "terms", "request"])
    record = dict(content[name])
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = rng.choice([*record, "new"])
        old = record.get(key)
        if rng.random() < 0.1:
            record.pop(key, None)
        elif rng.random() < 0.3:
            record[key] = rng.choice([0, -1, 0.5, NAN, "", "x", b"", True, [], [1], [0.5], ["a"]])
        elif isinstance(old, str):
            record[key] = rng.choice(["", FORGED, old[::-1], old.upper(), "x" * 1000])
        elif isinstance(old, float):
            record[key] = rng.choice([0.0, -old, old * 1.01, NAN, INF, 1e300, 5e-324])
        else:
            record[key] = rng.choice([0, -1, 1, 2, 3, 2**31, 2**62, -(2**62)])
    return RecordDict({**dict(content), name: ConfigRecord(record)})


def test_no_mutation_of_a_request_gets_a_release_that_is_not_charged(met, asked):
    """300 seeded mutations. Each is refused with a word, or repeats what was sent, or is another round, charged as such."""
    rng = random.Random(20)
    sent: dict[str, bytes] = {}
    refused = 0
    for _ in range(300):
        content = _mutated(asked[2], rng)
        charges, gradients = met.charges(), len(met.gradients)
        reply = met.runtime.train(content)
        assert set(reply["reply"]) == set(messages.REPLY_FIELDS)
        assert status(reply) in CODES
        if met.charges() > charges:
            terms = from_wire(dict(content["terms"]))
            assert met.charges() == charges + 1
            assert len(met.gradients) - gradients == terms.steps
            sent[terms.key] = frozen(reply)
            continue
        assert len(met.gradients) == gradients
        if "update" in reply:
            assert sent[from_wire(dict(content["terms"])).key] == frozen(reply)
        else:
            refused += 1
    assert refused > 200


def test_a_round_answered_before_is_not_answered_with_changes(met, asked):
    reply = met.runtime.train(asked[2])
    assert status(reply) == "ok"
    assert_refused(met, with_record(asked[2], "terms", noise_multiplier=1.3), "round-changed")
    assert_refused(met, with_record(asked[2], "terms", learning_rate=0.5), "round-changed")


def test_a_round_older_than_one_answered_is_refused(met, asked):
    assert_refused(
        met, with_record(asked[2], "terms", live=asked[2]["terms"]["live"] + 1)
    )  # leaves the model of round 2 with the client
    assert status(met.runtime.train(asked[3])) == "ok"
    assert_refused(met, asked[2], "older-round")


def test_a_client_refuses_past_its_own_limit_whatever_the_terms_say(conf, asked, tmp_path):
    client = own_client(conf, WHO, tmp_path, max_epsilon=1.6)
    assert status(client.runtime.train(asked[1])) == "ok"
    assert_refused(client, asked[2], "budget-exhausted")
    assert_refused(client, with_record(asked[2], "terms", noise_multiplier=1.3, run="f" * 32), "budget-exhausted")


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"min_noise_multiplier": 1.3}, "noise-multiplier-below-policy"),
        ({"max_sample_rate": 0.1}, "sample-rate-above-policy"),
        ({"max_steps_per_round": 1}, "steps-above-policy"),
        ({"max_clip_norm": 0.5}, "clip-norm-out-of-range"),
        ({"allow_provenance": ("random",)}, "provenance-not-allowed"),
    ],
)
def test_each_limit_of_the_operator_stops_the_clients_round(conf, asked, tmp_path, policy, code):
    assert_refused(own_client(conf, WHO, tmp_path, **policy), asked[1], code)


@pytest.mark.parametrize("room", ["bench", "share"])
def test_the_operators_limits_are_asked_before_anything_is_built_for_a_request(conf, asked, tmp_path, monkeypatch, room):
    """Ten thousand steps, each with a support of its own, took a minute and gigabytes before the policy refused them."""
    client = own_client(conf, WHO, tmp_path, max_steps_per_round=1)
    monkeypatch.setattr(client.runtime._setup, room, lambda: pytest.fail(f"the {room} was made"))
    monkeypatch.setattr(client.runtime._setup.store, "load", lambda *_: pytest.fail("the model was looked for"))
    monkeypatch.setattr(Supports, "of", lambda *_, **__: pytest.fail("a support was drawn"))
    assert_refused(client, asked[1], "steps-above-policy")


# --- replays --------------------------------------------------------------------------------------------------------------


def test_the_same_request_gets_the_same_bytes_uncharged(met, asked):
    first = frozen(met.runtime.train(asked[2]))
    spent, gradients = met.charges(), len(met.gradients)
    assert frozen(met.runtime.train(asked[2])) == first
    assert (met.charges(), len(met.gradients)) == (spent, gradients)


def test_a_restarted_client_gives_the_stored_bytes(conf, asked, tmp_path):
    first = own_client(conf, WHO, tmp_path)
    reply = frozen(first.runtime.train(asked[1]))
    first.ledger.close()
    again = own_client(conf, WHO, tmp_path)
    assert frozen(again.runtime.train(asked[1])) == reply
    assert again.gradients == []
    assert again.charges() == 1


class Overtaken(OsSecrets):
    """While one process draws its noise, another answers the same request."""

    def __init__(self, other: ClientRuntime, content: RecordDict) -> None:
        super().__init__()
        object.__setattr__(self, "overtaking", (other, content))
        object.__setattr__(self, "seen", [])

    def noise(self, terms: RoundTerms, step: int) -> NoiseSource:
        other, content = self.overtaking
        if step == 0:
            self.seen.append(other.train(content))
        return super().noise(terms, step)


def test_two_processes_that_compute_one_request_release_one_reply(conf, asked, tmp_path):
    second = own_client(conf, WHO, tmp_path)
    secrets = Overtaken(second.runtime, asked[1])
    first = own_client(conf, WHO, tmp_path, secrets=secrets)
    reply = first.runtime.train(asked[1])
    assert status(reply) == status(secrets.seen[0]) == "ok"
    assert frozen(reply) == frozen(secrets.seen[0])
    assert first.charges() == 1


def test_answers_under_operating_system_entropy_never_repeat(conf, asked, tmp_path):
    """The same request, data and batches in two clients that do not know of each other: the noise is not the same."""
    values = []
    for place in ("a", "b"):
        np.random.seed(0)
        random.seed(0)
        reply = own_client(conf, WHO, tmp_path / place, secrets=SameBatches()).runtime.train(asked[1])
        values.append(np.frombuffer(messages.payload_of(reply, "update"), dtype="<f4").astype(np.float64))
    count = len(values[0])
    noise = (values[0] - values[1]) / np.sqrt(2)
    assert np.all(noise != 0)
    terms = from_wire(dict(asked[1]["terms"]))
    one_step = terms.noise_multiplier * terms.clip_norm / (terms.sample_rate * 337)
    # Momentum 0.9: the first step's noise counts 1.9 times, the second's once.
    assert np.std(noise) == pytest.approx(one_step * math.hypot(1.9, 1.0), rel=5 / math.sqrt(2 * count))


class SameBatches(OsSecrets):
    """Repeatable coins, noise of the operating system."""

    def uniforms(self, terms: RoundTerms, step: int) -> Uniforms:
        return SeededUniforms(0, terms.round, step)


# --- failures -------------------------------------------------------------------------------------------------------------


class Broken(SeededSecrets):
    """Fails in the middle of the private work, with the data in its text."""

    def noise(self, terms: RoundTerms, step: int) -> SeededNoise:
        raise RuntimeError("row 17 is patient Miller")


class BrokenExamples:
    """A share whose rows cannot be taken, as when the memory is gone."""

    def take(self, rows: Any) -> Any:
        raise MemoryError("row 17 is patient Miller")


class BrokenEngine:
    """A net that fails on what it sees."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def clipped_sum(self, x: Any, y: Any, clipping: Any) -> Any:
        raise IndexError("label 17 is patient Miller's")


def _break(client: OwnClient, what: str) -> None:
    """Let the charged work of a client fail."""
    setup = client.runtime._setup
    if what == "noise":
        setup.secrets = Broken(0)
    elif what == "share":
        whole = setup.share()
        setup.share = lambda: type(whole)(BrokenExamples(), whole.indices, whole.nominal_size)
    else:
        bench = setup.bench
        setup.bench = lambda: replace(bench(), gradient=BrokenEngine(bench().gradient))


@pytest.mark.parametrize("what", ["noise", "share", "engine"])
def test_a_failure_after_the_charge_is_a_release_that_nobody_can_tell(conf, asked, tmp_path, what):
    """One outcome a charge: status, fields and length are those of a round that went well, and it is stored."""
    well, ill = own_client(conf, WHO, tmp_path / "well"), own_client(conf, WHO, tmp_path / "ill")
    _break(ill, what)
    replies = [client.runtime.train(asked[1]) for client in (well, ill)]
    assert dict(replies[0]["reply"]) == dict(replies[1]["reply"])
    assert messages.message_bytes(replies[0]) == messages.message_bytes(replies[1])
    assert b"Miller" not in frozen(replies[1])
    assert frozen(ill.runtime.train(asked[1])) == frozen(replies[1])
    assert ill.charges() == 1


@pytest.mark.parametrize("what", ["share", "engine"])
def test_a_failed_round_releases_the_noise_of_an_empty_one(asked, tmp_path, what):
    """The same values, to the bit, as when no example is in any batch."""
    conf = small_run.config(**{"sparsity.drop.method": "random", "sparsity.drop.rate": 0.3})
    terms = {"config": config_digest(conf)}
    payloads = []
    for place in ("empty", "ill"):
        client = own_client(conf, WHO, tmp_path / place, secrets=SeededSecrets(0))
        if place == "ill":
            _break(client, what)
        else:
            share = client.runtime._setup.share()
            nobody = type(share)(share.examples, share.indices[:0], share.nominal_size)
            client.runtime._setup.share = lambda nobody=nobody: nobody
        bent = with_record(asked[1], "terms", **terms, **_support_of(conf, client, asked[1]))
        reply = client.runtime.train(bent)
        assert status(reply) == "ok"
        payloads.append(messages.payload_of(reply, "update"))
    assert payloads[0] == payloads[1]
    assert np.std(np.frombuffer(payloads[0], dtype="<f4")) > 0


def _support_of(conf: cfg.Config, client: OwnClient, content: RecordDict) -> dict[str, Any]:
    """Digest and size of the round's support under another config."""
    runtime = client.runtime
    terms, parcel = from_wire(dict(content["terms"])), messages.read_request(content)
    bench = runtime._setup.bench()
    begin = runtime._receive(terms, parcel, parcel.payload, bench)
    live = Supports(conf, bench.layout, begin.survivors, terms.seed).of(1, WHO, begin.model)
    return {"digest": live.support.digest, "live": live.support.k}


def test_a_ledger_that_cannot_be_trusted_stops_the_client(met, asked, tmp_path):
    (tmp_path / "client.sqlite").rename(tmp_path / "elsewhere.sqlite")
    gradients = len(met.gradients)
    reply = met.runtime.train(asked[2])
    assert status(reply) == "ledger-failed"
    assert set(reply) == {"reply"}
    assert len(met.gradients) == gradients


@pytest.mark.parametrize("rate", [1e-30, 1e25, 1e30])
def test_weights_that_overflow_after_the_charge_saturate(met, asked, rate):
    """An error would tell how large the noised values were, and a second try would draw fresh noise for the same charge."""
    bent = with_record(asked[2], "terms", learning_rate=rate)
    reply = met.runtime.train(bent)
    values = np.frombuffer(messages.payload_of(reply, "update"), dtype="<f4")
    assert status(reply) == "ok"
    assert np.isfinite(values).all()
    assert len(values) == bent["terms"]["live"]
    assert (np.abs(values).max() == np.finfo(np.float32).max) == (rate > 1)
    assert frozen(met.runtime.train(bent)) == frozen(reply)
    assert met.charges() == 2


def test_a_model_that_is_not_finite_is_refused_before_the_charge(met, asked, monkeypatch):
    """A replayed release may lead there; no payload of plain values can."""
    receive = ClientRuntime._update

    def overflowing(self, *arguments):
        begin = receive(self, *arguments)
        model = begin.model.copy()
        model[3] = np.inf
        return type(begin)(model, begin.survivors)

    monkeypatch.setattr(ClientRuntime, "_update", overflowing)
    terms, parcel = from_wire(dict(asked[2]["terms"])), messages.read_request(asked[2])
    broken = overflowing(met.runtime, terms, parcel, parcel.payload, met.runtime._setup.bench())
    assert_refused(met, with_record(asked[2], "terms", model=model_digest(broken.model)), "model-not-finite")


def test_a_reply_that_cannot_be_stored_does_not_leave(met, asked, monkeypatch):
    """A full disk: one public word. Asked again, the client computes anew under the same charge, for nothing had left."""
    guard = met.runtime._setup.guard
    with monkeypatch.context() as patched:
        patched.setattr(guard.ledger, "store_reply", lambda *_: (_ for _ in ()).throw(LedgerError("ledger", "disk full")))
        reply = met.runtime.train(asked[2])
        assert status(reply) == "ledger-failed"
        assert set(reply) == {"reply"}
    again = met.runtime.train(asked[2])
    assert status(again) == "ok"
    assert frozen(met.runtime.train(asked[2])) == frozen(again)
    assert met.charges() == 2


def test_the_data_are_loaded_before_the_charge(met, asked):
    """A node that cannot load its data says so for nothing; after the charge it would be an outcome of its own."""

    def missing() -> Any:
        raise OSError("no such file")

    met.runtime._setup.share = missing
    assert_refused(met, asked[2], "internal-error")


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("point", ["charged", "computed", "stored"])
def test_after_a_kill_the_request_gets_one_reply_and_no_second_charge(conf, asked, tmp_path, monkeypatch, point):
    """Whatever point between charge and sending the process dies at, one reply leaves in the end."""
    first = own_client(conf, WHO, tmp_path)
    guard = first.runtime._setup.guard
    admit, keep = guard.admit, guard.keep
    left: list[bytes] = []

    def die(*_: Any) -> Any:
        raise Killed

    def charged(terms):
        admit(terms)
        die()

    def stored(terms, reply):
        left.append(keep(terms, reply))
        die()

    monkeypatch.setattr(guard, *{"charged": ("admit", charged), "computed": ("keep", die), "stored": ("keep", stored)}[point])
    with pytest.raises(Killed):
        first.runtime.train(asked[1])
    first.ledger.close()
    second = own_client(conf, WHO, tmp_path)
    reply = frozen(second.runtime.train(asked[1]))
    assert not left or left == [reply]
    assert (len(second.gradients) == 0) == (point == "stored")
    assert frozen(second.runtime.train(asked[1])) == reply
    assert second.charges() == 1


class Interleaved(OsSecrets):
    """Lets other threads ask while this one is at work on its first step, and gives them time to get somewhere."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "others", [])

    def noise(self, terms: RoundTerms, step: int) -> NoiseSource:
        waiting, self.others[:] = list(self.others), []
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join(timeout=0.3)
        return super().noise(terms, step)


def test_threads_that_ask_one_request_get_one_reply_and_one_computation(conf, asked, tmp_path):
    """Engine, weights and support are the process's: a second thread waits for the first, and then finds its reply."""
    secrets = Interleaved()
    client = own_client(conf, WHO, tmp_path, secrets=secrets)
    replies: list[bytes] = []
    threads = [Thread(target=lambda: replies.append(frozen(client.runtime.train(asked[1])))) for _ in range(3)]
    secrets.others.extend(threads)
    replies.append(frozen(client.runtime.train(asked[1])))
    for thread in threads:
        thread.join()
    assert len(replies) == 4
    assert len(set(replies)) == 1
    assert client.charges() == 1
    assert len(client.gradients) == conf.federation.local_steps


def _answer_elsewhere(conf: cfg.Config, folder: Path, content: RecordDict) -> bytes:
    return frozen(own_client(conf, WHO, folder).runtime.train(content))


def test_processes_that_ask_one_request_get_one_reply(conf, asked, tmp_path):
    """Three processes of one node, each with noise of its own: the first reply that is stored is what leaves all three."""
    own_client(conf, WHO, tmp_path).ledger.close()
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_answer_elsewhere, conf, tmp_path, asked[1]) for _ in range(3)]
        replies = {job.result() for job in jobs}
    assert len(replies) == 1
    assert own_client(conf, WHO, tmp_path).charges() == 1


def test_a_forgotten_reply_is_a_refusal_and_never_computed_again(met, asked):
    assert status(met.runtime.train(asked[2])) == "ok"
    met.ledger.forget_replies(before_round=10)
    assert_refused(met, asked[2], "older-round")


def test_a_client_that_lost_its_model_asks_for_it(conf, asked, tmp_path):
    client = own_client(conf, WHO, tmp_path)
    assert_refused(client, asked[2], "need-resync")


def test_an_unreadable_folder_of_models_is_a_typed_failure(met, asked, tmp_path):
    for path in Path(tmp_path / "models").iterdir():
        path.write_bytes(b"damaged")
    met.runtime._setup.store._memory.clear()
    assert_refused(met, asked[2], "need-resync")


# --- messages that would cost much ----------------------------------------------------------------------------------------


def test_what_a_client_draws_to_catch_up_is_bounded(conf, met, asked, monkeypatch):
    """A round that says it is the ten-thousandth: the client asks for the model instead of drawing ten thousand supports."""
    monkeypatch.setattr(broadcast, "MOST_DRAWS", 2)
    terms, parcel = from_wire(dict(asked[2]["terms"])), messages.read_request(asked[2])
    bench = met.runtime._setup.bench()
    with pytest.raises(ClientFault, match="need-resync"):
        met.runtime._update(replace(terms, round=4), parcel, parcel.payload, bench)


def test_the_steps_of_a_missed_round_count_where_each_has_its_own_support(conf, met, asked, monkeypatch):
    monkeypatch.setattr(broadcast, "MOST_DRAWS", 3)
    monkeypatch.setattr(Supports, "moved", lambda *_, **__: pytest.fail("a support was drawn"))
    changes = {"sparsity.freeze": cfg.Freeze(method="random", rate=0.5, refresh="step")}
    stepwise = conf.model_copy(update={"sparsity": conf.sparsity.model_copy(update={"freeze": changes["sparsity.freeze"]})})
    monkeypatch.setattr(met.runtime._setup, "config", stepwise)
    terms, parcel = from_wire(dict(asked[2]["terms"])), messages.read_request(asked[2])
    with pytest.raises(ClientFault, match="need-resync"):
        met.runtime._update(replace(terms, round=3), parcel, parcel.payload, met.runtime._setup.bench())


@pytest.mark.parametrize("told", [b"\x01" + bytes(7), b"\x20", b"\x0f"])
def test_who_answered_is_told_of_this_runs_clients_and_of_few(met, asked, monkeypatch, told):
    """Eight bytes for four clients; a client that is none; more clients than a message may make one draw supports for."""
    monkeypatch.setattr(broadcast, "MOST_DRAWS", 3)
    monkeypatch.setattr(client_module, "follows_from_clients", lambda *_: True)
    terms, parcel = from_wire(dict(asked[2]["terms"])), messages.read_request(asked[2])
    bench = met.runtime._setup.bench()
    (begin, _) = met.runtime._setup.store.load(parcel.base)
    with pytest.raises(WireError, match="answered"):
        met.runtime._missed(range(1, 2), terms, parcel, told, begin, bench.layout)
    assert len(met.runtime._missed(range(1, 2), terms, parcel, b"\x07", begin, bench.layout)) == 1


def test_a_server_sends_the_newest_model_where_a_client_would_draw_too_much(tmp_path, monkeypatch):
    """One of four clients is asked a round: with two draws allowed, who missed three rounds is sent the model."""
    changes = {"federation.clients-per-round": 1, "federation.min-clients": 1, "federation.rounds": 8}
    kinds: dict[int, set[str]] = {}
    for most in (4096, 1):
        with monkeypatch.context() as patched:
            patched.setattr(broadcast, "MOST_DRAWS", most)
            _, tap = small_run.run(small_run.config(**changes), tmp_path / str(most))
        kinds[most] = {str(c["request"]["kind"]) for found in tap.requests.values() for c in found}
    assert "newest" in kinds[1]
    assert "sync" in kinds[4096]
