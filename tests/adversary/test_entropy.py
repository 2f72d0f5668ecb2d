"""From the operating system's entropy to each noise value and each coin of a deployed client: all of it, and nothing else.

Shown by instrumentation: `os.urandom` is counted and replaced by chosen bytes, under which the draws must be a function of
all 256 bits of one key, used in one call; and every generator of numpy, torch and the standard library is replaced by one
that raises, under which the draws must go on.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import math
import multiprocessing
import os
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fed_dpprune import config as cfg
from fed_dpprune.data import sampling
from fed_dpprune.data.dataset import Examples
from fed_dpprune.data.sampling import OsUniforms, PoissonBatches, SeededUniforms, poisson
from fed_dpprune.dpsgd import noise
from fed_dpprune.dpsgd.noise import OsNoise
from fed_dpprune.federation import local_train
from fed_dpprune.federation.secrets import OsSecrets
from fed_dpprune.federation.workbench import workbench
from fed_dpprune.sparsity.support import dense

KEY = 32  # bytes, 256 bits: twice what the claim asks for
PACKAGE = Path(__file__).resolve().parents[2] / "fed_dpprune"
# All of the terms that a private step looks at.
TERMS: Any = SimpleNamespace(
    round=2, client=0, key="k", sample_rate=0.25, noise_multiplier=1.5, clip_norm=0.5, steps=3, learning_rate=1.0
)

DRAWS: dict[str, Callable[[], np.ndarray]] = {
    "noise": lambda: OsSecrets().noise(TERMS, 0).normal(5),
    "coins": lambda: OsSecrets().uniforms(TERMS, 0).words(5),
    "batches": lambda: np.concatenate([np.asarray(b, dtype=np.int64) for b in PoissonBatches(400, 0.5, 1)]),
}


class Entropy:
    """The operating system's entropy in the test's hand: what was asked for, and what is given."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.given: list[bytes] = []
        self.next: Callable[[int], bytes] = self.system
        self.system_call = os.urandom

    def system(self, size: int) -> bytes:
        return self.system_call(size)

    def __call__(self, size: int) -> bytes:
        self.asked.append(size)
        self.given.append(self.next(size))
        return self.given[-1]


@pytest.fixture
def entropy(monkeypatch) -> Entropy:
    entropy = Entropy()
    monkeypatch.setattr(os, "urandom", entropy)
    return entropy


# --- every bit of the key, and nothing beside it ----------------------------------------------------------------------------


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_asks_for_256_bits_once_and_is_a_function_of_them(entropy, draw):
    entropy.next = lambda size: bytes(range(size))
    first = draw()
    assert entropy.asked == [KEY]
    assert draw().tobytes() == first.tobytes(), "something else than the key went into it"
    entropy.next = entropy.system
    assert draw().tobytes() != first.tobytes()


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_each_of_the_256_bits_changes_what_is_drawn(entropy, draw):
    """So that many values are possible: 257 keys at distance one give 257 results, each value of each its own."""
    key = hashlib.sha256(b"a key").digest()
    results = []
    for bit in range(-1, 8 * KEY):
        chosen = int.from_bytes(key, "little") ^ (1 << bit if bit >= 0 else 0)
        entropy.next = lambda size, chosen=chosen: chosen.to_bytes(KEY, "little")[:size]
        results.append(draw())
    assert len({result.tobytes() for result in results}) == 8 * KEY + 1
    if results[0].size == 5:
        for value in range(5):
            assert len({result[value] for result in results}) == 8 * KEY + 1, "a value that part of the key does not reach"


def test_values_and_coins_are_the_standards_key_stream(entropy):
    """The bytes are ChaCha20's of the given key (RFC 8439), by an implementation of the test's own."""
    entropy.next = lambda size: bytes(range(size))
    stream = b"".join(_block(bytes(range(KEY)), counter) for counter in range(5))
    assert OsUniforms().words(10).tobytes() == stream[:80]
    words = np.frombuffer(stream[: 8 * 4 * 6], dtype="<u8")
    expected = noise._box_muller(words.astype(np.uint64)).reshape(4, 6).sum(axis=0)[:5] / 2
    assert OsNoise().normal(5).tobytes() == expected.tobytes()


def _block(key: bytes, counter: int) -> bytes:
    """One block of ChaCha20 with a nonce of zeros."""
    words = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574]
    words += [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)] + [counter, 0, 0, 0]
    state = list(words)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for target, source, other, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[target] = (state[target] + state[source]) & 0xFFFFFFFF
            mixed = state[other] ^ state[target]
            state[other] = (mixed << turn | mixed >> (32 - turn)) & 0xFFFFFFFF

    for _ in range(10):
        for place in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)):
            quarter(*place)
        for place in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            quarter(*place)
    return b"".join(((a + b) & 0xFFFFFFFF).to_bytes(4, "little") for a, b in zip(state, words, strict=True))


def test_a_long_draw_never_repeats_a_block_of_its_stream():
    drawn = OsNoise().normal(3 * noise._BLOCK + 1)
    assert len(np.unique(drawn)) == drawn.size
    words = OsUniforms().words(200_000)
    assert len(np.unique(words)) == words.size


# --- no other generator is reachable ------------------------------------------------------------------------------------------


class Reached(BaseException):
    """A generator that a seed could steer was asked; no handler of ordinary errors hides it."""


def _raise(*_: Any, **__: Any) -> Any:
    raise Reached


@pytest.fixture
def no_generators(monkeypatch) -> None:
    """Every door to numpy's, torch's and the standard library's generators raises."""
    torch = pytest.importorskip("torch")
    for name in ("Generator", "Philox", "PCG64", "PCG64DXSM", "MT19937", "SFC64", "SeedSequence", "RandomState", "default_rng"):
        monkeypatch.setattr(np.random, name, _raise)
    for name in dir(np.random):
        if callable(getattr(np.random, name)) and not name.startswith("_") and name[0].islower():
            monkeypatch.setattr(np.random, name, _raise)
    for name in dir(random):
        if callable(getattr(random, name)) and not name.startswith("_"):
            monkeypatch.setattr(random, name, _raise)
    drawn = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "rand_like", "randn_like")
    for name in (*drawn, "Generator", "manual_seed", "seed", "initial_seed"):
        monkeypatch.setattr(torch, name, _raise)
    for name in ("normal_", "uniform_", "random_", "bernoulli_", "exponential_"):
        monkeypatch.setattr(torch.Tensor, name, _raise)


@pytest.fixture(scope="module")
def round_of_a_client() -> Callable[[], np.ndarray]:
    """One round of private steps with the secrets of a deployed client; returns what moved."""
    from fed_dpprune.federation import start
    from fed_dpprune.sparsity.recipe import RoundSupport

    frozen = {"sparsity.freeze.method": "none", "sparsity.freeze.rate": 0.0}
    config = cfg.build({"model.hidden": [4], "client.momentum": 0.0, "privacy.noise-multiplier": 1.5, **frozen})
    bench = workbench(config.model, config.engine, (6,), 3)
    every = dense(bench.layout.d)
    weights = start.public_weights(bench.layout, 3)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (30, 6)).astype(np.float32), rng.integers(0, 3, 30)
    share = local_train.Share(Examples(x, y), np.arange(30), 30)
    live = RoundSupport(every, lambda step: every)

    def act() -> np.ndarray:
        return local_train.train(config, TERMS, live, every, weights, bench.gradient, share, OsSecrets())

    act()  # the engine proves its layer rules at its first use, on inputs that it makes up from public seeds
    return act


def test_a_round_of_a_deployed_client_reaches_no_generator_but_the_systems(round_of_a_client, entropy, no_generators):
    moved = round_of_a_client()
    assert np.isfinite(moved).all() and (moved != 0).all()
    assert entropy.asked == [KEY] * (2 * TERMS.steps), "one key for the coins and one for the noise of each step"
    assert len(set(entropy.given)) == 2 * TERMS.steps


def test_a_round_is_steered_by_no_seed_and_by_every_key(round_of_a_client, entropy):
    import torch

    def seeded() -> bytes:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return round_of_a_client().tobytes()

    assert seeded() != seeded()
    keys = [hashlib.sha256(bytes([number])).digest() for number in range(2 * TERMS.steps)]

    def replayed(number: int = -1) -> bytes:
        order = iter([bytes([key[0] ^ (place == number)]) + key[1:] for place, key in enumerate(keys)])
        entropy.next = lambda size: next(order)
        return round_of_a_client().tobytes()

    assert replayed() == replayed(), "under the same keys it is the same round: nothing else steers it"
    assert len({replayed(), *(replayed(number) for number in range(2 * TERMS.steps))}) == 2 * TERMS.steps + 1


def test_the_draws_go_on_where_every_generator_raises(no_generators):
    with pytest.raises(Reached):
        np.random.default_rng(0)
    for draw in DRAWS.values():
        assert draw().size


def test_a_system_without_entropy_gives_no_draw_instead_of_another_source(entropy):
    def empty(size: int) -> bytes:
        raise NotImplementedError("no source of entropy")

    entropy.next = empty
    for draw in DRAWS.values():
        with pytest.raises(NotImplementedError, match="no source"):
            draw()


def test_a_short_answer_of_the_system_gives_no_draw(entropy):
    entropy.next = lambda size: bytes(size - 1)
    for draw in DRAWS.values():
        with pytest.raises(ValueError, match="key"):
            draw()


def test_seeded_sources_are_named_only_where_a_run_builds_the_client_itself():
    """By the calls in the sources: whoever else could make one could hide a seed behind the label of the system's."""
    users: dict[str, set[str]] = {"SeededNoise": set(), "SeededUniforms": set(), "SeededSecrets": set()}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else node
            name = getattr(called, "id", getattr(called, "attr", ""))
            if isinstance(node, ast.Call) and name in users:
                users[name].add(path.relative_to(PACKAGE).as_posix())
    assert users["SeededNoise"] == {"federation/secrets.py"}
    assert users["SeededUniforms"] <= {"federation/secrets.py", "dpsgd/privacy_engine.py"}
    assert users["SeededSecrets"] <= {"federation/simulation.py", "federation/run.py"}


# --- a key is used once and kept nowhere ------------------------------------------------------------------------------------


def test_no_two_draws_share_a_key_whatever_thread_or_instance(entropy):
    def several() -> None:
        for _ in range(20):
            for draw in DRAWS.values():
                draw()

    threads = [threading.Thread(target=several) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entropy.given) == len(set(entropy.given)) == 4 * 20 * len(DRAWS)


def _report(pipe: Any) -> None:
    """In a child: its keys, and what it drew with them."""
    entropy = Entropy()
    os.urandom = entropy  # type: ignore[assignment]
    drawn = [draw().tobytes() for draw in DRAWS.values()]
    pipe.send((entropy.given, drawn))
    pipe.close()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_share_neither_keys_nor_values(start, monkeypatch):
    monkeypatch.setattr(os, "urandom", os.urandom)
    for draw in DRAWS.values():  # a warm parent
        draw()
    context = multiprocessing.get_context(start)
    reports = []
    for _ in range(2):
        ours, theirs = context.Pipe()
        child = context.Process(target=_report, args=(theirs,))
        child.start()
        reports.append(ours.recv())
        child.join()
    keys = [key for given, _ in reports for key in given]
    assert len(set(keys)) == len(keys) == 2 * len(DRAWS)
    drawn = [blob for _, values in reports for blob in values] + [draw().tobytes() for draw in DRAWS.values()]
    assert len(set(drawn)) == 3 * len(DRAWS)


@pytest.mark.parametrize("name", ["noise", "coins"])
def test_a_real_fork_in_the_middle_of_a_draw_gives_the_child_nothing(name, monkeypatch):
    """Another thread's fork copies a key that is in use: the parent goes on, the child must not release what it draws."""
    module, kind = (noise, "Cipher") if name == "noise" else (sampling, "Cipher")
    real, pipes = getattr(module, kind), os.pipe()
    child: list[int] = []

    def forking(*arguments: Any, **keywords: Any) -> Any:
        made = real(*arguments, **keywords)
        if not child:
            child.append(os.fork())
        return made

    monkeypatch.setattr(module, kind, forking)
    try:
        drawn = DRAWS[name]()
    except RuntimeError as error:
        if child == [0]:
            os.write(pipes[1], f"refused: {error}".encode())
            os._exit(0)
        raise
    if child == [0]:
        os.write(pipes[1], b"drawn")
        os._exit(0)
    os.close(pipes[1])
    with os.fdopen(pipes[0], "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child[0], 0)
    assert drawn.size == 5 and answer.startswith("refused: the process was forked")


@pytest.mark.parametrize("source", [OsNoise(), OsUniforms(), OsSecrets()], ids=lambda source: type(source).__name__)
def test_a_source_holds_no_state_that_a_copy_could_repeat(source, entropy):
    for _ in range(2):
        if isinstance(source, OsSecrets):
            source.noise(TERMS, 0).normal(5)
        else:
            (source.normal if isinstance(source, OsNoise) else source.words)(5)
    blob = pickle.dumps(source)
    assert blob == pickle.dumps(type(source)())
    assert all(key not in blob for key in entropy.given) and len(entropy.given) == 2
    held = [value for value in gc.get_referents(source) if isinstance(value, (bytes, bytearray, np.ndarray))]
    assert held == [] and set(getattr(source, "__dict__", {})) <= {"label"}


@pytest.mark.parametrize("name", ["noise", "coins"])
def test_a_failure_in_the_middle_carries_no_key_out(name, entropy, monkeypatch):
    """An exception keeps the frames of its calls, and a log or debugger may show their variables."""
    module = noise if name == "noise" else sampling

    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(module.np, "frombuffer", failing)
    with pytest.raises(MemoryError) as caught:
        DRAWS[name]()
    (key,) = entropy.given
    trace, seen = caught.value.__traceback__, []
    while trace is not None:
        code = trace.tb_frame.f_code
        if Path(code.co_filename).is_relative_to(PACKAGE):
            seen += list(trace.tb_frame.f_locals.values())
        trace = trace.tb_next
    assert seen, "the frames of the draw were looked at"
    assert all(value != key for value in seen if isinstance(value, (bytes, bytearray)))
    assert all(key not in repr(value).encode() and key.hex() not in repr(value) for value in seen)
    assert key not in pickle.dumps(caught.value)


# --- coins for a torch loader -------------------------------------------------------------------------------------------------


def test_a_torch_loader_draws_poisson_batches_whatever_is_seeded():
    torch = pytest.importorskip("torch")
    from torch.utils.data import DataLoader, TensorDataset

    rows = TensorDataset(torch.arange(400))
    passes = []
    for _ in range(2):
        torch.manual_seed(0)
        loader = DataLoader(rows, batch_sampler=PoissonBatches(400, 0.25, 6))
        passes.append([batch[0].tolist() for batch in loader])
    assert passes[0] != passes[1] and len(passes[0]) == 6
    sizes = [len(batch) for batches in passes for batch in batches]
    assert len(set(sizes)) > 1 and abs(np.mean(sizes) - 100) < 5 * math.sqrt(400 * 0.25 * 0.75 / len(sizes))


def test_given_coins_are_known_as_such_and_give_the_batches_of_the_sampler():
    batches = PoissonBatches(100, 0.3, 4, SeededUniforms(1, "test"))
    source = SeededUniforms(1, "test")
    assert batches.seeded and not PoissonBatches(100, 0.3, 4).seeded
    assert list(batches) == [poisson(100, 0.3, source).tolist() for _ in range(len(batches))]


def test_a_source_that_only_looks_like_the_systems_counts_as_given():
    class Forged(OsUniforms):
        def words(self, count: int) -> np.ndarray:
            return np.zeros(count, dtype=np.uint64)

    assert PoissonBatches(10, 0.5, 1, Forged()).seeded
    assert PoissonBatches(10, 0.5, 1, SimpleNamespace(words=lambda count: np.zeros(count, np.uint64))).seeded


@pytest.mark.parametrize(("count", "rate", "steps"), [(5, 0.0, 1), (5, 1.5, 1), (-1, 0.5, 1), (5, 0.5, -1)])
def test_impossible_batches_are_refused_when_they_are_named(count, rate, steps):
    with pytest.raises(ValueError, match="must"):
        PoissonBatches(count, rate, steps)
