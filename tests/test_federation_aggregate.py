"""The server's step: the plain mean on the support, and an optimiser that leaves every other coordinate as it was."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import small_run
from safetensors.numpy import load_file

from fed_dpprune import config as cfg
from fed_dpprune.federation import aggregate, start
from fed_dpprune.models import registry
from fed_dpprune.models.spec import from_config
from fed_dpprune.sparsity.support import Support

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"server.momentum": 0.9},
    "adam": {"server.optimizer": "adam", "server.learning-rate": 0.05},
}


def support(*indices: int, d: int = 6) -> Support:
    return Support(np.array(indices, dtype=np.int64), d)


def test_the_mean_is_plain_and_in_double_precision():
    values = [np.array([1, 2], dtype=np.float32), np.array([2, 4], dtype=np.float32), np.array([6, 0], dtype=np.float32)]
    mean = aggregate.mean_on_support(values)
    assert mean.dtype == np.float64
    assert mean.tolist() == [3.0, 2.0]


def test_the_mean_of_own_supports_is_over_those_who_sent_the_coordinate():
    moved, mean = aggregate.mean_by_coordinate(
        [support(0, 2), support(2, 5)], [np.array([1, 2], dtype=np.float32), np.array([4, 6], dtype=np.float32)], 6
    )
    assert moved.indices.tolist() == [0, 2, 5]
    assert mean.tolist() == [1.0, 3.0, 6.0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_does_not_live_in_a_round_is_bit_identical_after_it(optimizer):
    server = cfg.build({"privacy.epsilon": 1.0, **OPTIMIZERS[optimizer]}).server
    made = aggregate.ServerOptimizer(server, 6, 4)
    weights = np.array([0.1, -0.0, np.float32(1e-40), 3, 4, 5], dtype=np.float32)
    weights = made.step(weights, support(0, 1, 2, 3, 4, 5), np.ones(6), 1)
    after = made.step(weights, support(1, 4), np.array([1.0, -1.0]), 2)
    frozen = [0, 2, 3, 5]
    assert after[frozen].tobytes() == weights[frozen].tobytes()
    assert np.all(after[[1, 4]] != weights[[1, 4]])


def test_momentum_of_a_coordinate_rests_while_it_is_frozen():
    made = aggregate.ServerOptimizer(cfg.Server(momentum=0.5), 6, 4)
    weights = np.zeros(6, dtype=np.float32)
    weights = made.step(weights, support(0, 1), np.array([1.0, 1.0]), 1)
    weights = made.step(weights, support(1), np.array([1.0]), 2)
    weights = made.step(weights, support(0, 1), np.array([0.0, 0.0]), 3)
    assert weights[:2].tolist() == [1 + 0.5, 1 + 1.5 + 0.75]


def test_adam_counts_the_visits_of_each_coordinate():
    """The first visit of a coordinate moves it by its sign times the rate, in whatever round it comes."""
    made = aggregate.ServerOptimizer(cfg.Server(optimizer="adam"), 6, 9)
    weights = np.zeros(6, dtype=np.float32)
    for number in range(1, 6):
        weights = made.step(weights, support(0), np.array([2.0]), number)
    weights = made.step(weights, support(3), np.array([-2.0]), 6)
    assert weights[3] == pytest.approx(-2 / (2 + aggregate.TAU), rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2)]),
    ],
)
def test_the_servers_rate_follows_its_schedule(schedule, rates):
    server = cfg.Server(schedule=schedule)
    assert [aggregate.learning_rate(server, r, 4) for r in range(1, 5)] == pytest.approx(rates)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_that_is_stored_and_restored_goes_on_alike(optimizer):
    server = cfg.build({"privacy.epsilon": 1.0, **OPTIMIZERS[optimizer]}).server
    one, other = aggregate.ServerOptimizer(server, 6, 4), aggregate.ServerOptimizer(server, 6, 4)
    weights = one.step(np.zeros(6, dtype=np.float32), support(0, 3), np.array([1.0, 2.0]), 1)
    other.restore(one.state())
    args = (weights, support(3, 4), np.array([1.0, -1.0]), 2)
    assert one.step(*args).tobytes() == other.step(*args).tobytes()


# --- over a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("inactive", ["zero", "hold"])
def test_frozen_means_frozen_in_every_round_of_a_run(tmp_path, optimizer, inactive):
    """With client momentum, weight decay and a server optimiser on."""
    conf = small_run.config(**OPTIMIZERS[optimizer], **{"sparsity.prune.inactive": inactive})
    assert (conf.client.momentum, conf.client.weight_decay) == (0.9, 0.01)
    steps = []
    step = aggregate.ServerOptimizer.step

    def watched(self, weights, moving, mean, number):
        after = step(self, weights, moving, mean, number)
        steps.append((weights.copy(), moving, after.copy()))
        return after

    with patch.object(aggregate.ServerOptimizer, "step", watched):
        outcome, grid = small_run.run(conf, tmp_path)
    assert outcome.status == "complete"
    assert [s.k for _, s, _ in steps] == [row["live"] for row in small_run.rounds(tmp_path)]
    assert [s.digest for _, s, _ in steps] == [grid.requests[r, 0][0]["terms"]["digest"] for r in range(1, 5)]
    for before, moving, after in steps:
        assert after[~moving.mask].tobytes() == before[~moving.mask].tobytes()
        assert np.mean(after[moving.mask] != before[moving.mask]) > 0.99


@pytest.mark.parametrize("inactive", ["zero", "hold"])
def test_what_was_pruned_is_in_the_saved_model_as_it_began(tmp_path, inactive):
    conf = small_run.config(**{"sparsity.prune.inactive": inactive, "sparsity.freeze.rate": 0.0})
    outcome, _ = small_run.run(conf, tmp_path)
    layout = registry.layout(from_config(conf.model, (64,), 10))
    saved = load_file(tmp_path / "model.safetensors")
    model = np.concatenate([saved[t.name].ravel() for t in layout.tensors])
    begun = start.public_weights(layout, conf.seed)
    same = model == (begun if inactive == "hold" else 0.0)
    assert same.sum() == 1210 - outcome.summary["sparsity"]["live_after_pruning"]
