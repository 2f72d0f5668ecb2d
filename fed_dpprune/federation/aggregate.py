"""The server's arithmetic: the plain mean of the clients' values on the support, and one optimiser step there.

Every client weighs the same, a public constant: weights by example counts would release the counts. A client that does
not answer is left out of sum and divisor alike. Only coordinates of the round's support move, whatever the optimiser.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fed_dpprune import config as cfg
from fed_dpprune.sparsity.support import Support, union

# FedAdam's own choices (Reddi et al., arXiv 2003.00295, section 5): beta_2 0.99, tau 1e-3; beta_1 0.9 unless momentum is set.
BETA_1, BETA_2, TAU = 0.9, 0.99, 1e-3


def mean_on_support(values: list[NDArray[np.float32]]) -> NDArray[np.float64]:
    """The mean of the clients' values, shape (k,).

    Args:
        values: One array of shape (k,) per client, in order of partition id: the order of a floating-point sum is part
            of the result (invariant 11).
    """
    total = np.zeros(values[0].shape, dtype=np.float64)
    for value in values:
        total += value
    return total / len(values)


def mean_by_coordinate(supports: list[Support], values: list[NDArray[np.float32]], d: int) -> tuple[Support, NDArray[np.float64]]:
    """Each coordinate's mean over the clients that sent it, for supports that are not shared.

    Returns:
        The union of the supports and the means on it, shape (k,). A coordinate that few clients drew moves with the noise
        of few: the bias and variance of this are stated in docs/methods.md.
    """
    total, count = np.zeros(d), np.zeros(d)
    for support, value in zip(supports, values, strict=True):
        total[support.indices] += value
        count[support.indices] += 1
    moved = union(supports)
    return moved, total[moved.indices] / count[moved.indices]


def learning_rate(server: cfg.Server, round: int, rounds: int) -> float:
    """The server's rate of a round (counted from 1): constant, or falling towards 0 after the last round."""
    progress = (round - 1) / rounds
    if server.schedule == "linear":
        return server.learning_rate * (1.0 - progress)
    if server.schedule == "cosine":
        return server.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return server.learning_rate


class ServerOptimizer:
    """SGD with momentum, or Adam, on live coordinates only.

    A coordinate's state changes only in rounds in which it lives; Adam's bias correction counts its own visits.

    Args:
        server: The config's [server].
        d: Length of the parameter vector.
        rounds: Rounds of the run, for the schedule.
    """

    def __init__(self, server: cfg.Server, d: int, rounds: int) -> None:
        self._server, self._rounds = server, rounds
        self._state: dict[str, NDArray[np.float64]] = {}
        if server.optimizer == "adam":
            self._state = {"first": np.zeros(d), "second": np.zeros(d), "visits": np.zeros(d)}
        elif server.momentum:
            self._state = {"velocity": np.zeros(d)}

    def step(self, weights: NDArray[np.float32], support: Support, mean: NDArray[np.float64], round: int) -> NDArray[np.float32]:
        """The new weights, shape (d,); off the support they are bit-identical to `weights`."""
        index, rate = support.indices, learning_rate(self._server, round, self._rounds)
        move = self._adam(index, mean) if self._server.optimizer == "adam" else self._sgd(index, mean)
        new = weights.copy()
        new[index] = (weights[index].astype(np.float64) + rate * move).astype(np.float32)
        return new

    def _sgd(self, index: NDArray[np.int64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
        if "velocity" not in self._state:
            return mean
        velocity = self._state["velocity"]
        velocity[index] = self._server.momentum * velocity[index] + mean
        return velocity[index]

    def _adam(self, index: NDArray[np.int64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
        beta = self._server.momentum or BETA_1
        first, second, visits = self._state["first"], self._state["second"], self._state["visits"]
        visits[index] += 1
        first[index] = beta * first[index] + (1 - beta) * mean
        second[index] = BETA_2 * second[index] + (1 - BETA_2) * mean * mean
        unbiased = first[index] / (1 - beta ** visits[index])
        scale = np.sqrt(second[index] / (1 - BETA_2 ** visits[index]))
        return np.asarray(unbiased / (scale + TAU))

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Arrays for the checkpoint."""
        return dict(self._state)

    def restore(self, state: dict[str, NDArray[np.float64]]) -> None:
        """Continue from a checkpoint's arrays."""
        self._state = {name: state[name].copy() for name in self._state}
