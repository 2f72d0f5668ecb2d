"""The accountants by name, one interface: epsilon of a history at a delta, for adding or removing one example.

Every figure goes through `_figures`: canonical form, memory, cache, accountant, in that order. So the plan, the run, the
ledger and a second process get the same float for the same history. An accountant that fails is replaced by a sound one
(RDP, then RDP at whole orders), never by "nothing spent"; so is one that would take too long or too much memory, or whose
figure would not hold at this delta.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fed_dpprune.config import REFUSED
from fed_dpprune.errors import ConfigError
from fed_dpprune.privacy import renyi
from fed_dpprune.privacy.cache import Figures
from fed_dpprune.privacy.history import Entry, as_one, merge

REVISION = 3  # 3: prv gives way at a tiny delta
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accountant:
    """Where an accountant's code is and which library it stands on."""

    module: str
    library: str


ACCOUNTANTS: dict[str, Accountant] = {
    "pld": Accountant("fed_dpprune.privacy.accountants.pld", "dp-accounting"),
    "rdp": Accountant("fed_dpprune.privacy.accountants.rdp", "dp-accounting"),
    "prv": Accountant("fed_dpprune.privacy.accountants.prv", "opacus"),
}
# The one that stands beside another as the independent second figure.
SECOND = {"pld": "rdp", "rdp": "pld", "prv": "rdp"}

History = tuple[Entry, ...]
_memory: dict[str, dict[str, float]] = {}


def lookup(accountant: str) -> Accountant:
    """The row of an accountant.

    Raises:
        ConfigError: An unknown name; `gdp`, with the reason.
    """
    if accountant == "gdp":
        raise ConfigError("privacy.accountant", *REFUSED["privacy.accountant", "gdp"])
    if accountant not in ACCOUNTANTS:
        raise ConfigError("privacy.accountant", f"{accountant!r} is not an accountant", f"use one of {' | '.join(ACCOUNTANTS)}")
    return ACCOUNTANTS[accountant]


@lru_cache(maxsize=16)
def version(accountant: str) -> str:
    """Name, library and version, as printed beside every epsilon: "pld (dp-accounting 0.6.0)"."""
    library = lookup(accountant).library
    return f"{accountant} ({library} {importlib.metadata.version(library)})"


def versions() -> str:
    """All accountants with their libraries' versions."""
    return ", ".join(version(name) for name in ACCOUNTANTS)


def check_delta(delta: float) -> None:
    """Refuse a delta that no figure can be computed for."""
    if not 0 < delta < 1:
        raise ConfigError("privacy.delta", f"{delta!r} is not between 0 and 1", "use something below 1 / number of examples")


def _module(accountant: str) -> Any:
    return importlib.import_module(lookup(accountant).module)


def load(history: Sequence[Entry], delta: float, accountant: str) -> float:
    """What a figure would cost, 1 being the most that is allowed; told in milliseconds, from bounds alone.

    So a setting that a hostile server chose is judged in bounded time and memory: past 1 the looser bound is the figure.
    """
    try:
        return float(_module(accountant).load(merge(history), delta))
    except ArithmeticError:  # numbers past every float
        return math.inf


def compute(history: History, delta: float, accountant: str) -> tuple[float, bool]:
    """(epsilon, whether the named accountant itself gave it) of one canonical history; no memory, no cache."""
    if not history:
        return 0.0, True
    for name in dict.fromkeys((accountant, "rdp")):
        if load(history, delta, name) > 1.0:
            _log.info("accountant %s takes too long, or does not hold, for this history and delta; taking a looser one", name)
            continue
        try:
            figure = _module(name).epsilons([history], delta)[0]
        except (ArithmeticError, ValueError, RuntimeError, MemoryError, IndexError, TypeError) as error:
            _log.info("accountant %s failed (%s); falling back to a looser one", name, error)
            continue
        # A figure that is no number, or infinite where a looser bound may be finite, is a failure as well.
        if math.isfinite(figure):
            return max(0.0, float(figure)), name == accountant
    return renyi.epsilon(history, delta), False


def _family(history: History, delta: float, accountant: str) -> str:
    """Everything that a figure depends on but the step counts."""
    settings = ";".join(f"{entry.sample_rate!r},{entry.noise_multiplier!r}" for entry in history)
    return f"epsilon {version(accountant)} revision {REVISION} delta {delta!r} settings {settings}"


def _known(history: History, delta: float, accountant: str, cache: Figures) -> tuple[dict[str, float], str, str]:
    """(figures of the history's family in memory, the family, the history's key); the cache is read when needed."""
    family = _family(history, delta, accountant)
    key = ",".join(str(entry.steps) for entry in history)
    known = _memory.get(family, {})
    if key not in known and (found := cache.read(family)):
        known = _memory.setdefault(family, known)
        known.update(found)
    return known, family, key


def _figures(
    histories: Sequence[History],
    delta: float,
    accountant: str,
    cache: Figures | None,
    keep: Callable[[float], bool] = lambda figure: True,
) -> list[float]:
    """Epsilon of canonical histories, each computed at most once; one read and one write per family.

    What `keep` says no to leaves nothing, neither in memory nor on disk: whoever is refused chose it, as often as he likes.
    """
    cache = cache or Figures()
    fresh: dict[str, dict[str, float]] = {}
    results = []
    for history in histories:
        known, family, key = _known(history, delta, accountant, cache)
        if key not in known:
            figure, by_name = compute(history, delta, accountant)
            if not keep(figure):
                results.append(figure)
                continue
            known = _memory.setdefault(family, known)
            known[key] = figure
            if by_name:
                fresh.setdefault(family, {})[key] = figure
        results.append(known[key])
    for family, values in fresh.items():
        cache.add(family, values)
    return results


def epsilon(history: Sequence[Entry], delta: float, accountant: str = "pld", cache: Figures | None = None) -> float:
    """Epsilon of a history, in any order, for adding or removing one example under Poisson sampling.

    Args:
        history: What was spent; empty gives 0.0.
        delta: The claim's delta.
        accountant: A name of `ACCOUNTANTS`.
        cache: Where figures are kept between processes; the user's cache by default.

    Returns:
        An upper bound, at least 0.

    Raises:
        ConfigError: An unknown or refused accountant, a delta outside (0, 1).
    """
    lookup(accountant)
    check_delta(delta)
    canonical = merge(history)
    return _figures([canonical], delta, accountant, cache)[0] if canonical else 0.0


def known(history: Sequence[Entry], delta: float, accountant: str = "pld", cache: Figures | None = None) -> bool:
    """Whether `epsilon` of this history answers from memory or cache, without loading an accountant."""
    canonical = merge(history)
    if not canonical:
        return True
    figures, _, key = _known(canonical, delta, accountant, cache or Figures())
    return key in figures


def epsilons(
    histories: Sequence[Sequence[Entry]],
    delta: float,
    accountant: str = "pld",
    cache: Figures | None = None,
    keep: Callable[[float], bool] = lambda figure: True,
) -> list[float]:
    """`epsilon` of many histories, with one read and one write of the cache per family.

    Args:
        histories: Each as that of `epsilon`.
        delta: The claim's delta.
        accountant: A name of `ACCOUNTANTS`.
        cache: Where figures are kept between processes.
        keep: Whether a figure that was not known is worth keeping, in memory and on disk.
    """
    lookup(accountant)
    check_delta(delta)
    canonical = [merge(history) for history in histories]
    filled = iter(_figures([history for history in canonical if history], delta, accountant, cache, keep))
    return [next(filled) if history else 0.0 for history in canonical]


def epsilon_curve(
    noise_multiplier: float,
    sample_rate: float,
    steps: Sequence[int],
    delta: float,
    accountant: str = "pld",
    cache: Figures | None = None,
) -> list[float]:
    """Epsilon after each cumulative number of steps of one setting; 0 steps cost 0.

    Args:
        noise_multiplier: Of every step.
        sample_rate: Of every step.
        steps: Cumulative counts, for example (2, 4, 6) for three rounds of two steps.
        delta: The claim's delta.
        accountant: A name of `ACCOUNTANTS`.
        cache: Where figures are kept between processes.

    Returns:
        The same floats as `epsilon` of each prefix.
    """
    prefixes = [[Entry(noise_multiplier, sample_rate, count)] if count else [] for count in steps]
    return epsilons(prefixes, delta, accountant, cache)


def group_epsilon(history: Sequence[Entry], examples: int, delta: float, cache: Figures | None = None) -> float:
    """Epsilon by pld for a person with `examples` examples; where the exact figure fails, the bound of `as_one`."""
    check_delta(delta)
    cache = cache or Figures()
    canonical = merge(history)
    family, key = f"group {_family(canonical, delta, 'pld')}", f"{examples}:{','.join(str(e.steps) for e in canonical)}"
    known = _memory.setdefault(family, {})
    if key not in known:
        known.update(cache.read(family))
    if key not in known:
        try:
            known[key] = max(0.0, float(_module("pld").group_epsilon(canonical, examples, delta)))
        except (ArithmeticError, ValueError, RuntimeError, MemoryError, IndexError, TypeError) as error:
            _log.info("the exact group price failed (%s); falling back to a bound", error)
            return epsilon(as_one(canonical, examples), delta, "pld", cache)
        cache.add(family, {key: known[key]})
    return known[key]
