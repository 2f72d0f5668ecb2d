"""What a ledger says, as text and as JSON: what each client spent, by run, and what is left.

The figures are those that were computed when the charges were made, so the report needs no accountant; `recompute` loads
one and works them out again from the entries.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fed_dpprune.errors import LedgerError
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.history import Entry
from fed_dpprune.privacy.ledger import ClientSpent, Ledger, RunSpent
from fed_dpprune.privacy.statement import ADVERSARY

TOLERANCE = 1e-6


def _entries(entries: tuple[Entry, ...]) -> list[dict[str, Any]]:
    return [
        {"noise_multiplier": entry.noise_multiplier, "sample_rate": entry.sample_rate, "steps": entry.steps} for entry in entries
    ]


def _run(run: RunSpent) -> dict[str, Any]:
    return {
        "run": run.run,
        "rounds": run.rounds,
        "steps": run.steps,
        "epsilon": run.epsilon if math.isfinite(run.epsilon) else None,
        "entries": _entries(run.entries),
    }


def _client(spent: ClientSpent, delta: float) -> dict[str, Any]:
    left = None if spent.limit is None else max(0.0, spent.limit - spent.epsilon)
    return {
        "epsilon": spent.epsilon if math.isfinite(spent.epsilon) else None,
        "delta": delta,
        "accountant": spent.accountant,
        "rule": spent.rule,
        "limit": spent.limit,
        "left": left,
        "runs": [_run(run) for run in spent.runs],
    }


def ledger_report(path: Path) -> dict[str, Any]:
    """`fed-dpprune ledger FILE --json`: `{"clients": {id: {...}}, "chain": {...}, ...}`; the chain has been verified.

    Raises:
        LedgerError: No such ledger, or one that cannot be trusted.
    """
    with Ledger.read(Path(path)) as ledger:
        head = ledger.head()
        return {
            "identity": ledger.meta["identity"],
            "mode": ledger.meta["mode"],
            "unit": ledger.meta["unit"],
            "neighbouring": ledger.meta["neighbouring"],
            "sampler": ledger.meta["sampler"],
            "clients": {client: _client(ledger.spent(client), ledger.delta) for client in ledger.clients()},
            "chain": {"verified": True, "charges": head.count, "head": head.digest},
        }


def recompute(report: dict[str, Any]) -> None:
    """Work out again, from the entries alone, what each client spent within one declared schedule.

    Raises:
        LedgerError: A figure in the ledger is smaller than what its entries cost.
    """
    for client, spent in report["clients"].items():
        history = [Entry(**entry) for run in spent["runs"] for entry in run["entries"]]
        accountant = str(spent["accountant"]).split(" ", 1)[0] if spent["rule"] == "schedule" else "rdp"
        figure = table.epsilon(history, spent["delta"], accountant)
        stated = math.inf if spent["epsilon"] is None else spent["epsilon"]
        if figure > stated + TOLERANCE:
            raise LedgerError(
                f"client {client}", f"its entries cost {figure:.6g}, the ledger says {stated:.6g}", "do not rely on it"
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def ledger_text(report: dict[str, Any]) -> str:
    """The same for people: a line per client and run, then what the figures mean."""
    lines = []
    for client, spent in report["clients"].items():
        figure = "no finite epsilon" if spent["epsilon"] is None else f"epsilon {spent['epsilon']:.3f}"
        limit = "" if spent["limit"] is None else f", {spent['left']:.3f} left of {spent['limit']:g}"
        lines.append(f"client {client}: {figure} at delta {spent['delta']:g}{limit}")
        for run in spent["runs"]:
            alone = "" if run["epsilon"] is None or len(spent["runs"]) == 1 else f", alone epsilon {run['epsilon']:.3f}"
            lines.append(f"  run {run['run']}: {_count(run['rounds'], 'round')}, {_count(run['steps'], 'step')}{alone}")
            for entry in run["entries"]:
                noise, rate = entry["noise_multiplier"], entry["sample_rate"]
                lines.append(f"    {_count(entry['steps'], 'step')} of noise multiplier {noise:g}, sample rate {rate:g}")
    if not lines:
        lines.append("nothing has been charged")
    accountants = sorted({spent["accountant"] for spent in report["clients"].values()})
    rules = {spent["rule"] for spent in report["clients"].values()}
    lines.append(
        f"for adding or removing one {report['unit']} ({report['sampler']} sampling; {', '.join(accountants) or 'no charge'}), "
        f"against {ADVERSARY}"
    )
    if "filter" in rules:
        lines.append("where more than one declared schedule was charged: by a Renyi filter of one fixed order")
    chain = report["chain"]
    lines.append(f"chain verified: {_count(chain['charges'], 'charge')}, head {chain['head'][:16]}")
    return "\n".join(lines)
