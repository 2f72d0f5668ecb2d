"""The client's own limits, set by its operator; nothing that a server sends can widen them.

Every comparison is written so that a number that is not a number is refused. All that leaves a client is a code; what a
code means, and what would have fitted, is worked out by whoever reads it, from what it knows itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fed_dpprune import config as cfg
from fed_dpprune.errors import ClientFault, ConfigError
from fed_dpprune.privacy.accountants import table
from fed_dpprune.privacy.node_values import missing, number, whole, words

REFUSAL_CODES: dict[str, str] = {
    "noise-multiplier-below-policy": "the noise multiplier is below the client's smallest (policy.min-noise-multiplier), "
    "or outside 0.01 to 1e6",
    "sample-rate-above-policy": "the sample rate is above the client's largest (policy.max-sample-rate), or is no rate of "
    "1e-9 to 1",
    "steps-above-policy": "the round has more steps than the client allows (policy.max-steps-per-round)",
    "delta-above-policy": "delta is not below 1 / nominal size",
    "delta-mismatch": "delta is not the one that the client's operator has fixed (policy-delta)",
    "accountant-mismatch": "accountant or unit are not those that the client's operator has fixed",
    "clip-norm-out-of-range": "the clip norm is outside the range in which the arithmetic keeps its promise, or above the "
    "client's largest",
    "release-not-allowed": "a release beside the update is asked for that the client does not allow (policy.allow-releases)",
    "provenance-not-allowed": "the support comes from where the client does not allow (policy.allow-provenance)",
    "budget-exhausted": "the state after the round would pass the client's largest epsilon (policy.max-epsilon)",
}
# Far inside what float32 sums of clipped gradients hold exactly enough; outside, an overflow or underflow could tell.
LEAST_CLIP_NORM, MOST_CLIP_NORM = 1e-6, 1e6
# Outside of these no accountant gives a figure worth having, and some take gigabytes or an hour to say so.
LEAST_NOISE, MOST_NOISE = 1e-2, 1e6
LEAST_RATE = 1e-9

# A node must say these; no number stands in for one that is missing.
REQUIRED_KEYS = ("policy-delta", "policy-max-epsilon", "policy-min-noise-multiplier")
NODE_KEYS = (
    *REQUIRED_KEYS,
    "policy-max-clip-norm",
    "policy-max-sample-rate",
    "policy-max-steps-per-round",
    "policy-allow-releases",
    "policy-allow-provenance",
)
UNIT = "example"  # the one that this version counts by
ALLOWABLE = ("random", "data-free", "public")  # a private support is charged or refused, never allowed by a word


@dataclass(frozen=True)
class ClientPolicy:
    """What one client allows.

    Attributes:
        max_epsilon: Largest epsilon over all runs of the ledger, after the charge; None for no limit.
        delta: The one delta of every claim; None takes that of the ledger, and is for plans alone.
        min_noise_multiplier: Smallest noise multiplier; zero noise is refused in any case.
        max_sample_rate: Largest sample rate.
        max_steps_per_round: Most private steps in one round.
        allow_releases: Names of releases beside the update that may leave.
        allow_provenance: Where supports may come from.
        max_clip_norm: Largest clip norm, None for that of the arithmetic.
        accountant: The one that counts; None takes that of the ledger, and is for plans alone.
        unit: Of privacy; None as before.
    """

    max_epsilon: float | None = None
    delta: float | None = None
    min_noise_multiplier: float = 0.0
    max_sample_rate: float = 1.0
    max_steps_per_round: int = 1000
    allow_releases: tuple[str, ...] = ()
    allow_provenance: tuple[str, ...] = ("random", "data-free", "public")
    max_clip_norm: float | None = None
    accountant: str | None = None
    unit: str | None = None

    @classmethod
    def from_config(cls, policy: cfg.Policy, delta: float | None = None) -> ClientPolicy:
        """The [policy] table of a simulation."""
        return cls(
            policy.max_epsilon,
            delta,
            policy.min_noise_multiplier,
            policy.max_sample_rate,
            policy.max_steps_per_round,
            policy.allow_releases,
            policy.allow_provenance,
        )

    @classmethod
    def from_node_config(cls, node: Mapping[str, Any]) -> ClientPolicy:
        """The limits of a SuperNode: its `policy-*` keys and its accountant; all other keys are left alone.

        Args:
            node: The node-config; `nominal-size` is read too, because delta must be below 1 / nominal size.

        Raises:
            ConfigError: A required key is missing, a `policy-` key is unknown (a misspelt limit must not be no limit),
                or a value is of the wrong type or impossible.
        """
        for key in node:
            if key.startswith("policy-") and key not in NODE_KEYS:
                near = difflib.get_close_matches(key, NODE_KEYS, n=1, cutoff=0.0)[0]
                raise ConfigError(f"node-config {key}", "is not a policy key", f"did you mean {near!r}?")
        size = whole(node, "nominal-size", least=1)
        return cls(
            max_epsilon=number(node, "policy-max-epsilon"),
            delta=number(node, "policy-delta", below=1 / size, bound="1 / nominal-size"),
            min_noise_multiplier=number(node, "policy-min-noise-multiplier"),
            max_sample_rate=number(node, "policy-max-sample-rate", default=1.0, most=1.0),
            max_steps_per_round=whole(node, "policy-max-steps-per-round", least=1, default=1000),
            allow_releases=words(node, "policy-allow-releases", default=()),
            allow_provenance=words(node, "policy-allow-provenance", default=ALLOWABLE, known=ALLOWABLE),
            max_clip_norm=number(
                node, "policy-max-clip-norm", default=MOST_CLIP_NORM, least=LEAST_CLIP_NORM, most=MOST_CLIP_NORM
            ),
            accountant=_accountant(node),
            unit=UNIT,
        )

    def check(
        self,
        *,
        noise_multiplier: float,
        sample_rate: float,
        steps: int,
        delta: float,
        clip_norm: float,
        provenance: str,
        nominal_size: int,
        accountant: str,
        unit: str,
        releases: Sequence[str] = (),
    ) -> None:
        """Refuse a round that this client does not allow, before anything is charged or computed.

        Args:
            noise_multiplier: As the terms state it; this and the next five come from the server, accountant and unit too.
            sample_rate: Poisson rate of each step.
            steps: Private steps of the round.
            delta: The claim's.
            clip_norm: As used.
            provenance: Of the round's support.
            nominal_size: The client's own declared size.
            accountant: By which the run counts.
            unit: Of its claim.
            releases: What would leave beside the update.

        Raises:
            ClientFault: With a code of REFUSAL_CODES; `budget-exhausted` comes from the ledger instead.
        """
        if not max(LEAST_NOISE, self.min_noise_multiplier) <= noise_multiplier <= MOST_NOISE:
            raise ClientFault("noise-multiplier-below-policy", f"{noise_multiplier!r} < {self.min_noise_multiplier!r}")
        if not LEAST_RATE <= sample_rate <= min(self.max_sample_rate, 1.0):
            raise ClientFault("sample-rate-above-policy", f"{sample_rate!r} > {self.max_sample_rate!r}")
        if not 1 <= steps <= self.max_steps_per_round:
            raise ClientFault("steps-above-policy", f"{steps!r} > {self.max_steps_per_round!r}")
        if not 0 < delta < 1 / max(nominal_size, 1):
            raise ClientFault("delta-above-policy", f"{delta!r}")
        if self.delta is not None and delta != self.delta:
            raise ClientFault("delta-mismatch", f"{delta!r}, not {self.delta!r}")
        if self.accountant not in (None, accountant) or self.unit not in (None, unit):
            raise ClientFault("accountant-mismatch", f"{accountant} by {unit}, not {self.accountant} by {self.unit}")
        if not LEAST_CLIP_NORM <= clip_norm <= min(MOST_CLIP_NORM, self.max_clip_norm or MOST_CLIP_NORM):
            raise ClientFault("clip-norm-out-of-range", f"{clip_norm!r}")
        for release in releases:
            if release not in self.allow_releases:
                raise ClientFault("release-not-allowed", release)
        if provenance not in self.allow_provenance:
            raise ClientFault("provenance-not-allowed", provenance)

    def explain(self, code: str) -> str:
        """Which limit of this policy a refusal met, and what would fit; for whoever knows the policy.

        Args:
            code: One of REFUSAL_CODES.
        """
        fits = {
            "noise-multiplier-below-policy": f"it takes at least {max(LEAST_NOISE, self.min_noise_multiplier):g}",
            "sample-rate-above-policy": f"it takes at most {self.max_sample_rate:g}",
            "steps-above-policy": f"it takes at most {self.max_steps_per_round}",
            "delta-above-policy": "it takes less than 1 / nominal size",
            "delta-mismatch": "it takes its own alone" + (f", {self.delta:g}" if self.delta else ""),
            "accountant-mismatch": f"it takes {self.accountant or 'its own accountant'} by {self.unit or 'its own unit'}",
            "clip-norm-out-of-range": f"it takes {LEAST_CLIP_NORM:g} to {self.max_clip_norm or MOST_CLIP_NORM:g}",
            "release-not-allowed": f"it allows {', '.join(self.allow_releases) or 'none'}",
            "provenance-not-allowed": f"it allows {', '.join(self.allow_provenance) or 'none'}",
            "budget-exhausted": f"its limit is {self.max_epsilon:g}"
            if self.max_epsilon is not None
            else "it has spent its limit",
        }
        return f"{REFUSAL_CODES[code]}; {fits[code]}"


def _accountant(node: Mapping[str, Any]) -> str:
    if "accountant" not in node:
        raise missing("accountant")
    name = node["accountant"]
    if not isinstance(name, str) or name not in table.ACCOUNTANTS:
        known = " | ".join(table.ACCOUNTANTS)
        raise ConfigError("node-config accountant", f"{name!r} is not an accountant", f"use one of {known}")
    return name
