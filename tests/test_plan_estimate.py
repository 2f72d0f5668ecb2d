"""The plan's estimate of memory and time: counted work by hand and by torch, and how the figures move."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fed_dpprune import cli, estimate
from fed_dpprune import config as cfg
from fed_dpprune.estimate import Estimate
from fed_dpprune.federation.facts import gather
from fed_dpprune.models import layers, registry
from fed_dpprune.models.flat import Layout, Tensor, Work
from fed_dpprune.models.layers import Activation, Conv, Flatten, Linear, MaxPool, Residual
from fed_dpprune.models.spec import ModelSpec
from fed_dpprune.plan import Facts, make_plan
from fed_dpprune.study.closing import duration, planned
from tests import small_run

WORK = Work(2_000_000, 30_000)
CONVOLUTIONS = Layout((Tensor("c.weight", (16, 8, 5, 5)), Tensor("c.bias", (16,), "bias"), Tensor("h.weight", (10, 100))))
NETS = [("mlp", (64,)), ("logistic", (3, 4, 5)), ("tanh-cnn", (1, 28, 28)), ("dp-cnn", (3, 32, 32))]  # fmt: skip
NETS += [("resnet20", (3, 32, 32)), ("wrn16-4", (3, 32, 32))]


def rough(work: Work | None = WORK, *, batch: float = 50.0, live: int = 3000, test: int = 1000, actors: int = 1, clients: int = 4,
          layout: Layout = CONVOLUTIONS, **changes) -> Estimate:  # fmt: skip
    conf = small_run.config(**changes)
    return estimate.estimate(
        conf, layout, work, batches=[batch] * clients, cohorts=[tuple(range(clients))] * conf.federation.rounds,
        live_by_round=[live] * conf.federation.rounds, test_size=test, actors=actors,
    )  # fmt: skip


# --- counted work ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "multiply_adds", "values"),
    [
        (Linear(10), (7,), 70, 10),
        (Conv(4, 3, padding=1), (2, 8, 8), 4 * 8 * 8 * 2 * 3 * 3, 4 * 8 * 8),
        (Conv(4, 3, stride=2, bias=False), (2, 8, 8), 4 * 3 * 3 * 2 * 3 * 3, 4 * 3 * 3),
        (MaxPool(2, 2), (3, 8, 8), 0, 3 * 4 * 4),
        (Activation("tanh"), (5,), 0, 5),
        (Flatten(), (2, 3, 4), 0, 0),
        (Residual((("c", Conv(2, 3, padding=1)),)), (2, 4, 4), 2 * 4 * 4 * 2 * 9, 2 * 2 * 4 * 4),
    ],
)
def test_the_work_of_a_layer_is_the_one_counted_by_hand(layer, shape, multiply_adds, values):
    assert layer.work(shape) == Work(multiply_adds, values)


def test_the_work_of_a_net_is_the_sum_at_the_shapes_inside():
    net = (("c", Conv(4, 3)), ("p", MaxPool(2, 2)), ("f", Flatten()), ("h", Linear(10)))
    assert layers.work(net, (1, 8, 8)) == Work(4 * 36 * 9 + 36 * 10, 4 * 36 + 36 + 0 + 10)


@pytest.mark.parametrize(("name", "shape"), NETS)
def test_torchs_own_counter_sees_the_same_multiply_adds(name, shape):
    from fed_dpprune.models import foreign

    spec = ModelSpec(name, (128,), "tanh", shape, 10)
    seen = foreign.work(registry.build(spec), shape)
    layout, work = registry.described(spec)
    assert seen is not None and work is not None
    assert layout == registry.layout(spec)
    assert work.multiply_adds == seen.multiply_adds
    assert 0.5 < work.values / seen.values < 2 or name in ("mlp", "logistic")  # these keep their inputs, next to nothing


def test_a_users_products_are_counted_outside_layers_too_and_a_recurrent_net_is_not_guessed():
    import torch
    from torch import nn

    from fed_dpprune.models import foreign

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(6, 9))

        def forward(self, x):
            return x @ self.w

    class Odd(nn.Module):
        def forward(self, x):
            raise RuntimeError("not today")

    assert foreign.work(Product(), (6,)) == Work(54, 6)
    assert foreign.work(nn.GRU(6, 4), (3, 6)) is None
    assert foreign.work(Odd(), (6,)) is None
    assert foreign.work(nn.Tanh(), (6,)) is None


# --- how the figures move -------------------------------------------------------------------------------------------------


def test_memory_grows_with_the_batch_and_the_live_count_up_to_the_micro_batch():
    base = rough().client_memory_bytes
    assert rough(batch=100).client_memory_bytes - base == pytest.approx(4 * 50 * (2 * WORK.values + 3000 * 3216 / 4216))
    assert rough(live=4000).client_memory_bytes - base == pytest.approx(4 * 50 * 1000 * 3216 / 4216)
    capped = rough(batch=10**9, live=4000).client_memory_bytes
    assert capped == rough(batch=10**8, live=4000).client_memory_bytes
    assert capped - base < 4 * estimate.HELD_BYTES * WORK.values
    assert rough(batch=10**9, **{"engine.micro-batch": 100}).client_memory_bytes == rough(batch=100).client_memory_bytes


def test_the_cap_is_the_gradient_engines():
    from fed_dpprune.dpsgd.reference import MEMORY_BYTES

    assert estimate.HELD_BYTES == MEMORY_BYTES


def test_the_rows_of_a_micro_batch_are_the_gradient_engines():
    from fed_dpprune.dpsgd import gradient

    for name in ("ROWS", "ROWS_OF_SMALL", "SMALL"):
        assert getattr(estimate, name) == getattr(gradient, name)


def test_matrices_hold_no_gradient_of_each_example():
    matrices = Layout((Tensor("h.weight", (100, 100)),))
    assert rough(layout=matrices, live=10_000).client_memory_bytes == rough(layout=matrices, live=10).client_memory_bytes
    frozen = Layout((replace(CONVOLUTIONS.tensors[0], frozen=True), Tensor("h.weight", (100, 100))))
    assert rough(layout=frozen, live=10_000).client_memory_bytes == rough(layout=frozen, live=10).client_memory_bytes


def test_time_grows_in_step_with_rounds_steps_clients_and_work():
    one = rough()
    train = one.seconds_per_round - estimate.SECONDS_PER_ROUND - 1000 * 0.5 * (2e6 * 0.05e-9 + 3e4 * 2.5e-9)
    more = rough(**{"federation.rounds": 12})
    assert more.seconds_per_round == pytest.approx(one.seconds_per_round)
    assert more.seconds - more.seconds_before == pytest.approx(3 * (one.seconds - one.seconds_before))
    assert rough(clients=8).seconds_per_round - one.seconds_per_round == pytest.approx(train)
    steps = rough(**{"federation.local-steps": 4}).seconds_per_round - one.seconds_per_round
    assert steps == pytest.approx(train - 4 * estimate.SECONDS_PER_CLIENT["inline"])
    assert rough(actors=4).seconds_per_round == pytest.approx(one.seconds_per_round - train * 3 / 4)
    assert rough(actors=40).seconds_per_round == pytest.approx(rough(actors=4).seconds_per_round)  # one client is the least
    assert rough(test=0).seconds_per_round == pytest.approx(train + estimate.SECONDS_PER_ROUND)
    assert rough(Work(2 * WORK.multiply_adds, WORK.values), test=0).seconds_per_round - rough(test=0).seconds_per_round == (
        pytest.approx(4 * 2 * (50 + estimate.ROWS_OF_SMALL / 2) * WORK.multiply_adds * estimate.SECONDS_PER_MULTIPLY_ADD)
    )


def test_time_follows_the_live_count_round_by_round():
    conf = small_run.config()
    made = make_plan(conf, gather(conf).facts)
    assert list(made.live_by_round) == sorted(made.live_by_round, reverse=True)
    seconds = made.estimate.seconds_by_round
    assert list(seconds) == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]


def test_a_cohort_counts_its_own_clients():
    conf = small_run.config(**{"federation.clients-per-round": 2})
    facts = gather(conf).facts
    whole = make_plan(small_run.config(), facts).estimate.seconds_per_round
    assert make_plan(conf, facts).estimate.seconds_per_round < whole


# --- what is printed ------------------------------------------------------------------------------------------------------


def test_plan_json_has_the_estimate_and_its_assumption(tmp_path, capsys):
    path = tmp_path / "small.toml"
    path.write_text(cfg.to_toml(small_run.config()))
    assert cli.main(["plan", str(path), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["estimate"]
    assert made["multiply_adds_per_example"] == 64 * 16 + 16 * 10
    assert made["actors"] == 1
    assert 500 < made["client_memory_mb"] < 1500
    assert 0.005 < made["seconds_per_round"] < 1 < made["seconds"] < 60
    assert "NOTES.md" in made["assumes"]
    assert cli.main(["plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1,184 multiply-adds per example" in out
    assert "per client process" in out
    assert "an estimate" in out


def test_unknown_work_is_said_and_not_guessed():
    conf = small_run.config()
    facts = gather(conf).facts
    made = make_plan(conf, Facts(facts.layout, facts.nominal_sizes, facts.test_size))
    figures = made.estimate.as_json()
    assert {figures[k] for k in ("multiply_adds_per_example", "client_memory_mb", "seconds_per_round", "seconds")} == {None}
    assert sum("not estimated" in line for line in planned(made, conf)) == 2


@pytest.mark.parametrize(("seconds", "text"), [(0.0314, "0.031 s"), (61.4, "61 s"), (150, "2.5 min"), (7300, "2 h")])
def test_seconds_for_people(seconds, text):
    assert duration(seconds) == text
