"""summary.json: what a run was, what it reached, what it cost. Keys are the contract's."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from fed_dpprune import config as cfg
from fed_dpprune.comm.meter import KINDS, Way
from fed_dpprune.federation.fingerprint import fingerprint
from fed_dpprune.federation.strategy import Server
from fed_dpprune.plan import Traffic
from fed_dpprune.privacy.accountants import table as accountants
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.statement import ADVERSARY, NEIGHBOURING, SAMPLER, group_price
from fed_dpprune.records import SCHEMA, ClientRecord, RoundRecord

GROUP = 2  # examples of one person whose price the summary states; `plan` prints more
PACKAGES = ("fed-dpprune", "flwr", "ray", "torch", "opacus", "dp-accounting", "numpy")


@dataclass
class Clock:
    """Seconds of a run: `start` from the command to the first round, `rounds` and `compute` by round."""

    start: float = 0.0
    total: float = 0.0
    rounds: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    actors: int = 1

    def as_json(self) -> dict[str, float | None]:
        """Overhead is what a round takes beyond its clients' computing, spread over the actors; round 1 warms them up."""
        later = [wall - compute / self.actors for wall, compute in zip(self.rounds[1:], self.compute[1:], strict=True)]
        return {
            "total_s": self.total,
            "start_s": self.start,
            "round_median_s": statistics.median(self.rounds) if self.rounds else None,
            "client_compute_s": sum(self.compute),
            "overhead_per_round_s": statistics.median(later) if later else None,
        }


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _privacy(server: Server, noise_source: str, charged: dict[int, int], final: bool, simulated: bool) -> dict[str, Any]:
    """What was spent. Where the ledger holds more than the server has recorded (a round cut short), the ledger counts."""
    config, plan, book = server.config, server.plan, server.book
    steps = {c: max(server.steps.get(c, 0), charged.get(c, 0)) for c in range(len(plan.nominal_sizes))}
    epsilon = {c: book.at(plan.sample_rates[c], t) for c, t in steps.items()}
    largest = max(epsilon.values())
    heaviest = max(epsilon, key=epsilon.__getitem__)
    other = accountants.SECOND[plan.accountant]
    beside: dict[str, float] = {}
    group: dict[str, float] = {}
    if final and steps[heaviest]:
        entry = Entry(plan.noise_multiplier, plan.sample_rates[heaviest], steps[heaviest])
        beside = {other: accountants.epsilon([entry], plan.delta, other)}
        group = {str(GROUP): group_price([entry], GROUP, plan.delta, plan.accountant)}
    return {
        "epsilon_max": largest,
        "epsilon_median": statistics.median(epsilon.values()),
        "epsilon_by_client": {str(c): e for c, e in epsilon.items()},
        "epsilon_other": beside,
        "epsilon_of_group": group,
        "delta": plan.delta,
        "unit": config.privacy.unit,
        "neighbouring": NEIGHBOURING,
        "sampler": SAMPLER,
        "accountant": plan.accountant,
        "accountant_version": accountants.version(plan.accountant),
        "adversary": ADVERSARY,
        "noise_source": noise_source,
        "simulation": simulated,
        "side_releases": [],
        "noise_multiplier": plan.noise_multiplier,
        "clip_norm": config.privacy.clip_norm,
        "sample_rates": {str(c): q for c, q in enumerate(plan.sample_rates)},
        "nominal_sizes": {str(c): n for c, n in enumerate(plan.nominal_sizes)},
        "steps_by_client": {str(c): t for c, t in steps.items()},
    }


def make(
    config: cfg.Config,
    server: Server,
    rounds: list[RoundRecord],
    clock: Clock,
    *,
    status: str,
    reason: str,
    noise_source: str,
    charged: dict[int, int],
    final: bool,
    simulated: bool,
) -> dict[str, Any]:
    """The summary as JSON values.

    Args:
        config: The run's config.
        server: After its last round.
        rounds: Every round's record.
        clock: Its seconds.
        status: One of `records.STATUSES`.
        reason: Why it is not complete; "" when it is.
        noise_source: The clients' label.
        charged: Steps by client in the ledger.
        simulated: Whether server and clients are one user's simulation.
        final: False while the run goes on: figures that cost seconds are left out.
    """
    measured = [(r.accuracy, -r.round) for r in rounds if r.accuracy is not None]
    best, best_round = max(measured, default=(None, None))
    survivors = server.world.begin.survivors
    return {
        "schema": SCHEMA,
        "status": status,
        "reason": reason,
        "name": config.name,
        "seed": config.seed,
        "versions": _versions(),
        "code_fingerprint": fingerprint(),
        "rounds": server.done,
        "rounds_planned": config.federation.rounds,
        "accuracy": {
            "last": rounds[-1].accuracy if rounds else None,
            "best": best,
            "best_round": None if best_round is None else -best_round,
        },
        "loss": {"last": rounds[-1].loss if rounds else None},
        "privacy": _privacy(server, noise_source, charged, final, simulated),
        "bytes": {
            "uplink": _bytes(server, "up", server.plan.uplink, sum(record.planned_up for record in rounds)),
            "downlink": _bytes(server, "down", server.plan.downlink, sum(record.planned_down for record in rounds)),
        },
        "sparsity": {
            "parameters": server.layout.d,
            "live_after_pruning": survivors.k,
            "prunable": int(prunable_count(server)),
            "live_by_round": [record.live for record in rounds],
            "representation": server.representation_sparsity(),
            "provenance": sorted({survivors.provenance, *server.provenances}),
        },
        "data": {
            "dataset": config.data.dataset,
            "public": config.data.public,
            "weights": config.model.weights,
            "notes": list(server.world.notes),
        },
        "time": {**clock.as_json(), "link_s": _link_seconds(rounds)},
    }


def _bytes(server: Server, way: Way, traffic: Traffic, planned: int) -> dict[str, Any]:
    """What travelled in one direction, beside the payload that the plan had counted for these rounds."""
    total = server.meter.total(way)
    whole = {kind: server.meter.of_kind(way, kind).message for kind in KINDS if kind in total.by_kind}
    return {**total.as_json(), "message_by_kind": whole, "planned": planned, "planned_exact": traffic.exact}


def _link_seconds(rounds: list[RoundRecord]) -> float | None:
    """All rounds' messages on the config's link; null where it names none."""
    seconds = [record.link_s for record in rounds if record.link_s is not None]
    return sum(seconds) if seconds else None


def unstarted(config: cfg.Config, status: str, reason: str) -> dict[str, Any]:
    """What is known of a run before its clients have met: enough to label its directory."""
    return {
        "schema": SCHEMA,
        "status": status,
        "reason": reason,
        "name": config.name,
        "seed": config.seed,
        "versions": _versions(),
        "code_fingerprint": fingerprint(),
        "rounds": 0,
        "rounds_planned": config.federation.rounds,
    }


def prunable_count(server: Server) -> int:
    """Coordinates that pre-pruning may remove: what a prune rate is a share of."""
    from fed_dpprune.sparsity.prune import prunable

    return int(prunable(server.layout, server.config.sparsity.prune.exempt).sum())


def client_seconds(records: list[ClientRecord]) -> float:
    """Computing time of one round's clients together."""
    return sum(record.compute_s or 0.0 for record in records)
