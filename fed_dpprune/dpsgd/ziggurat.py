"""The layers of the ziggurat that numpy draws its float64 standard normals with, computed anew. numpy only.

A ziggurat of 256 layers of equal area under exp(-x^2 / 2) (Marsaglia and Tsang 2000, as Doornik 2005 cuts it). Which values
numpy's own layers have to the bit was found by handing its generator chosen words and watching what it accepts; its
recursion ran in float64, so ours does, with every exponential and logarithm rounded correctly on any machine.
Lives here: the layers, and the proof that draws made with them are numpy's. The draws are the kernel's (`kernels/normal.cpp`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from decimal import Context, Decimal

import numpy as np
from numpy.typing import NDArray

LAYERS = 256
EDGE = 3.6541528853610088  # where the tail begins
AREA = 0.004928673233974652  # of each layer, tail included in the lowest
# exp at this layer's edge lies within 0.003 of a unit in the last place of halfway between two floats; numpy's went up.
ROUNDED_UP = 38
_DIGITS = Context(prec=25)
# With this key, eleven of 20,000 draws lie in the tails, at both ends, and some 250 in the wedges.
_CHECK_KEY, _CHECK_CALLS = (5, 25), (1, 3, 1000, 7, 0, 18_989)
Draw = Callable[[NDArray[np.float64]], None]


def _exp(value: float) -> float:
    return float(_DIGITS.exp(Decimal(value)))


def _log(value: float) -> float:
    return float(_DIGITS.ln(Decimal(value)))


@functools.cache
def layers() -> NDArray[np.uint64]:
    """The layers as the kernel reads them, shape (768,), uint64, read-only.

    Entries 2i and 2i + 1 (i < 256): layer i's width over 2^52 (the bits of a float64), and the 52-bit magnitude below which
    a draw is inside for certain (an integer). Entry 512 + i: the height exp(-x^2 / 2) at its edge x (the bits of a float64).
    """
    edge, height = np.zeros(LAYERS), np.ones(LAYERS)
    edge[-1] = EDGE
    for i in range(LAYERS - 1, 0, -1):
        height[i] = _exp(-0.5 * edge[i] * edge[i])
        if i == ROUNDED_UP:
            height[i] = math.nextafter(height[i], 1.0)
        if i > 1:
            edge[i - 1] = math.sqrt(-2.0 * _log(AREA / edge[i] + height[i]))
    edge[0] = AREA / height[-1]  # the lowest layer's rectangle, drawn out to hold the tail's area
    inner = np.concatenate([[EDGE, 0.0], edge[1:-1]])
    table = np.empty((LAYERS, 2), dtype=np.uint64)
    table[:, 0] = (edge * 2.0**-52).view(np.uint64)
    table[:, 1] = np.rint(inner / edge * 2.0**52).astype(np.uint64)
    found = np.concatenate([table.ravel(), height.view(np.uint64)])
    found.flags.writeable = False
    return found


def agrees_with_numpy(stream: Callable[[NDArray[np.uint64]], Draw]) -> bool:
    """Whether a generator gives numpy's values to the bit, in calls of odd lengths, wedges and both tails included.

    Args:
        stream: Makes a generator from a Philox key of shape (2,), uint64; the generator fills a float64 vector at each call.
    """
    key = np.array(_CHECK_KEY, dtype=np.uint64)
    theirs, ours = np.random.Generator(np.random.Philox(key=key, counter=0)), stream(key)
    for count in _CHECK_CALLS:
        values = np.empty(count)
        ours(values)
        if values.tobytes() != theirs.standard_normal(count).tobytes():
            return False
    return True
