"""One example in or out of a script's batch moves the drop-in engine's sum by the declared sensitivity at most.

A short search through the public path: model(x), loss, backward, sum before the noise. Weights are those of an adversary:
activations at rounding distance from zero behind huge gains, magnitudes over the whole range of float32, supports at random;
batches of n and n + 1 for n from 0 to 70, with the example in front, at the end or in the middle, and losses of many kinds.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.privacy_engine import SparsePrivacyEngine

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("made_up_batches")]
CLIP = 1.0


def private(module: nn.Module, x: torch.Tensor, **arguments):
    settings = {"noise_multiplier": 0.0, "max_grad_norm": CLIP} | arguments
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=max(1, len(x) // 3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine = SparsePrivacyEngine(accountant="rdp")
    return engine.make_private(module=module, optimizer=optimizer, data_loader=loader, **settings)[:2]


def clipped_sum(module, optimizer, x, y, loss) -> np.ndarray:
    optimizer.zero_grad()
    loss(module(x), y).backward()
    total = module.take_sum()[0]
    assert np.isfinite(total).all()
    return total


def bound(module) -> float:
    return Clipping(CLIP).sensitivity(module.plan.layout)


@pytest.mark.parametrize("seed", range(2))
def test_activations_at_rounding_distance_behind_huge_gains(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 784, generator=generator).repeat(71, 1)
    module = nn.Sequential(nn.Linear(784, 64, bias=False), nn.ReLU(), nn.Linear(64, 4))
    with torch.no_grad():  # each row of weights stands at a right angle to the example: its product is rounding alone
        rows = torch.randn(64, 784, generator=generator, dtype=torch.float64) * 1e3
        one = x[0].double()
        module[0].weight.copy_(rows - torch.outer(rows @ one / (one @ one), one))
        module[2].weight.copy_(torch.randn(4, 64, generator=generator) * 1e10)
    wrapped, optimizer = private(module, x)
    y = torch.arange(71) % 4
    loss, limit = nn.CrossEntropyLoss(), bound(wrapped)
    before = clipped_sum(wrapped, optimizer, x[:0], y[:0], loss)
    for n in range(1, 71):
        after = clipped_sum(wrapped, optimizer, x[:n], y[:n], loss)
        assert np.linalg.norm(after - before) <= limit, n
        before = after


def hot(y: torch.Tensor) -> torch.Tensor:
    return torch.eye(5)[y][:, :4]  # labels of 4 are past the classes


LOSSES = (
    nn.CrossEntropyLoss(label_smoothing=0.3),
    lambda o, y: functional.mse_loss(o, hot(y)),
    lambda o, y: functional.cross_entropy(o, y, reduction="sum") / max(1, len(y)),
    lambda o, y: functional.binary_cross_entropy_with_logits(o, hot(y)),
    lambda o, y: functional.smooth_l1_loss(o * 0.7, hot(y)),
    lambda o, y: (torch.exp(-functional.log_softmax(o, 1)) * hot(y)).sum(1).mean(),
    lambda o, y: functional.cross_entropy(o, y, ignore_index=2),
    lambda o, y: functional.nll_loss(torch.log_softmax(o, 1), y) + 0.1 * functional.l1_loss(o, hot(y)),
)


def wild(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Magnitudes log-uniform over the range of float32, some of them special."""
    sizes = 10.0 ** generator.uniform(*generator.choice([[-40, 38], [-3, 3], [5, 12]]), shape)
    with np.errstate(over="ignore"):
        return torch.from_numpy((sizes * generator.choice([-1, 1], shape)).astype(np.float32))


def case(generator: np.random.Generator):
    kind = generator.integers(3)
    if kind == 0:
        module: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.ReLU(), nn.Linear(9, 4))
    elif kind == 1:
        module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4))
    else:
        module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    return module, lambda count: (wild(generator, (count, 1, 6, 6)), torch.from_numpy(generator.integers(0, 5, count)))


@pytest.mark.parametrize("seed", range(5))
def test_wild_weights_examples_supports_and_losses(seed):
    generator = np.random.default_rng(seed)
    module, draw = case(generator)
    wrapped, optimizer = private(module, draw(6)[0], sparsity=float(generator.choice([0.0, 0.9])), support_seed=seed)
    limit = bound(wrapped)
    for _ in range(12):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(wild(generator, tuple(parameter.shape)))
        n = int(generator.choice([0, 1, 2, 7, 31, 32, 63, 64, 70]))
        (x, y), loss = draw(n + 1), LOSSES[generator.integers(len(LOSSES))]
        wrapped._memory.clear()  # losses change here as no script's do
        place = int(generator.integers(n + 1))
        kept = torch.arange(n + 1) != place
        found = [clipped_sum(wrapped, optimizer, x[rows], y[rows], loss) for rows in (kept, slice(None))]
        assert np.linalg.norm(found[1] - found[0]) <= limit, (n, place)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_own_gradient_has_the_same_bits_in_every_batch(loss):
    """The sum without the others is the sum of the others, to the bit: each example alone, added up in float64."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4))
    x, y = torch.randn(40, 5) * 30, torch.arange(40) % 4
    wrapped, optimizer = private(module, x, max_grad_norm=1e-3)
    alone = []
    for i in range(40):
        wrapped._memory.clear()
        alone.append(clipped_sum(wrapped, optimizer, x[i : i + 1], y[i : i + 1], loss))
    for n in (2, 3, 17, 40):
        wrapped._memory.clear()
        together = clipped_sum(wrapped, optimizer, x[:n], y[:n], loss)
        np.testing.assert_allclose(together, np.sum(alone[:n], axis=0), rtol=0, atol=n * 1e-3 * 2.0**-50)
