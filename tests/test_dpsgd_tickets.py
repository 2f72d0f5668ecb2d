"""Each step of the drop-in engine is of one Poisson batch, drawn for it by the loader, and of no more rows than that has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fed_dpprune.dpsgd.privacy_engine import SparsePrivacyEngine
from fed_dpprune.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 24


def private(batch: int = 8, workers: int = 0, rows: int = ROWS, **arguments):
    """With a batch size of all rows the rate is one, and what is in a batch is known."""
    module = nn.Linear(2, 3)
    data = TensorDataset(torch.stack([torch.arange(float(rows)), torch.ones(rows)], 1), torch.zeros(rows, dtype=torch.int64))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loader = DataLoader(data, batch_size=batch, num_workers=workers)
    engine = SparsePrivacyEngine(accountant="rdp")
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1e-3} | arguments
    return engine, *engine.make_private(module=module, optimizer=optimizer, data_loader=loader, **settings)


def step(module, optimizer, x, y) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(module(x), y).backward()
    optimizer.step()


def steps(engine) -> int:
    return sum(count for _, _, count in engine.accountant.history)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_of_the_loader_is_one_step(workers):
    engine, module, optimizer, loader = private(workers=workers)
    for _ in range(2):
        for x, y in loader:
            step(module, optimizer, x, y)
    assert steps(engine) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_one_batch_is_good_for_one_step(workers):
    engine, module, optimizer, loader = private(workers=workers)
    x, y = next(iter(loader))
    step(module, optimizer, x, y)
    for rows in (x, x[:0]):
        with pytest.raises(ConfigError, match="no Poisson batch was drawn"):
            module(rows)
    assert steps(engine) == 1


def test_rows_that_nobody_drew_are_refused():
    engine, module, optimizer, loader = private(batch=ROWS)
    data = loader.dataset.tensors[0]
    with pytest.raises(ConfigError, match="no Poisson batch was drawn"):
        module(data[:1])
    x, y = next(iter(loader))
    for rows in (torch.cat([x, x + 1]), torch.cat([x, x[:1]])):
        with pytest.raises(ConfigError, match="24 left"):
            module(rows)
    step(module, optimizer, x, y)
    module.eval()
    module(data)
    assert steps(engine) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_is_of_the_batch_drawn_last(workers):
    _, module, optimizer, loader = private(batch=ROWS // 2, workers=workers)
    passes = iter(loader)
    x, y = next(passes)
    loss = functional.cross_entropy(module(x), y)
    next(passes)
    loss.backward()
    with pytest.raises(ConfigError, match="after the next batch was drawn"):
        optimizer.step()


@pytest.mark.parametrize("workers", [0, 2])
def test_signals_by_hand_join_no_two_batches(workers):
    engine, module, optimizer, loader = private(batch=ROWS // 4, workers=workers)
    passes = iter(loader)
    x, y = next(passes)
    optimizer.signal_skip_step(True)
    step(module, optimizer, x, y)
    x, y = next(passes)
    with pytest.raises(ConfigError, match="the sum of another Poisson batch waits"):
        module(x[:0])
    assert steps(engine) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_physical_batches_share_the_ticket_of_theirs(workers):
    engine, module, optimizer, loader = private(batch=ROWS // 2, workers=workers, rows=ROWS)
    sums, seen = [], []
    optimizer.attach_step_hook(lambda o: sums.append(len(seen)))
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as small:
        for x, y in small:
            seen.append(x)
            step(module, optimizer, x, y)
    assert steps(engine) == len(sums) == 2 and sums[-1] == len(seen) > 2


def test_physical_batches_have_no_more_rows_together():
    _, module, optimizer, loader = private(batch=ROWS)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=16, optimizer=optimizer) as small:
        x, y = next(iter(small))
        step(module, optimizer, x, y)
        with pytest.raises(ConfigError, match="13 rows for a Poisson batch that has 12 left"):
            module(torch.cat([x, x[:1]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_broken_off_pass_left_belongs_to_no_step(workers, monkeypatch):
    engine, module, optimizer, loader = private(batch=ROWS, workers=workers)
    found, noise = [], type(optimizer).add_noise
    monkeypatch.setattr(type(optimizer), "add_noise", lambda self: (found.append(self._sum.copy()), noise(self)))
    for stop in (1, None):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=8, optimizer=optimizer) as small:
            for number, (x, y) in enumerate(small):
                step(module, optimizer, x, y)
                if number == stop:
                    break
    assert steps(engine) == len(found) == 1
    # Gradients of one label point nearly one way: 24 rows, not the 16 of the broken pass on top.
    assert 0 < np.linalg.norm(found[0]) <= ROWS * 1e-3 * (1 + 1e-6)


def test_two_passes_at_once_and_two_models_on_one_loader_are_refused():
    engine, _, _, loader = private()
    first, second = iter(loader), iter(loader)
    next(second)
    with pytest.raises(ConfigError, match="two passes"):
        next(first)
    other = nn.Linear(2, 3)
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    wrapped, _, own = engine.make_private(module=other, optimizer=sgd, data_loader=loader, **arguments)
    x, _ = next(iter(loader))
    with pytest.raises(ConfigError, match="no Poisson batch was drawn"):
        wrapped(x)
    assert own.batches is not loader.batches and own.sample_rate == loader.sample_rate


def test_a_sum_whose_noise_failed_waits_for_no_other_step(monkeypatch):
    engine, module, optimizer, loader = private(batch=ROWS)
    x, y = next(iter(loader))
    monkeypatch.setattr(type(optimizer), "add_noise", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(module, optimizer, x, y)
    assert optimizer._sum is None and steps(engine) == 1
    with pytest.raises(ConfigError, match="no Poisson batch was drawn"):
        module(x)
