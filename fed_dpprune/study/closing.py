"""What a run says at its end, and what a plan says before it: plain lines, no more numbers than a reader can use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fed_dpprune.config import Config
from fed_dpprune.estimate import ASSUMES, Estimate
from fed_dpprune.plan import Plan
from fed_dpprune.privacy import statement
from fed_dpprune.privacy.accountants import table as accountants
from fed_dpprune.privacy.history import Entry

FILES = ("summary.json", "rounds.jsonl", "clients.jsonl", "ledger.sqlite", "model.safetensors", "curves.png", "log.txt")


def megabytes(count: int | float) -> str:
    """Bytes for people (10^6 = 1 MB)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _heaviest(plan: Plan, steps: Sequence[int]) -> tuple[float, int]:
    """(sample rate, steps) of the client with the largest epsilon."""
    return max(zip(plan.sample_rates, steps, strict=True), key=lambda pair: (pair[1] > 0, pair[0], pair[1]))


def claim(plan: Plan, config: Config, made: dict[str, Any]) -> Iterator[str]:
    """What the epsilon covers, and what one round at a time would have said."""
    privacy = made["privacy"]
    other = next(iter(privacy["epsilon_other"].items()), None)
    yield from statement.statement(
        privacy["epsilon_max"],
        privacy["delta"],
        accountant=privacy["accountant"],
        noise_source=privacy["noise_source"],
        simulated=privacy.get("simulation", False),
        unit=privacy["unit"],
        second=other,
    ).splitlines()
    for size, price in privacy["epsilon_of_group"].items():
        yield f"a person with {size} examples in one client pays epsilon {price:.3f}"
    steps = [privacy["steps_by_client"][str(c)] for c in range(len(plan.sample_rates))]
    rate, count = _heaviest(plan, steps)
    rounds = count // config.federation.local_steps
    if rounds > 1:
        entry = Entry(plan.noise_multiplier, rate, config.federation.local_steps)
        yield statement.naive_line(privacy["epsilon_max"], [entry], rounds, plan.delta, plan.accountant)


def closing(made: dict[str, Any], plan: Plan, config: Config, out: Path) -> Iterator[str]:
    """The closing summary of a run."""
    accuracy, sparsity, seconds = made["accuracy"], made["sparsity"], made["time"]
    head = f"{made['status']} after {made['rounds']} of {made['rounds_planned']} rounds in {seconds['total_s']:.0f} s"
    yield head + (f": {made['reason']}" if made["reason"] else "")
    if accuracy["last"] is not None:
        yield (
            f"accuracy   {accuracy['last']:.4f} on held-out test data after the last round "
            f"(best {accuracy['best']:.4f} in round {accuracy['best_round']})"
        )
    elif accuracy["best"] is not None:
        yield f"accuracy   {accuracy['best']:.4f} in round {accuracy['best_round']}; after the last round it was not measured"
    for index, line in enumerate(claim(plan, config, made)):
        yield ("privacy    " if index == 0 else "           ") + line
    for way in ("uplink", "downlink"):
        count = made["bytes"][way]
        if count["dense_float32"]:
            yield (
                f"{way:<10} {megabytes(count['payload'])} payload, {count['ratio']:.1%} of dense float32 "
                f"({megabytes(count['message'])} as messages, {count['message_ratio']:.1%})"
            )
    if seconds.get("link_s") is not None:
        yield (
            f"link       {seconds['link_s']:.3g} s for the messages of all rounds over {config.wire.link!r} (a model; nothing "
            f"waited for it), beside {seconds['client_compute_s']:.3g} s of the clients' computing"
        )
    live = sparsity["live_by_round"]
    if live:
        yield (
            f"sparsity   {sparsity['live_after_pruning']:,} of {sparsity['parameters']:,} parameters live after pruning, "
            f"{live[0]:,} in the first round, {live[-1]:,} in the last (representation sparsity {sparsity['representation']:.1%})"
        )
    yield f"wrote      {out}/"
    yield "           " + "  ".join(name for name in FILES if (out / name).exists())


def planned(plan: Plan, config: Config) -> Iterator[str]:
    """What `fed-dpprune plan` prints: every number known beforehand."""
    clients, fed = len(plan.nominal_sizes), config.federation
    heavy = max(range(clients), key=lambda c: (plan.steps_by_client[c] > 0, plan.sample_rates[c], plan.steps_by_client[c]))
    yield (
        f"clients    {clients}, nominal sizes {min(plan.nominal_sizes)} to {max(plan.nominal_sizes)}; "
        f"{len(plan.cohorts[0])} asked per round, drawn beforehand; {fed.rounds} rounds x {fed.local_steps} private steps"
    )
    yield (
        f"sampling   Poisson, rates {min(plan.sample_rates):.4g} to {max(plan.sample_rates):.4g}, expected batch "
        f"{plan.sample_rates[heavy] * plan.nominal_sizes[heavy]:.4g}"
    )
    yield f"noise      multiplier {plan.noise_multiplier:.6g} (std on the clipped sum / clip norm {config.privacy.clip_norm:g})"
    lines = statement.statement(
        plan.epsilon_max, plan.delta, accountant=plan.accountant, noise_source="os-entropy", unit=config.privacy.unit
    ).splitlines()
    yield f"epsilon    {lines[0].removeprefix('epsilon ')}"
    yield f"           {lines[1]}"
    yield "by round   " + "  ".join(f"{r}: {plan.epsilon_by_round[r - 1]:.3f}" for r in _sampled(fed.rounds))
    history = [Entry(plan.noise_multiplier, plan.sample_rates[heavy], plan.steps_by_client[heavy])]
    prices = ", ".join(f"{k}: {statement.group_price(history, k, plan.delta, plan.accountant):.3g}" for k in (2, 5, 10))
    yield f"a person   with k examples in one client pays (k: epsilon) {prices}"
    live = "  ".join(f"{r}: {plan.live_by_round[r - 1]:,}" for r in _sampled(fed.rounds))
    yield f"live       {plan.survivors:,} of {plan.parameters:,} after pruning; by round {live}{_bound(plan.live_exact)}"
    for name, way in (("uplink", plan.uplink), ("downlink", plan.downlink)):
        rounds = "  ".join(f"{r}: {megabytes(way.payload_by_round[r - 1])}" for r in _sampled(fed.rounds))
        share = way.payload / way.dense_float32 if way.dense_float32 else 0.0
        yield f"{name:<10} {megabytes(way.payload)} payload, {share:.1%} of dense float32; by round {rounds}{_bound(way.exact)}"
        if way.positions is not None:
            n, k = way.positions.n, way.positions.k
            yield (
                f"           with up to {megabytes(way.positions.most)} of positions a message, {k:,} of {n:,}; "
                f"entropy bound {megabytes(way.positions.entropy_bound)}"
            )
    yield from _estimated(plan.estimate)
    if plan.max_rounds is not None:
        yield f"budget     allows {plan.max_rounds} rounds for a client that is asked in each of them"
    yield from (f"warning    {text}" for text in plan.warnings)


def _estimated(rough: Estimate) -> Iterator[str]:
    """Memory and time, and what they assume."""
    if rough.seconds is None or rough.client_memory_bytes is None or rough.seconds_per_round is None:
        yield "memory     not estimated: what this net multiplies and adds cannot be counted"
        yield "time       not estimated"
        return
    yield f"memory     {megabytes(rough.client_memory_bytes)} per client process, {rough.actors} at work at a time (an estimate)"
    yield (
        f"time       {duration(rough.seconds_per_round)} per round, {duration(rough.seconds)} in all (an estimate from "
        f"{rough.multiply_adds_per_example:,} multiply-adds per example)"
    )
    yield f"           assumed: {ASSUMES}"


def duration(seconds: float) -> str:
    """Seconds for people, two digits."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"


def _bound(exact: bool) -> str:
    return "" if exact else " (upper bounds)"


def _sampled(rounds: int) -> list[int]:
    """A few rounds spread over the run, first and last included."""
    count = min(rounds, 5)
    return sorted({1 + round(i * (rounds - 1) / max(1, count - 1)) for i in range(count)})


def versions_line(plan: Plan) -> str:
    """Which accountant said so."""
    return accountants.version(plan.accountant)
