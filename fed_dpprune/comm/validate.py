"""Checks of a received update that need numbers only: its length, finiteness, and size against what clipping and noise allow.

The bound holds for every honest client of a run together, but for a chance of `FALSE_REJECTION`; docs/wire.md derives it.
A client that stays below it can still lie: the bound stops absurd values from wrecking the sum, nothing more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fed_dpprune.errors import WireError

CODES = ("wrong-length", "non-finite", "header", "code", "padding", "positions", "out-of-bound")
FALSE_REJECTION = 1e-12
HALF_STEP = 2.0**-25  # of float16 below 2^-14, where its error is absolute
ROUNDING = 1.0 + 1e-5  # of the gradient and of the update in float32, far more than they need
ULP = 2.0**-23  # a float32 weight stored after a step is off by at most half of this, relatively


@dataclass(frozen=True)
class UpdateBound:
    """What bounds the update of one round; all of it public.

    Attributes:
        clip_norm: C, of one example's gradient on the live coordinates.
        noise_multiplier: sigma; the noise on the clipped sum has standard deviation sigma * C.
        divisor: q N_c, what the noised sum is divided by; also the expected batch.
        learning_rate: The client's effective rate (any scaling of the terms already in it).
        steps: Private steps in the round.
        coordinates: k, values in the update.
        clients: Clients asked per round.
        rounds: Rounds of the run.
        momentum: Of the client; its buffer starts each round at zero.
        weight_decay: Of the client, added to the gradient.
        weight: Upper bound of |weight| at the start of the round (the server knows its model).
        size_slack: How many times its nominal size a client may really have.
        overshoot: Of the uplink codec.
    """

    clip_norm: float
    noise_multiplier: float
    divisor: float
    learning_rate: float
    steps: int
    coordinates: int
    clients: int
    rounds: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    weight: float = 0.0
    size_slack: float = 2.0
    overshoot: float = 1.0

    def __post_init__(self) -> None:
        """Refuse terms for which the derivation says nothing."""
        positive = (self.clip_norm, self.divisor, self.learning_rate, self.size_slack, self.overshoot)
        not_negative = (self.noise_multiplier, self.momentum, self.weight_decay, self.weight)
        if not all(math.isfinite(x) and x > 0 for x in positive) or not all(math.isfinite(x) and x >= 0 for x in not_negative):
            raise ValueError("an input of the update bound is out of range")
        if min(self.steps, self.clients, self.rounds) < 1 or self.coordinates < 0:
            raise ValueError("an input of the update bound is out of range")

    @property
    def gradient(self) -> float:
        """Bound of one coordinate of one noised mean gradient (equation 3 of docs/wire.md)."""
        batches = self.steps * self.clients * self.rounds
        noise = math.sqrt(2 * math.log(2 * max(1, self.coordinates) * batches / FALSE_REJECTION))
        tail = math.log(2 * batches / FALSE_REJECTION)
        mean = self.size_slack * self.divisor
        examples = mean + tail / 3 + math.sqrt(tail * tail / 9 + 2 * tail * mean)
        return self.clip_norm * (examples + noise * self.noise_multiplier) / self.divisor

    @property
    def value(self) -> float:
        """Bound of one decoded |value| of the update: weight after the round minus weight before (equation 4)."""
        velocity, moved = 0.0, 0.0
        for _ in range(self.steps):
            velocity = self.momentum * velocity + self.gradient + self.weight_decay * (self.weight + moved)
            moved += self.learning_rate * velocity
            moved += ULP * (self.weight + moved)
        return moved * self.overshoot * ROUNDING + HALF_STEP


def check_update(values: NDArray[np.float32], k: int, bound: float) -> None:
    """Refuse a decoded update that no honest client could have sent.

    Args:
        values: What was decoded.
        k: Values that the terms promise.
        bound: `UpdateBound.value`.

    Raises:
        WireError: "wrong-length", "non-finite" or "out-of-bound".
    """
    if values.shape != (k,):
        raise WireError("update", "wrong-length", f"{k} values were expected, shape {values.shape} came")
    if not bool(np.isfinite(values).all()):
        raise WireError("update", "non-finite", "a value is not finite")
    if k and float(np.abs(values).max()) > bound:
        raise WireError("update", "out-of-bound", f"a value lies beyond {bound:.4g}")
