"""The drop-in engine: an Opacus script runs unchanged but for the import and one argument, and what differs is better."""

import copy
import runpy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from dpsgd_oracle import loop_gradients
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fed_dpprune.dpsgd.privacy_engine import SparsePrivacyEngine
from fed_dpprune.errors import ConfigError
from fed_dpprune.sparsity.support import Support

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")  # opacus and torch warn about their own plans


def pieces(n: int = 60, batch: int = 20, optimizer=torch.optim.SGD, **settings):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.randn(n, 1, 6, 6), torch.randint(0, 3, (n,))
    return {
        "module": module,
        "optimizer": optimizer(module.parameters(), lr=0.1, **settings),
        "data_loader": DataLoader(TensorDataset(x, y), batch_size=batch),
    }


def one_step(module, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(x), y).backward()
    optimizer.step()


def flat(module: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).numpy()


def test_dense_without_noise_it_steps_as_opacus_does():
    x, y = torch.randn(20, 1, 6, 6), torch.randint(0, 3, (20,))
    found = []
    for engine in (PrivacyEngine(accountant="rdp"), SparsePrivacyEngine(accountant="rdp")):
        module, optimizer, _ = engine.make_private(**pieces(), noise_multiplier=0.0, max_grad_norm=0.5)
        for _ in range(3):
            one_step(module, optimizer, x, y)
        found.append(flat(module))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_each_step_is_the_noised_clipped_sum_on_the_support_over_the_declared_batch():
    parts = pieces(momentum=0.0)
    before = copy.deepcopy(parts["module"])
    module, optimizer, _ = SparsePrivacyEngine().make_private(
        **parts, noise_multiplier=0.5, max_grad_norm=0.3, sparsity=0.8, noise_generator=torch.Generator().manual_seed(7)
    )
    support = module.support
    assert support.k == support.d - int(0.8 * support.d)
    x, y = torch.randn(13, 1, 6, 6), torch.randint(0, 3, (13,))
    one_step(module, optimizer, x, y)
    live = loop_gradients(before, x.numpy(), y.numpy())[:, support.indices]
    total = np.minimum(1, 0.3 / np.linalg.norm(live, axis=1)) @ live
    noise = torch.randn(support.k, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).numpy()
    moved = flat(module) - flat(before)
    np.testing.assert_allclose(moved[support.indices], -0.1 * (total + 0.5 * 0.3 * noise) / 20, rtol=1e-3, atol=1e-6)
    assert not moved[~support.mask].any()


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}), (torch.optim.AdamW, {"weight_decay": 0.1})],
)
def test_frozen_coordinates_keep_their_bits_under_momentum_and_weight_decay(optimizer, settings):
    parts = pieces(optimizer=optimizer, **settings)
    before = flat(parts["module"])
    module, private, loader = SparsePrivacyEngine().make_private(
        **parts, noise_multiplier=1.0, max_grad_norm=1.0, sparsity=0.7, refresh="run"
    )
    for x, y in loader:
        one_step(module, private, x, y)
    after, mask = flat(module), module.support.mask
    assert np.array_equal(after[~mask].view(np.uint32), before[~mask].view(np.uint32))
    assert (after[mask] != before[mask]).mean() > 0.99


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_a_poisoned_example_moves_the_sum_by_at_most_the_clip_norm(poison):
    module, optimizer, _ = SparsePrivacyEngine().make_private(**pieces(), noise_multiplier=0.0, max_grad_norm=0.2, sparsity=0.5)
    x, y = torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))
    sums = []
    for bad in (False, True):
        xs, ys = (torch.cat([x, torch.full((1, 1, 6, 6), poison)]), torch.cat([y, y[:1]])) if bad else (x, y)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(xs), ys, reduction="mean").backward()
        sums.append(module.take_sum()[0])
    assert np.isfinite(sums[1]).all()
    assert np.linalg.norm(sums[1] - sums[0]) <= 0.2 * (1 + 1e-5)


def test_empty_batches_are_steps_that_are_noised_and_charged():
    engine = SparsePrivacyEngine(accountant="rdp")
    parts = pieces()
    before = flat(parts["module"])
    module, optimizer, _ = engine.make_private(**parts, noise_multiplier=1.0, max_grad_norm=1.0, sparsity=0.5)
    mask = module.support.mask
    one_step(module, optimizer, torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64))
    assert engine.accountant.history == [(1.0, 1 / 3, 1)]
    assert (flat(module)[mask] != before[mask]).mean() > 0.99


def test_the_divisor_is_the_declared_batch_whatever_the_data_size():
    for n in (199, 200, 201):
        _, optimizer, _ = SparsePrivacyEngine().make_private(**pieces(n=n), noise_multiplier=1.0, max_grad_norm=1.0)
        assert optimizer.expected_batch_size == 20


def test_physical_batches_of_the_memory_manager_make_one_step():
    module, optimizer, loader = SparsePrivacyEngine(accountant="rdp").make_private(
        **pieces(n=120, batch=40), noise_multiplier=0.0, max_grad_norm=0.3, sparsity=0.5, loss_reduction="sum"
    )
    whole = copy.deepcopy(module._module)
    torch.manual_seed(3)
    support, seen = module.support, []
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=7, optimizer=optimizer) as small:
        for x, y in small:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y, reduction="sum").backward()
            optimizer.step()
            seen.append((x, y))
            if module.steps == 1:
                break
    x, y = (torch.cat(part) for part in zip(*seen, strict=True))
    assert len(seen) > 1
    live = loop_gradients(whole, x.numpy(), y.numpy())[:, support.indices]
    total = np.minimum(1, 0.3 / np.linalg.norm(live, axis=1)) @ live
    np.testing.assert_allclose((flat(module) - flat(whole))[support.indices], -0.1 * total, rtol=1e-3, atol=1e-6)


def test_epsilon_target_is_met_and_the_accountant_agrees_with_opacus():
    engine = SparsePrivacyEngine(accountant="rdp")
    module, optimizer, loader = engine.make_private_with_epsilon(
        **pieces(), target_epsilon=5.0, target_delta=1e-3, epochs=2, max_grad_norm=1.0, sparsity=0.9
    )
    theirs = PrivacyEngine(accountant="rdp")
    for _ in range(2):
        for x, y in loader:
            one_step(module, optimizer, x, y)
            theirs.accountant.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=1 / 3)
    assert engine.get_epsilon(1e-3) == theirs.get_epsilon(1e-3) <= 5.0


def test_checkpoints_resume_accountant_weights_and_optimizer(tmp_path):
    engine = SparsePrivacyEngine(accountant="rdp")
    module, optimizer, loader = engine.make_private(**pieces(momentum=0.9), noise_multiplier=1.0, max_grad_norm=1.0, sparsity=0.5)
    for x, y in loader:
        one_step(module, optimizer, x, y)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=module, optimizer=optimizer)
    again = SparsePrivacyEngine(accountant="rdp")
    fresh, private, _ = again.make_private(**pieces(momentum=0.9), noise_multiplier=1.0, max_grad_norm=1.0, sparsity=0.5)
    again.load_checkpoint(path=tmp_path / "c.pt", module=fresh, optimizer=private)
    assert np.array_equal(flat(fresh), flat(module)) and again.accountant.history == engine.accountant.history
    assert str(private.state_dict()) == str(optimizer.state_dict())


def test_supports_are_redrawn_when_asked_and_the_own_support_is_kept():
    def digests(**arguments):
        module, optimizer, loader = SparsePrivacyEngine().make_private(
            **pieces(), noise_multiplier=1.0, max_grad_norm=1.0, **arguments
        )
        found = []
        for _ in range(2):
            for x, y in loader:
                found.append(module.support.digest)
                one_step(module, optimizer, x, y)
        return found

    run, epoch, step = (digests(sparsity=0.5, refresh=r) for r in ("run", "epoch", "step"))
    assert [len(set(d)) for d in (run, epoch, step)] == [1, 2, 6] and len(set(epoch[:3])) == 1
    own = Support(np.arange(10, dtype=np.int64), 235)
    assert set(digests(sparsity=own)) == {own.digest}


def test_noise_does_not_hang_on_the_global_seed():
    moved = []
    for _ in range(2):
        module, optimizer, _ = SparsePrivacyEngine().make_private(**pieces(), noise_multiplier=1.0, max_grad_norm=1.0)
        torch.manual_seed(5)
        one_step(module, optimizer, torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64))
        moved.append(flat(module))
    assert np.mean(moved[0] == moved[1]) < 0.05  # two of many float32 values may meet by chance


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("poisson_sampling", False),
        ("clipping", "adaptive"),
        ("grad_sample_mode", "ghost_fsdp"),
        ("rand_on_empty", True),
        ("loss_reduction", "none"),
        ("wrap_model", False),
        ("batch_first", False),
        ("refresh", "day"),
        ("sparsity", 1.0),
        ("max_grad_norms", 1.0),
    ],
)
def test_what_is_not_offered_is_refused_by_name(argument, value):
    with pytest.raises(ConfigError, match=argument):
        SparsePrivacyEngine().make_private(**pieces(), noise_multiplier=1.0, max_grad_norm=1.0, **{argument: value})


def test_a_forward_pass_without_backward_and_a_step_without_either_are_refused():
    module, optimizer, _ = SparsePrivacyEngine().make_private(**pieces(), noise_multiplier=1.0, max_grad_norm=1.0)
    with pytest.raises(ConfigError, match="no backward pass"):
        optimizer.step()
    module(torch.randn(2, 1, 6, 6))
    with pytest.raises(ConfigError, match="no backward"):
        optimizer.step()
    optimizer.zero_grad()
    module.eval()
    module(torch.randn(2, 1, 6, 6))
    assert not module._open


def test_models_outside_the_layer_rules_take_the_whole_model_route():
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(36, 3) / 6)

        def forward(self, x):
            return x.flatten(1) @ self.w

    module = Raw()
    before = copy.deepcopy(module)
    parts = pieces() | {"module": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1)}
    wrapped, optimizer, _ = SparsePrivacyEngine().make_private(**parts, noise_multiplier=0.0, max_grad_norm=0.3, sparsity=0.5)
    support, x, y = wrapped.support, torch.randn(9, 1, 6, 6), torch.randint(0, 3, (9,))
    one_step(wrapped, optimizer, x, y)
    live = loop_gradients(before, x.numpy(), y.numpy())[:, support.indices]
    total = np.minimum(1, 0.3 / np.linalg.norm(live, axis=1)) @ live
    np.testing.assert_allclose((flat(module) - flat(before))[support.indices], -0.1 * total / 20, rtol=1e-3, atol=1e-7)


def test_the_example_script_runs_and_learns(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(ROOT / "examples" / "opacus_dropin.py"), run_name="__main__")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert float(last.split("accuracy ")[1].split()[0]) > 0.6
