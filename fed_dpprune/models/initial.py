"""First weights, by exact arithmetic on our own counter bits: equal on every machine. numpy only.

So round 0 need send no values at all: both ends draw the same vector. The golden digests in the tests hold it fixed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import randomness
from fed_dpprune.models.flat import Layout, Tensor


def bound(tensor: Tensor) -> float:
    """Half-width of the uniform draw: 1/sqrt(fan_in) (LeCun et al. 1998 up to a constant; also torch's default).

    Without a fan-in: 1/sqrt(row length) for tables and other matrices, 0 for other vectors.
    """
    if tensor.fan_in:
        return 1.0 / math.sqrt(tensor.fan_in)
    return 1.0 / math.sqrt(math.prod(tensor.shape[1:])) if len(tensor.shape) > 1 else 0.0


def draw(layout: Layout, seed: int) -> NDArray[np.float32]:
    """Initial values of all parameters, shape (d,), float32.

    Weights and biases are uniform in +-1/sqrt(fan_in), norm weights 1, norm biases 0. One stream ("init") runs through
    the whole vector, so a tensor's values do not depend on which others are frozen.
    """
    values = randomness.uniform_f32(layout.d, seed, "init")
    for tensor, span in layout.spans():
        if tensor.kind == "norm":
            values[span] = 0.0 if tensor.name.endswith("bias") else 1.0
        else:
            values[span] *= np.float32(bound(tensor))
    return values
