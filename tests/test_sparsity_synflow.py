"""SynFlow: an independent float64 reference, conservation of flow, no layer lost, no net cut."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fed_dpprune.config import Prune
from fed_dpprune.errors import ConfigError
from fed_dpprune.models import initial, registry
from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.models.spec import ModelSpec
from fed_dpprune.sparsity import prune
from fed_dpprune.sparsity.criteria import synflow
from fed_dpprune.sparsity.criteria.table import CriterionContext


def _context(spec, seed=0):
    layout = registry.layout(spec)
    return CriterionContext(layout, initial.draw(layout, seed), lambda: registry.build(spec), spec.input_shape, seed)


def _of_module(make, input_shape):
    """The context of any module, with the weights it was made with."""
    torch.manual_seed(0)
    model = make()
    tensors = [Tensor(name, tuple(p.shape), "bias" if p.ndim == 1 else "weight") for name, p in model.named_parameters()]
    weights = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    return CriterionContext(Layout(tuple(tensors)), weights, make, input_shape, 0)


def _sums(scores, layout):
    return {tensor.name: scores[span].sum() for tensor, span in layout.spans()}


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_scores_of_an_mlp_agree_with_products_of_matrices(activation):
    context = _context(ModelSpec("mlp", (20, 15), activation, (11,), 7))
    values = [np.abs(v.astype(np.float64)) for v in context.layout.split(context.weights).values()]
    weights, biases = values[0::2], values[1::2]
    inputs = [np.ones(11)]
    for weight, bias in zip(weights, biases, strict=True):
        inputs.append(weight @ inputs[-1] + bias)
    slope, expected = np.ones(7), []
    for weight, bias, before in reversed(list(zip(weights, biases, inputs, strict=False))):
        expected = [(weight * np.outer(slope, before)).ravel(), bias * slope, *expected]
        slope = weight.T @ slope
    np.testing.assert_allclose(synflow.scores(context), np.concatenate(expected), rtol=1e-9)


def _without(module):
    """The module with activations and norm layers taken out, as an independent way to linearise."""
    for name, child in module.named_children():
        setattr(module, name, nn.Identity() if isinstance(child, nn.Tanh | nn.ReLU | nn.GroupNorm) else _without(child))
    return module


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec("tanh-cnn", (), "tanh", (1, 28, 28), 10),
        ModelSpec("dp-cnn", (), "tanh", (3, 32, 32), 10),
        ModelSpec("resnet20", (), "relu", (3, 32, 32), 10),
    ],
    ids=lambda spec: spec.name,
)
def test_scores_of_the_nets_agree_with_a_float64_reference(spec):
    context = _context(spec)
    model = registry.build(spec).double()
    for parameter, (_, span) in zip(model.parameters(), context.layout.spans(), strict=True):
        parameter.data = torch.from_numpy(np.abs(context.weights[span]).astype(np.float64)).reshape(parameter.shape)
    named = dict(model.named_parameters())
    total = _without(model)(torch.ones((1, *spec.input_shape), dtype=torch.float64)).sum()
    slopes = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    parts = [
        np.zeros(p.numel()) if g is None else (p * g).detach().numpy().ravel()
        for p, g in zip(named.values(), slopes, strict=True)
    ]
    np.testing.assert_allclose(synflow.scores(context), np.concatenate(parts), rtol=1e-9)


def _bias_free():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 9, bias=False),
        nn.ReLU(),
        nn.Linear(9, 5, bias=False),
    )


def test_every_layer_of_a_bias_free_relu_net_carries_the_same_flow():
    context = _of_module(_bias_free, (2, 8, 8))
    model = _bias_free().double()
    for parameter, (_, span) in zip(model.parameters(), context.layout.spans(), strict=True):
        parameter.data = torch.from_numpy(np.abs(context.weights[span]).astype(np.float64)).reshape(parameter.shape)
    total = model(torch.ones(1, 2, 8, 8, dtype=torch.float64)).sum().item()
    for flow in _sums(synflow.scores(context), context.layout).values():
        assert flow == pytest.approx(total, rel=1e-12)


def test_what_flows_into_a_hidden_unit_flows_out_of_it():
    context = _of_module(_bias_free, (2, 8, 8))
    scores = context.layout.split(synflow.scores(context))
    into, out_of = scores["7.weight"].sum(axis=1), scores["9.weight"].sum(axis=0)
    assert into == pytest.approx(out_of, rel=1e-12)


class _Spelled(nn.Module):
    """The same net with every activation and norm spelled as a function."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(F.gelu(self.norm(self.first(x))))
        return self.second(F.dropout(F.group_norm(x, 2), 0.5, training=True).sigmoid())


def test_activations_and_norms_count_as_identity_however_they_are_spelled():
    context = _of_module(_Spelled, (6,))
    plain = _of_module(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), (6,))
    flat = {name: v for name, v in context.layout.split(context.weights).items() if not name.startswith("norm")}
    plain = replace(plain, weights=np.concatenate([v.ravel() for v in flat.values()]))
    scores = context.layout.split(synflow.scores(context))
    assert not scores["norm.weight"].any()
    kept = np.concatenate([v.ravel() for name, v in scores.items() if not name.startswith("norm")])
    assert kept == pytest.approx(synflow.scores(plain), rel=1e-12)


def test_scores_leave_signs_out_and_the_callers_world_alone():
    context = _context(ModelSpec("mlp", (20,), "tanh", (11,), 7))
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    scores = synflow.scores(context)
    assert np.array_equal(scores, synflow.scores(replace(context, weights=-context.weights)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_scores_do_not_depend_on_the_thread_count():
    context, found, before = _context(ModelSpec("tanh-cnn", (), "tanh", (1, 28, 28), 10)), [], torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(synflow.scores(context))
    torch.set_num_threads(before)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_pruning_is_step_by_step_and_never_revives():
    context = _context(ModelSpec("mlp", (20, 15), "tanh", (11,), 7))
    supports = [prune.pre_prune(Prune(method="synflow", rate=0.7, iterations=n), context) for n in (1, 10)]
    assert supports[0].k == supports[1].k
    assert supports[0].digest != supports[1].digest
    weights = prune.prunable(context.layout, ("bias", "norm"))
    live, score = np.ones(context.layout.d, dtype=bool), synflow.scorer(context)
    for step in range(1, 11):
        positions = np.flatnonzero(weights & live)
        share = 1 - 0.3 ** (step / 10) if step < 10 else 0.7
        keep = int(weights.sum()) - int(share * weights.sum() * (1 + 2**-50))
        best = positions[np.argsort(-score(live)[positions], kind="stable")[:keep]]
        live = ~weights
        live[best] = True
    assert np.array_equal(supports[1].indices, np.flatnonzero(live))


def test_dead_weights_score_nothing_and_live_on_alone():
    context = _context(ModelSpec("mlp", (20,), "tanh", (11,), 7))
    live = np.random.default_rng(0).random(context.layout.d) < 0.5
    scores = synflow.scorer(context)(live)
    assert not scores[~live].any()
    assert np.array_equal(scores, synflow.scores(replace(context, weights=np.where(live, context.weights, 0).astype(np.float32))))


def test_a_net_that_pruning_cuts_is_refused_though_its_biases_still_speak():
    context = _of_module(lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), (6,))
    cut = context.weights.copy()
    cut[: 6 * 4] = 0
    with pytest.raises(ConfigError, match="no path"):
        synflow.scores(replace(context, weights=cut))
    with pytest.raises(ConfigError, match="no path") as caught:
        prune.pre_prune(Prune(method="synflow", rate=0.98, iterations=3), context)
    assert caught.value.exit_code == 2


class _Branched(nn.Module):
    """A wide body beside a narrow shortcut."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(30, 40), nn.Linear(30, 40), nn.Linear(40, 3)

    def forward(self, x):
        return self.head(10 * self.wide(x) + 1e-3 * self.narrow(x))


def test_a_parallel_branch_may_be_emptied_since_it_cuts_nothing():
    context = _of_module(_Branched, (30,))
    survivors = prune.pre_prune(Prune(method="synflow", rate=0.8, iterations=10), context)
    assert prune.emptied(survivors, context.layout) == ["narrow.weight"]


def test_flow_too_large_for_float64_is_refused():
    context = _of_module(lambda: nn.Sequential(*[nn.Linear(9, 9, bias=False) for _ in range(10)]), (9,))
    with pytest.raises(ConfigError, match="overflows"):
        synflow.scores(replace(context, weights=np.full(context.layout.d, 1e35, np.float32)))


def test_a_net_that_is_not_of_the_layout_is_refused():
    context = _context(ModelSpec("mlp", (20,), "tanh", (11,), 7))
    with pytest.raises(ValueError, match="layout"):
        synflow.scores(replace(context, build=lambda: nn.Linear(11, 7)))


def test_99_percent_of_resnet20_leaves_every_layer_alive():
    context = _context(ModelSpec("resnet20", (), "relu", (3, 32, 32), 10))
    survivors = prune.pre_prune(Prune(method="synflow", rate=0.99, iterations=100), context)
    assert prune.emptied(survivors, context.layout) == []
    weights = int(prune.prunable(context.layout, ("bias", "norm")).sum())
    assert survivors.k == context.layout.d - int(0.99 * weights)
