"""Layer-energy odds: data-free, repeatable, the square root of the energy of synthetic gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fed_dpprune import randomness
from fed_dpprune.models import initial, registry
from fed_dpprune.models.spec import ModelSpec
from fed_dpprune.sparsity.criteria.table import CriterionContext
from fed_dpprune.sparsity.odds import BLOB, EXAMPLES, SCALE, layer_odds, quantise, synthetic_inputs

CNN = ModelSpec("tanh-cnn", (), "tanh", (1, 28, 28), 10)


class _Forbidden:
    """Public data that nobody may look at."""

    def __len__(self):
        raise AssertionError("the odds looked at examples")

    take = __len__


def _context():
    layout = registry.layout(CNN)
    weights = initial.draw(layout, 0)
    return CriterionContext(layout, weights, lambda: registry.build(CNN), CNN.input_shape, 4, public=_Forbidden())


def test_odds_are_the_root_of_the_mean_square_gradient_of_each_tensor():
    context = _context()
    model = registry.build(CNN)
    for parameter, (_, span) in zip(model.parameters(), context.layout.spans(), strict=True):
        parameter.data = torch.from_numpy(context.weights[span].copy()).reshape(parameter.shape)
    inputs = torch.from_numpy(synthetic_inputs(EXAMPLES, CNN.input_shape, 4, 2))
    labels = torch.from_numpy((randomness.raw_u64(EXAMPLES, 4, "synthetic", 2, "labels") % np.uint64(10)).astype(np.int64))
    energy = np.zeros(len(context.layout.tensors))
    for x, y in zip(inputs, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        energy += [float((p.grad**2).mean()) for p in model.parameters()]
    root = np.sqrt(energy)
    odds = layer_odds(context, 2)
    assert odds == pytest.approx(SCALE * root / root.max(), abs=1)
    assert odds.dtype == np.int64


def test_odds_repeat_for_a_round_and_follow_the_weights_the_round_and_the_seed():
    context = _context()
    odds = layer_odds(context, 1).tolist()
    assert layer_odds(_context(), 1).tolist() == odds
    assert layer_odds(context, 2).tolist() != odds
    assert layer_odds(replace(context, seed=5), 1).tolist() != odds
    assert layer_odds(replace(context, weights=context.weights * 2), 1).tolist() != odds


def test_synthetic_images_are_patches_and_features_are_not():
    image = synthetic_inputs(3, (2, 28, 20), 0, 1)
    assert image.shape == (3, 2, 28, 20)
    assert image.dtype == np.float32
    assert (np.abs(image) <= 1).all()
    assert np.unique(image[0, 0, :BLOB, :BLOB]).size == 1
    assert np.unique(image).size == 3 * 2 * 4 * 3
    assert np.unique(synthetic_inputs(3, (30,), 0, 1)).size > 80


def test_no_tensor_is_shut_out_and_the_largest_sets_the_scale():
    assert quantise(np.array([0.0, 1.0, 4.0])).tolist() == [1, round(SCALE / 2), SCALE]
    assert quantise(np.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("energy", [[np.nan], [np.inf, 1.0], [-1.0]])
def test_an_energy_that_is_no_energy_is_refused(energy):
    with pytest.raises(ValueError, match="finite"):
        quantise(np.array(energy))
