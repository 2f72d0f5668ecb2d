"""Config and facts to every number that can be known before a run: noise, epsilon, live counts, bytes. Pure.

The run uses these very numbers, so what the plan says is what the run does; only memory and time are estimates
(`estimate.py`). Nothing here reads a feature of an example.
Read first: `make_plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fed_dpprune import config as cfg
from fed_dpprune.comm.arithmetic import selected_payload
from fed_dpprune.comm.codecs.table import codec
from fed_dpprune.comm.downlink import MOST_KEPT
from fed_dpprune.comm.masks import entropy_bound_bytes, packed_size_bound
from fed_dpprune.errors import ClientFault, ConfigError
from fed_dpprune.estimate import Estimate, estimate
from fed_dpprune.models.flat import Layout, Work
from fed_dpprune.privacy import calibration
from fed_dpprune.privacy.accountants import table as accountants
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.policy import ClientPolicy
from fed_dpprune.sparsity.prune import drawn, survivors_count
from fed_dpprune.sparsity.recipe import group, round_support
from fed_dpprune.sparsity.schedule import live_by_round, steps_differ
from fed_dpprune.sparsity.support import Support, draw_positions, frozen_count, union

FLOAT32 = 4
MOST_DRAWS = 2**31  # coordinates that a plan draws at most to count unions; beyond, it gives an upper bound


@dataclass(frozen=True)
class Facts:
    """What the plan must know of data and model: shapes and declared sizes, never features.

    Attributes:
        layout: Coordinate order of the net.
        nominal_sizes: N_c by partition id; declared public.
        test_size: Held-out examples.
        work: Of the forward pass of one example; None where it cannot be counted.
        actors: Client processes at work at a time.
    """

    layout: Layout
    nominal_sizes: tuple[int, ...]
    test_size: int = 0
    work: Work | None = None
    actors: int = 1


@dataclass(frozen=True)
class Positions:
    """A packed support of k among n: the most bytes that it takes, and what no code beats on average over all such supports."""

    n: int
    k: int

    @property
    def most(self) -> int:
        """Bytes of `comm.masks.pack_positions` at most."""
        return packed_size_bound(self.n, self.k)

    @property
    def entropy_bound(self) -> int:
        """ceil(log2 C(n, k) / 8) bytes."""
        return entropy_bound_bytes(self.n, self.k)

    def as_json(self) -> dict[str, int]:
        """For `plan --json`."""
        return {"n": self.n, "k": self.k, "bytes": self.most, "entropy_bound": self.entropy_bound}


@dataclass(frozen=True)
class Traffic:
    """Payload bytes of one direction.

    Attributes:
        payload_by_client: Of each round, by client asked.
        dense_float32: What dense float32 values would have taken over the run.
        exact: False where it is an upper bound.
        positions: Of the largest packed support in a message, where one travels.
    """

    payload_by_client: tuple[Mapping[int, int], ...]
    dense_float32: int
    exact: bool = True
    positions: Positions | None = None

    @cached_property
    def payload_by_round(self) -> tuple[int, ...]:
        """Over all clients of each round."""
        return tuple(sum(sizes.values()) for sizes in self.payload_by_client)

    @property
    def payload(self) -> int:
        """Over the run."""
        return sum(self.payload_by_round)


@dataclass(frozen=True)
class Plan:
    """All numbers known beforehand; see the contract for the keys of `as_json`."""

    noise_multiplier: float
    delta: float
    accountant: str
    nominal_sizes: tuple[int, ...]
    sample_rates: tuple[float, ...]
    cohorts: tuple[tuple[int, ...], ...]
    steps_by_client: tuple[int, ...]
    epsilon_by_round: tuple[float, ...]
    parameters: int
    survivors: int
    live_by_round: tuple[int, ...]
    live_exact: bool
    uplink: Traffic
    downlink: Traffic
    max_rounds: int | None
    estimate: Estimate
    warnings: tuple[str, ...] = ()

    @property
    def epsilon_max(self) -> float:
        """After the last round, of the client that spends most."""
        return self.epsilon_by_round[-1]

    def as_json(self) -> dict[str, Any]:
        """The keys of `plan --json`."""

        def traffic(way: Traffic) -> dict[str, Any]:
            return {
                "payload": way.payload,
                "payload_by_round": list(way.payload_by_round),
                "dense_float32": way.dense_float32,
                "ratio": way.payload / way.dense_float32 if way.dense_float32 else None,
                "exact": way.exact,
                "positions": way.positions.as_json() if way.positions else None,
            }

        return {
            "noise_multiplier": self.noise_multiplier,
            "epsilon_by_round": list(self.epsilon_by_round),
            "epsilon_max": self.epsilon_max,
            "delta": self.delta,
            "accountant": self.accountant,
            "nominal_sizes": {str(c): n for c, n in enumerate(self.nominal_sizes)},
            "sample_rates": {str(c): q for c, q in enumerate(self.sample_rates)},
            "expected_batch": {str(c): q * n for c, (q, n) in enumerate(zip(self.sample_rates, self.nominal_sizes, strict=True))},
            "steps_by_client": {str(c): t for c, t in enumerate(self.steps_by_client)},
            "parameters": self.parameters,
            "live_after_pruning": self.survivors,
            "live_by_round": list(self.live_by_round),
            "live_exact": self.live_exact,
            "bytes": {"uplink": traffic(self.uplink), "downlink": traffic(self.downlink)},
            "max_rounds": self.max_rounds,
            "estimate": self.estimate.as_json(),
            "warnings": list(self.warnings),
        }


def sample_rate(privacy: cfg.Privacy, nominal_size: int) -> float:
    """Poisson rate of a client: min(1, expected batch / N_c), or the config's sample rate where it is set."""
    if privacy.sample_rate is not None:
        return privacy.sample_rate
    return min(1.0, privacy.expected_batch / nominal_size)


def check_sizes(config: cfg.Config, sizes: Sequence[int]) -> tuple[str, ...]:
    """What needs the clients' nominal sizes; warnings for what is allowed but surprising.

    Raises:
        ConfigError: Delta not below 1/N_c, an expected batch larger than every client, more clients per round than there
            are, fewer clients than the minimum.
    """
    privacy, fed = config.privacy, config.federation
    largest = max(sizes)
    if privacy.delta >= 1.0 / largest:
        client = list(sizes).index(largest)
        raise ConfigError(
            "privacy.delta",
            f"{privacy.delta} is not below 1/N of client {client}, which has {largest} examples",
            f"use less than {1.0 / largest:.2g}",
        )
    if privacy.sample_rate is None and privacy.expected_batch > largest:
        raise ConfigError(
            "privacy.expected-batch",
            f"{privacy.expected_batch:g} is larger than every client (the largest has {largest} examples)",
            "lower it or set privacy.sample-rate",
        )
    asked = fed.clients_per_round or len(sizes)
    if asked > len(sizes):
        raise ConfigError("federation.clients-per-round", f"{asked} is more than the {len(sizes)} clients there are", "lower it")
    if fed.min_clients > asked:
        raise ConfigError(
            "federation.min-clients", f"{fed.min_clients} is more than the {asked} clients asked per round", "lower it"
        )
    small = [c for c, n in enumerate(sizes) if privacy.sample_rate is None and n < privacy.expected_batch]
    if not small:
        return ()
    names = ", ".join(map(str, small[:5])) + (", ..." if len(small) > 5 else "")
    return (
        f"{len(small)} client(s) ({names}) have fewer examples than privacy.expected-batch = {privacy.expected_batch:g}: "
        "their sample rate is 1, every example in every step",
    )


def draw_cohorts(config: cfg.Config, clients: int) -> tuple[tuple[int, ...], ...]:
    """Who is asked in each round, from the public stream; everyone unless `clients-per-round` says fewer."""
    asked = config.federation.clients_per_round or clients
    return tuple(
        tuple(int(c) for c in draw_positions(clients, asked, config.seed, "cohort", round))
        for round in range(1, config.federation.rounds + 1)
    )


def _demands(rates: Sequence[float], steps: Sequence[int]) -> list[tuple[float, int]]:
    """The (sample rate, steps) pairs that no other pair exceeds in both: epsilon grows in each, so these bind."""
    pairs = sorted({(q, t) for q, t in zip(rates, steps, strict=True) if t}, reverse=True)
    binding: list[tuple[float, int]] = []
    for rate, count in pairs:
        if not binding or count > binding[-1][1]:
            binding.append((rate, count))
    return binding


def _noise(config: cfg.Config, rates: Sequence[float], steps: Sequence[int]) -> float:
    """The given noise multiplier, or the least that keeps every client within epsilon over its scheduled steps."""
    privacy = config.privacy
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    if privacy.epsilon is None:
        raise ConfigError("privacy.epsilon", "is not set")
    return max(
        calibration.noise_multiplier(privacy.epsilon, privacy.delta, rate, count, privacy.accountant)
        for rate, count in _demands(rates, steps)
    )


class EpsilonBook:
    """Epsilon by (sample rate, steps) at one noise multiplier: each distinct figure is computed once.

    Args:
        noise_multiplier: Of every step of the run.
        delta: The claim's delta.
        accountant: The config's.
    """

    def __init__(self, noise_multiplier: float, delta: float, accountant: str) -> None:
        self.noise_multiplier, self.delta, self.accountant = noise_multiplier, delta, accountant
        self._known: dict[tuple[float, int], float] = {}

    def prepare(self, rate: float, counts: Sequence[int]) -> None:
        """Compute many step counts of one rate together."""
        fresh = sorted({c for c in counts if c and (rate, c) not in self._known})
        if fresh:
            curve = accountants.epsilon_curve(self.noise_multiplier, rate, fresh, self.delta, self.accountant)
            self._known.update({(rate, c): e for c, e in zip(fresh, curve, strict=True)})

    def at(self, rate: float, steps: int) -> float:
        """Epsilon after `steps` steps; 0 before the first."""
        if steps == 0:
            return 0.0
        if (rate, steps) not in self._known:
            entry = Entry(self.noise_multiplier, rate, steps)
            self._known[(rate, steps)] = accountants.epsilon([entry], self.delta, self.accountant)
        return self._known[(rate, steps)]


def steps_so_far(cohorts: Sequence[Sequence[int]], clients: int, local_steps: int) -> list[list[int]]:
    """Scheduled steps of each client after each round: rounds x clients."""
    total, table = [0] * clients, []
    for cohort in cohorts:
        for client in cohort:
            total[client] += local_steps
        table.append(list(total))
    return table


def _epsilon_by_round(book: EpsilonBook, rates: Sequence[float], table: list[list[int]]) -> tuple[float, ...]:
    binding = [_demands(rates, row) for row in table]
    for rate in {rate for row in binding for rate, _ in row}:
        book.prepare(rate, [count for row in binding for q, count in row if q == rate])
    return tuple(max((book.at(q, t) for q, t in row), default=0.0) for row in binding)


def _max_rounds(config: cfg.Config, noise: float, rates: Sequence[float]) -> int | None:
    """Rounds that fit the budget for a client that is asked in each of them; None without a budget."""
    limits = [e for e in (config.policy.max_epsilon, config.privacy.epsilon) if e is not None]
    if not limits:
        return None
    privacy = config.privacy
    steps = calibration.max_steps(min(limits), privacy.delta, max(rates), noise, privacy.accountant)
    return steps // config.federation.local_steps


def _policy_warnings(
    config: cfg.Config, facts: Facts, rates: Sequence[float], noise: float, epsilon_by_round: Sequence[float]
) -> tuple[str, ...]:
    """Where the [policy] will stop clients before the last round: the limit, and the rounds that fit below it."""
    rounds = config.federation.rounds
    policy = ClientPolicy.from_config(config.policy)
    for client, (rate, size) in enumerate(zip(rates, facts.nominal_sizes, strict=True)):
        try:
            policy.check(
                noise_multiplier=noise,
                sample_rate=rate,
                steps=config.federation.local_steps,
                delta=config.privacy.delta,
                clip_norm=config.privacy.clip_norm,
                # Which support a round has is known when it is made; the client checks its origin then.
                provenance=next(iter(policy.allow_provenance), ""),
                nominal_size=size,
                accountant=config.privacy.accountant,
                unit=config.privacy.unit,
            )
        except ClientFault as fault:
            return (f"0 of the {rounds} rounds fit: client {client} will refuse each ({policy.explain(fault.code)})",)
    limit = config.policy.max_epsilon
    fitting = rounds if limit is None else sum(spent <= limit for spent in epsilon_by_round)
    if fitting == rounds:
        return ()
    allowed = f"policy.max-epsilon = {limit:g} lets {fitting} of the {rounds} rounds happen"
    return (f"{allowed}: in round {fitting + 1} clients will refuse",)


def _draws_known(config: cfg.Config) -> bool:
    """Whether every round's support follows from public streams alone."""
    sparsity = config.sparsity
    methods = {sparsity.freeze.method, sparsity.drop.method} - {"none", "random"}
    return not methods and (sparsity.freeze.odds == "uniform" or sparsity.freeze.method == "none")


def _mask_is_public(config: cfg.Config) -> bool:
    """Whether pre-pruning follows from public streams (the rule of `federation.start.mask_is_public`)."""
    return config.sparsity.prune.method in ("none", "random")


def _survivors(config: cfg.Config, layout: Layout) -> Support:
    """What pre-pruning leaves, drawn where both ends draw it; else a stand-in with the largest size that it can have.

    Positions inside the survivors are all that a uniform draw of coordinates depends on, so any of this size will do for
    it. Rows and channels depend on which coordinates they are: without them the counts of the plan are bounds.
    """
    sparsity = config.sparsity
    if _mask_is_public(config):
        return drawn(sparsity.prune, layout, config.seed, sparsity.granularity)
    count = survivors_count(sparsity.prune, layout, sparsity.granularity)
    return Support(np.arange(count, dtype=np.int64), layout.d)


def _positions_travel(config: cfg.Config, missed: int) -> bool:
    """Whether a client must be sent which coordinates changed (the rule of `federation.supports.changes_follow`)."""
    sparsity = config.sparsity
    methods = (sparsity.freeze.method, sparsity.drop.method)
    return "public" in methods or "change" in methods or ("magnitude" in methods and missed > 1)


class _LiveCounts:
    """Live counts of rounds and of unions of rounds, drawn when they must be and may be.

    Args:
        config: The config.
        layout: Coordinate order.
        survivors: How many survive pre-pruning.
        cohorts: Who is asked in each round: where supports are not shared, a round moves the union of theirs.

    Attributes:
        by_round: Coordinates of one client's update, the largest where clients differ.
        exact: Whether these are exact.
    """

    def __init__(self, config: cfg.Config, layout: Layout, survivors: Support, cohorts: Sequence[Sequence[int]]) -> None:
        self._config, self._layout, self._survivors = config, layout, survivors
        fed, sparsity = config.federation, config.sparsity
        self._groups = [tuple(sorted({self._group(c) for c in cohort})) for cohort in cohorts]
        draws = survivors.k * fed.local_steps * sum(map(len, self._groups))
        counted = sparsity.granularity == "element"
        self.drawable = _draws_known(config) and (counted or _mask_is_public(config)) and draws <= MOST_DRAWS
        self._moving = sparsity.freeze.method != "none" or sparsity.drop.method != "none"
        drawn = self._moving and self.drawable and (steps_differ(sparsity) or not counted)
        self._drawn = [{g: self._draw(round, g).k for g in whose} for round, whose in self._numbered()] if drawn else []
        if drawn:
            self.by_round = tuple(max(sizes.values()) for sizes in self._drawn)
        elif counted:
            self.by_round = tuple(live_by_round(sparsity, survivors.k, fed.rounds, local_steps=fed.local_steps))
        else:
            self.by_round = (survivors.k,) * fed.rounds
        still = not self._moving and _mask_is_public(config)
        self.exact = drawn or still or (counted and not steps_differ(sparsity))

    def _group(self, client: int) -> int:
        return 0 if self._config.sparsity.shared else group(self._config.sparsity, client)

    def _numbered(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        return iter(enumerate(self._groups, start=1))

    def of(self, round: int, client: int) -> int:
        """Coordinates of this client's update."""
        return self._drawn[round - 1][self._group(client)] if self._drawn else self.by_round[round - 1]

    def _draw(self, round: int, whose: int) -> Support:
        """What a client of this group may move in the round."""
        config, fed = self._config, self._config.federation
        return round_support(
            config.sparsity,
            self._survivors,
            self._layout,
            config.seed,
            round,
            fed.rounds,
            local_steps=fed.local_steps,
            client=whose,
        ).support

    def _moved(self, round: int) -> Support:
        """What the round moves, if every client asked answers."""
        parts = [self._draw(round, whose) for whose in self._groups[round - 1]]
        return parts[0] if len(parts) == 1 else union(parts)

    def union(self, first: int, last: int) -> tuple[int, bool]:
        """(size of the union of what rounds first..last move, whether it is exact)."""
        if first > last:
            return 0, True
        if not self._moving:
            return self._survivors.k, self.exact
        if first == last and len(self._groups[first - 1]) == 1:
            return self.by_round[first - 1], self.exact
        if self.drawable:
            return union([self._moved(round) for round in range(first, last + 1)]).k, True
        most = sum(len(self._groups[round - 1]) * self.by_round[round - 1] for round in range(first, last + 1))
        return min(self._survivors.k, most), False


class _Downlink:
    """Payload bytes of the downlink, by the rules of `federation/broadcast.py`; see there."""

    def __init__(
        self, config: cfg.Config, layout: Layout, counts: _LiveCounts, survivors: int, cohorts: Sequence[Sequence[int]]
    ) -> None:
        self._config, self._counts, self._survivors = config, counts, survivors
        self._told = [(max(cohort) + 8) // 8 for cohort in cohorts]  # a bit for each client up to the highest
        self._union = _memoised(counts.union)
        self._lossy = None if config.wire.downlink == "float32" else codec(config.wire.downlink)
        mask_sent = not _mask_is_public(config)
        # Groups of unequal sizes leave `survivors` an upper bound; half of all positions take the most bytes.
        counted = config.sparsity.granularity == "element"
        self._positions = Positions(layout.d, survivors if counted else min(survivors, layout.d // 2))
        self._mask = self._positions.most if mask_sent else 0
        # A bitmask has one size; gap codes, chosen for very sparse supports, have at most this one.
        self._mask_exact = not mask_sent or (counted and self._mask in (0, 1 + (layout.d + 7) // 8))
        held = config.sparsity.prune.inactive == "hold" or any(t.frozen for t in layout.tensors)
        self._weights_sent = bool(config.model.weights)
        self._values = layout.d if held and self._weights_sent else survivors
        self._ships = bool({"public", "change"} & {config.sparsity.freeze.method, config.sparsity.drop.method})

    def positions(self) -> Positions | None:
        """The largest packed support that a message may hold."""
        shipped = [Positions(self._survivors, k) for k in self._counts.by_round] if self._ships else []
        return max([*shipped, *([self._positions] if self._mask else [])], key=lambda found: found.most, default=None)

    def shipped(self, round: int) -> tuple[int, bool]:
        """Bytes of the packed support itself, where the clients cannot draw it."""
        if not self._ships:
            return 0, True
        return packed_size_bound(self._survivors, self._counts.by_round[round - 1]), False

    def first(self, round: int) -> tuple[int, bool]:
        """A client's first message: the mask where it travels, and values unless both ends make them."""
        values = FLOAT32 * self._values if round > 1 or self._weights_sent else 0
        return self._mask + values, self._mask_exact

    def update(self, seen: int, round: int) -> tuple[int, bool]:
        """What a client that last took part in round `seen` is sent: the smallest of changes, releases, newest model."""
        change, exact = self._change(seen, round)
        whole = self._mask + FLOAT32 * self._values
        moved = [self._union(r, r) for r in range(seen, round)]
        if sum(size for size, _ in moved) > MOST_KEPT * self._survivors:
            return whole, self._mask_exact and all(known for _, known in moved)  # a bound in any case: nothing sent is longer
        # A mask of unknown length cannot make the model the smaller one as long as its values alone are not.
        return min(change, whole), exact and (self._mask_exact or change <= whole - self._mask)

    def _change(self, seen: int, round: int) -> tuple[int, bool]:
        """The smaller of the values on what was missed and the quantised releases, with what tells their places."""
        missed = range(seen, round)
        size, exact = self._union(seen, round - 1)
        values = FLOAT32 * size
        if _positions_travel(self._config, len(missed)):
            return values + packed_size_bound(self._survivors, size), False
        told = 0 if self._config.sparsity.shared else len(missed) * max((self._told[r - 1] for r in missed), default=0)
        if self._lossy is None:
            return told + values, exact
        moved = [self._union(r, r) for r in missed]
        replay = sum(self._lossy.size(k) for k, _ in moved)
        return told + min(values, replay), exact and all(known for _, known in moved)


def _update_bytes(wire: cfg.Wire, live: int) -> tuple[int, bool]:
    """(bytes of one client's update, whether exact): the length of packed positions depends on the positions."""
    if wire.select == "none":
        return codec(wire.uplink).size(live), True
    count = selected_payload(wire.uplink, live, live - frozen_count(wire.select_rate, live))
    return count.payload, count.exact


def _chosen(wire: cfg.Wire, live: int) -> Positions | None:
    """The positions that come with an update, where a client sends those of the largest values."""
    kept = live - frozen_count(wire.select_rate, live)
    return Positions(live, kept) if wire.select == "top-k" and 0 < kept < live else None


def _uplink(config: cfg.Config, layout: Layout, counts: _LiveCounts, cohorts: Sequence[Sequence[int]]) -> Traffic:
    """Payload bytes up."""
    by_client: list[dict[int, int]] = []
    exact = counts.exact
    for round, cohort in enumerate(cohorts, start=1):
        sizes = {client: _update_bytes(config.wire, counts.of(round, client)) for client in cohort}
        by_client.append({client: size for client, (size, _) in sizes.items()})
        exact = exact and all(known for _, known in sizes.values())
    dense = sum(map(len, cohorts)) * FLOAT32 * layout.d
    return Traffic(tuple(by_client), dense, exact, _chosen(config.wire, max(counts.by_round)))


def _downlink(
    config: cfg.Config, layout: Layout, counts: _LiveCounts, cohorts: Sequence[Sequence[int]], survivors: int
) -> Traffic:
    """Payload bytes down."""
    way = _Downlink(config, layout, counts, survivors, cohorts)
    by_client: list[dict[int, int]] = []
    seen: dict[int, int] = {}
    exact = True
    for round, cohort in enumerate(cohorts, start=1):
        sizes: dict[int, int] = {}
        for client in cohort:
            parts = (way.shipped(round), way.update(seen[client], round) if client in seen else way.first(round))
            sizes[client] = sum(size for size, _ in parts)
            exact = exact and all(known for _, known in parts)
            seen[client] = round
        by_client.append(sizes)
    dense = sum(map(len, cohorts)) * FLOAT32 * layout.d
    return Traffic(tuple(by_client), dense, exact, way.positions())


def _memoised(function: Callable[[int, int], tuple[int, bool]]) -> Callable[[int, int], tuple[int, bool]]:
    known: dict[tuple[int, int], tuple[int, bool]] = {}

    def look(first: int, last: int) -> tuple[int, bool]:
        if (first, last) not in known:
            known[(first, last)] = function(first, last)
        return known[(first, last)]

    return look


def make_plan(config: cfg.Config, facts: Facts, *, cohorts_known: bool = True) -> Plan:
    """Every number that can be known before the run.

    Args:
        config: The validated config.
        facts: Shapes and nominal sizes.
        cohorts_known: True in simulation, where the drawn cohorts are what happens; in a deployment the noise is calibrated,
            and epsilon predicted, as if every client were asked in every round.

    Raises:
        ConfigError: A value that is impossible for these sizes.
    """
    warnings = check_sizes(config, facts.nominal_sizes)
    clients, local_steps = len(facts.nominal_sizes), config.federation.local_steps
    rates = tuple(sample_rate(config.privacy, n) for n in facts.nominal_sizes)
    cohorts = draw_cohorts(config, clients)
    everyone = (tuple(range(clients)),) * config.federation.rounds
    table = steps_so_far(cohorts if cohorts_known else everyone, clients, local_steps)
    noise = _noise(config, rates, table[-1])
    book = EpsilonBook(noise, config.privacy.delta, config.privacy.accountant)
    survivors = _survivors(config, facts.layout)
    counts = _LiveCounts(config, facts.layout, survivors, cohorts)
    epsilon_by_round = _epsilon_by_round(book, rates, table)
    return Plan(
        noise_multiplier=noise,
        delta=config.privacy.delta,
        accountant=config.privacy.accountant,
        nominal_sizes=facts.nominal_sizes,
        sample_rates=rates,
        cohorts=cohorts,
        steps_by_client=tuple(table[-1]),
        epsilon_by_round=epsilon_by_round,
        parameters=facts.layout.d,
        survivors=survivors.k,
        live_by_round=counts.by_round,
        live_exact=counts.exact,
        uplink=_uplink(config, facts.layout, counts, cohorts),
        downlink=_downlink(config, facts.layout, counts, cohorts, survivors.k),
        max_rounds=_max_rounds(config, noise, rates),
        estimate=estimate(
            config,
            facts.layout,
            facts.work,
            batches=[rate * size for rate, size in zip(rates, facts.nominal_sizes, strict=True)],
            cohorts=cohorts,
            live_by_round=counts.by_round,
            test_size=facts.test_size,
            actors=facts.actors,
        ),
        warnings=warnings + _policy_warnings(config, facts, rates, noise, epsilon_by_round),
    )
