"""`fed-dpprune node init` and `node check`: a SuperNode's file, written from its data, and looked through before it serves.

The file is what `flower-supernode --node-config FILE.toml` takes: TOML without tables or lists. What is counted here is
for the operator's screen alone; what the server will learn is said in the file.
"""

from __future__ import annotations

import os
import platform
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fed_dpprune import __version__, bundles, doctor, places
from fed_dpprune.data import adult, heart_disease, node_rows
from fed_dpprune.data import registry as datasets
from fed_dpprune.dotted import is_path
from fed_dpprune.errors import BadInput, ConfigError, FedDPPruneError, LedgerError
from fed_dpprune.federation import node
from fed_dpprune.privacy import locks
from fed_dpprune.privacy.ledger import Ledger

# What `init` writes where its caller names nothing. They stand in the file, to be read and changed; a node has no defaults.
PROPOSED_EPSILON, PROPOSED_NOISE, PROPOSED_ACCOUNTANT = 3.0, 1.0, "pld"
SMALLEST_SIZE = 10

TEXT = """\
# A node of fed-dpprune, for `flower-supernode --node-config {name} ...`. Check it with `fed-dpprune node check {name}`.
#
# These values become PUBLIC, the server learns them: partition-id, nominal-size, and by the net's size shape and classes.
# All others stay on this machine; of the limits the server learns only whether a request met them.
# Nothing that a server sends changes a line here, and no key has a default: without one the node does not serve.

# Which of the run's nodes this is, from 0. Public.
partition-id = {partition}
{partitions}
# The private data. Never a test set: a node trains on every row that fits. Rows that do not fit the declaration below
# (another shape, a value that is not finite, a label that is not one of the classes) count as absent, each by itself.
data = {data}

# Declared, public, and not to follow the data: leave them as they are when rows come or go.
# nominal-size is the number of rows {rounding};
# sample rates and divisors are made from it.
nominal-size = {size}
classes = {classes}
shape = {shape}

# The budget's file, for all runs on these data. Never two of them for one set of data, never a copy; a local disk.
ledger = {ledger}
# How it counts (pld, rdp or prv). Agree on it and on policy-delta with whoever starts the run: terms with others are refused.
accountant = {accountant}
policy-delta = {delta}

# PROPOSED, decide on these two: the largest epsilon over all runs, and the smallest noise multiplier of a round.
policy-max-epsilon = {epsilon}
policy-min-noise-multiplier = {noise}

# More, where you want it:
# num-partitions = 2  (so many nodes share these data, each row belongs to one of them)
# policy-max-sample-rate = 0.1
# policy-max-steps-per-round = 20
# policy-max-clip-norm = 10.0
# policy-allow-provenance = "random,data-free,public"
# policy-allow-releases = ""
# Code of this machine that a run's config may name, exact paths only: it runs with your data at hand.
# allow-code = "package.module:factory"
"""


@dataclass(frozen=True)
class Wishes:
    """What the caller of `init` sets by hand; None where the file shall hold a proposal."""

    partition: int = 0
    partitions: int | None = None
    ledger: Path | None = None
    epsilon: float | None = None
    noise: float | None = None
    delta: float | None = None
    accountant: str | None = None


def rounded(count: int) -> int:
    """A declared size from a count: two significant digits, to the nearest, in tens at least."""
    step = max(10, int(10 ** (len(str(count)) - 2)))
    return max(SMALLEST_SIZE, (count + step // 2) // step * step)


def proposed_delta(size: int) -> float:
    """The largest power of ten that is at most 1 / (10 x nominal size)."""
    return float(f"1e-{len(str(10 * size - 1))}")


def absolute(data: str) -> str:
    """The same data from any working directory: a SuperNode's is another than its operator's."""
    return data if data in datasets.TABLE or is_path(data) else str(Path(data).expanduser().absolute())


def init(data: str, out: Path | None, wishes: Wishes) -> str:
    """The text of a node's file, written to `out` where one is given.

    Raises:
        BadInput: The data cannot be read, a wish is impossible, or `out` exists. Nothing is written then.
    """
    data = absolute(data)
    found = node_rows.describe(data)
    size, declared = rounded(found.rows), found.declared
    if any("," in name for name in declared.names):
        raise BadInput(data, "a class folder has a comma in its name", "rename it")
    home = (out or Path("node.toml")).absolute().parent
    text = TEXT.format(
        name=out or "node.toml",
        partition=wishes.partition,
        partitions="" if wishes.partitions is None else _shared(wishes.partitions),
        data=_toml(data),
        rounding="rounded to the nearest of two significant digits, and of tens at least",
        size=size,
        classes=_toml(",".join(declared.names) if declared.names else declared.classes),
        shape=_toml(node_rows.shape_text(declared.shape)),
        ledger=_toml(str(wishes.ledger or home / f"ledger-{wishes.partition}" / "ledger.sqlite")),
        accountant=_toml(wishes.accountant or PROPOSED_ACCOUNTANT),
        delta=_toml(wishes.delta if wishes.delta is not None else proposed_delta(size)),
        epsilon=_toml(wishes.epsilon if wishes.epsilon is not None else PROPOSED_EPSILON),
        noise=_toml(wishes.noise if wishes.noise is not None else PROPOSED_NOISE),
    )
    node.read_node_config(tomllib.loads(text))
    if out is not None:
        _write(out, text)
    return text


def _shared(partitions: int) -> str:
    return (
        "# So many nodes share the data below; each row belongs to one of them, by a hash of its content.\n"
        f"num-partitions = {partitions}\n"
    )


def _toml(value: str | int | float) -> str:
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _write(out: Path, text: str) -> None:
    try:
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise BadInput(str(out), "exists already", "name another file") from None
    except OSError as error:
        raise BadInput(str(out), f"cannot be written ({error.strerror})", "name another place") from None


def load(path: Path) -> dict[str, Any]:
    """A node's file as Flower reads it.

    Raises:
        BadInput: Not a TOML file that Flower's SuperNode takes.
    """
    if path.suffix != ".toml":
        raise BadInput(str(path), "does not end in .toml", "Flower reads a file only by that ending")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            str(path), f"cannot be read ({error.strerror})", "`fed-dpprune node init DATA -o FILE.toml` writes one"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(str(path), f"is not TOML ({error})", "see what `fed-dpprune node init` writes") from None
    for key, value in table.items():
        if not isinstance(value, bool | int | float | str):
            raise BadInput(f"{path} {key}", "is a list or a table, which Flower's node-config cannot carry", 'write "a,b"')
    return table


@dataclass
class Report:
    """What `check` found: lines for the operator, and what keeps the node from serving."""

    lines: list[str] = field(default_factory=list)
    problems: list[FedDPPruneError] = field(default_factory=list)


def check(path: Path) -> Report:
    """Look through everything that a node needs; nothing is sent, and nothing written but the cache of a folder's images.

    Raises:
        BadInput: The file cannot be read or is incomplete: nothing else can be looked at then.
    """
    facts = node.read_node_config(load(path))
    report = Report()
    for part in (_public, _data, _ledger, _policy, _code, _versions):
        try:
            report.lines += part(facts)
        except FedDPPruneError as error:
            report.problems.append(error)
    return report


def _public(facts: node.NodeConfig) -> Iterator[str]:
    shape = node_rows.shape_text(facts.declared.shape)
    words = f"partition-id {facts.partition}, nominal-size {facts.nominal_size}, {facts.declared.classes} classes, shape {shape}"
    yield f"public     {words}: the server learns these"


def _data(facts: node.NodeConfig) -> Iterator[str]:
    try:
        rows = node_rows.read(facts.data, facts.declared)
    except FedDPPruneError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise BadInput(facts.data, f"cannot be read ({type(error).__name__}: {error})", "look at the file") from error
    absent = rows.total - rows.fitting.size
    yield f"data       {facts.data}: {rows.total} rows, {rows.fitting.size} fit, {absent} do not and count as absent (private)"
    mine = node_rows.owned(rows, facts.partition, facts.partitions)
    if facts.partitions > 1:
        yield f"           {mine.size} of them are partition {facts.partition}'s of {facts.partitions} (private)"
    if not mine.size:
        what = "no row fits the declared shape and classes, so every update would be noise"
        raise BadInput(facts.data, what, "compare shape and classes with `fed-dpprune node init DATA`")
    if not facts.nominal_size / 2 <= mine.size <= 2 * facts.nominal_size:
        yield f"           that is far from nominal-size {facts.nominal_size}: sound, but steps are larger or smaller than meant"
    why = next(filter(None, map(_why_open, _own_files(facts.data))), "")
    if why:
        yield f"           others could change these data: {why}"


def _own_files(data: str) -> Iterator[Path]:
    """The operator's own files and folders behind `data`; none for sets with a published checksum and for code."""
    if data == "adult":
        yield from filter(None, [adult.find("data")])
    elif data == "heart-disease":
        yield from filter(None, map(heart_disease.find, heart_disease.HOSPITALS))
    elif data not in datasets.TABLE and not is_path(data):
        path = Path(data).expanduser()
        yield path
        if path.is_dir():
            yield from (path / "train", *(path / "train").glob("*"), *(path / "train").glob("*/*"))


def _why_open(path: Path) -> str:
    """Why a file or folder could be changed by others; empty where it could not, and for what is no row (a link to nothing)."""
    try:
        return places.why_not_alone(path)
    except OSError:
        return ""


def _ledger(facts: node.NodeConfig) -> Iterator[str]:
    path = facts.ledger
    if path.exists():
        locks.check_private(path)
        if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
            raise LedgerError(str(path), "is read-only", "a charge must be written before anything is computed")
        with Ledger.read(path) as ledger:
            if ledger.delta != facts.policy.delta:
                why = f"counts at delta {ledger.delta:g}, policy-delta says {facts.policy.delta:g}"
                raise LedgerError(str(path), why, f"write policy-delta = {ledger.delta!r}")
            rows = ledger.head().count
        yield f"ledger     {path}: {rows} rows, the chain holds; `fed-dpprune ledger {path}` shows what is spent"
        return
    if locks.beside(path, "mark").exists():
        raise LedgerError(str(path), "is missing, and its mark says that there was one", "restore both, or ask who removed it")
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise LedgerError(str(path), f"cannot be made: {above} is not writable", "name a folder that you own")
    why = places.why_not_alone(above, passing=above != path.parent)
    if why:
        raise LedgerError(str(path), f"would not be this user's alone: {why}")
    yield f"ledger     {path}: not there yet, the first charge makes it"


def _policy(facts: node.NodeConfig) -> Iterator[str]:
    policy = facts.policy
    yield (
        f"policy     epsilon at most {policy.max_epsilon:g} at delta {policy.delta:g} by {facts.accountant}, noise multiplier "
        f"at least {policy.min_noise_multiplier:g}, rate at most {policy.max_sample_rate:g}, at most "
        f"{policy.max_steps_per_round} steps a round"
    )
    if (policy.delta or 0) * 10 * facts.nominal_size > 1:
        yield "           delta is above 1 / (10 x nominal-size): with that chance an example may be published whole"


def _code(facts: node.NodeConfig) -> Iterator[str]:
    allowed = ", ".join(facts.allow_code)
    yield f"code       a run's config may name {allowed or 'no code of this machine'}"
    running = bundles.of_this_machine()
    for pid, word in running.items():
        yield f"           flower-supernode {pid} {bundles.WORDS[word]}"
    if not running:
        yield f"           start flower-supernode with {bundles.OPTION} FILE: without it the server's side chooses the code"


def _versions(facts: node.NodeConfig) -> Iterator[str]:
    yield f"versions   fed-dpprune {__version__}, Python {platform.python_version()}"
    wrong = doctor.misfits()
    if wrong:
        raise ConfigError("packages", "; ".join(wrong), "install what is asked for, see `fed-dpprune doctor`")
