from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fed_dpprune.data.dataset import PIXELS, Examples
from fed_dpprune.models import evaluate, initial, registry, vector
from fed_dpprune.models.registry import ModelSpec

SPEC = ModelSpec("mlp", (16,), "tanh", (12,), 4)


def module() -> nn.Module:
    built, layout = registry.build(SPEC), registry.layout(SPEC)
    vector.load(built, layout, initial.draw(layout, 0))
    return built


def examples(rows: int = 23) -> Examples:
    rng = np.random.default_rng(0)
    return Examples(rng.integers(0, 256, (rows, 12)).astype(np.uint8), rng.integers(0, 4, rows), PIXELS)


def test_accuracy_and_loss_are_those_of_a_loop_over_single_examples():
    net, data = module(), examples()
    right, loss = 0, 0.0
    for row in range(len(data)):
        x, y = data.take(np.array([row]))
        scores = net(torch.from_numpy(x)).detach().double().numpy()[0]
        right += int(scores.argmax() == y[0])
        loss -= float(scores[y[0]] - np.log(np.exp(scores).sum()))
    accuracy, mean = evaluate.accuracy_and_loss(net, data)
    assert accuracy == right / 23 and mean == pytest.approx(loss / 23, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 5, 23, 1000])
def test_the_last_batch_counts_by_its_rows(batch):
    accuracy, loss = evaluate.accuracy_and_loss(module(), examples(), batch)
    whole = evaluate.accuracy_and_loss(module(), examples())
    assert accuracy == whole[0] and loss == pytest.approx(whole[1], rel=1e-6)


def test_twice_the_same_is_bit_for_bit_the_same():
    assert evaluate.accuracy_and_loss(module(), examples()) == evaluate.accuracy_and_loss(module(), examples())


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_are_left_alone(training):
    net = module().train(training)
    evaluate.accuracy_and_loss(net, examples())
    assert net.training is training and all(parameter.grad is None for parameter in net.parameters())


def test_no_rows_is_an_error_not_a_nan():
    with pytest.raises(ValueError, match="no rows"):
        evaluate.accuracy_and_loss(module(), examples(0))


def test_a_net_that_has_diverged_is_reported_not_hidden():
    net = module()
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    assert np.isnan(evaluate.accuracy_and_loss(net, examples())[1])
