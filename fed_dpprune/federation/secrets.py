"""Where a client's secret randomness comes from: which examples a batch holds, and the noise.

The default is the operating system's entropy. The seeded kind exists for reproducible simulations and can be had only
by a caller that builds the client in its own process (`federation/run.py` does): no run-config, node-config or message
reaches the constructor below (invariant 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fed_dpprune.data.sampling import OsUniforms, SeededUniforms, Uniforms
from fed_dpprune.dpsgd.noise import NoiseSource, OsNoise, SeededNoise
from fed_dpprune.federation.terms import RoundTerms


class Secrets(Protocol):
    """One client's secret streams."""

    @property
    def label(self) -> str:
        """As in summary.json: "os-entropy" or "seeded-simulation"."""

    def noise(self, terms: RoundTerms, step: int) -> NoiseSource:
        """The noise of one local step of one request."""

    def uniforms(self, terms: RoundTerms, step: int) -> Uniforms:
        """The Poisson sampler's uniforms of one local step."""


@dataclass(frozen=True)
class OsSecrets:
    """Operating-system entropy for every draw; nothing can be asked to repeat it."""

    label: str = "os-entropy"

    def noise(self, terms: RoundTerms, step: int) -> NoiseSource:
        """A fresh key per step."""
        return OsNoise()

    def uniforms(self, terms: RoundTerms, step: int) -> Uniforms:
        """A fresh key per step, apart from the noise's."""
        return OsUniforms()


@dataclass(frozen=True)
class SeededSecrets:
    """Reproducible streams for a simulation; worthless as protection against anyone who knows the seed.

    The noise stream is named by the request's digest, so that the same round asked again with anything changed gets
    other noise; the batches by round and step alone, so that two arms of a study see the same batches.
    """

    seed: int
    label: str = "seeded-simulation"

    def noise(self, terms: RoundTerms, step: int) -> NoiseSource:
        """Keyed by seed, client, round, step and the request's digest."""
        return SeededNoise(self.seed, terms.client, terms.round, step, terms.key)

    def uniforms(self, terms: RoundTerms, step: int) -> Uniforms:
        """Keyed by seed, client, round and step."""
        return SeededUniforms(self.seed, terms.client, terms.round, step)
