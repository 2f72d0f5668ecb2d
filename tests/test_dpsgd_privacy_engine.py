"""The drop-in engine: an Opacus script runs unchanged but for the import and one argument, and what differs is better."""

import copy
import io
import pickle
import runpy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from dpsgd_oracle import loop_gradients
from opacus import PrivacyEngine
from opacus.accountants import create_accountant
from opacus.schedulers import ExponentialNoise, StepGradClip
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fed_dpprune.dpsgd.clipping import Clipping
from fed_dpprune.dpsgd.privacy_engine import SparsePrivacyEngine
from fed_dpprune.errors import ConfigError
from fed_dpprune.sparsity.support import Support

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("made_up_batches"),
]  # opacus and torch warn about their own plans


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


# --- one source for norm, noise, support and charge ---------------------------------------------------------------------


def private(module=None, loader=None, optimizer=None, **arguments):
    parts = pieces(n=60)
    module = module or parts["module"]
    optimizer = optimizer or torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0} | arguments
    engine = SparsePrivacyEngine(accountant="rdp")
    wrapped, private, loader = engine.make_private(
        module=module, optimizer=optimizer, data_loader=loader or parts["data_loader"], **settings
    )
    return engine, wrapped, private, loader


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def moved_by_noise(module, optimizer) -> float:
    """Root mean square of a step on an empty batch, times the divisor: the noise's std on the sum."""
    before = flat(module)
    one_step(module, optimizer, *batch(0))
    return float(np.sqrt(np.mean((flat(module) - before) ** 2))) * 20


def large_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 300), nn.Tanh(), nn.Linear(300, 3))


def test_clip_norm_and_noise_follow_opacus_schedulers_together():
    engine, module, optimizer, _ = private(large_model())
    clip = StepGradClip(optimizer, step_size=1, gamma=0.1)
    noise = ExponentialNoise(optimizer, gamma=0.5)
    for expected_norm, expected_noise in ((1.0, 1.0), (0.1, 0.5), (0.01, 0.25)):
        assert (optimizer.max_grad_norm, optimizer.noise_multiplier) == pytest.approx((expected_norm, expected_noise))
        one_step(module, optimizer, *batch())
        clip.step()
        noise.step()
    assert [charged for charged, _, _ in engine.accountant.history] == pytest.approx([1.0, 0.5, 0.25])
    optimizer.max_grad_norm, optimizer.noise_multiplier = 1e-3, 4.0
    assert moved_by_noise(module, optimizer) == pytest.approx(4e-3, rel=0.05)
    optimizer.noise_multiplier, before = 0.0, flat(module)
    one_step(module, optimizer, *batch())
    assert 0 < np.linalg.norm(flat(module) - before) * 20 <= 8 * 1e-3 * (1 + 1e-3)


@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 0.01), ("noise_multiplier", 0.01), ("expected_batch_size", 1)])
def test_numbers_changed_after_the_sum_was_clipped_wait_for_the_next_step(name, value):
    engine, module, optimizer, _ = private(large_model())
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(batch(0)[0]), batch(0)[1]).backward()
    setattr(optimizer, name, value)
    before = flat(module)
    optimizer.step()
    assert float(np.sqrt(np.mean((flat(module) - before) ** 2))) * 20 == pytest.approx(1.0, rel=0.05)
    assert engine.accountant.history == [(1.0, 1 / 3, 1)]


def test_physical_batches_of_one_step_are_under_the_terms_of_the_first():
    engine, module, optimizer, _ = private(large_model())
    before = flat(module)
    for skip, norm in ((True, 1.0), (False, 0.01)):
        optimizer.max_grad_norm = norm
        optimizer.signal_skip_step(skip)
        one_step(module, optimizer, *batch(0))
    assert float(np.sqrt(np.mean((flat(module) - before) ** 2))) * 20 == pytest.approx(1.0, rel=0.05)
    assert moved_by_noise(module, optimizer) == pytest.approx(0.01, rel=0.05)
    assert engine.accountant.history == [(1.0, 1 / 3, 2)]


def test_the_noise_covers_the_slack_of_the_sum():
    _, module, optimizer, _ = private(noise_multiplier=2.0, max_grad_norm=0.5)
    sensitivity = Clipping(0.5).sensitivity(module.plan.layout)
    assert sensitivity > 0.5 and optimizer.terms_in_force().std == 2.0 * sensitivity


@pytest.mark.parametrize(
    ("name", "value"), [("max_grad_norm", [1.0, 2.0]), ("max_grad_norm", 0.0), ("noise_multiplier", float("nan")),
    ("noise_multiplier", -1.0), ("expected_batch_size", 0), ("loss_reduction", "none")]
)  # fmt: skip
def test_numbers_that_bound_nothing_are_refused(name, value):
    if name in ("max_grad_norm", "noise_multiplier"):
        with pytest.raises(ConfigError):
            private(**{name: value})
    _, module, optimizer, _ = private()
    setattr(optimizer, name, value)
    with pytest.raises((ConfigError, ValueError)):
        one_step(module, optimizer, *batch())


def test_a_rate_changed_in_training_is_refused():
    _, module, optimizer, loader = private()
    loader.batches.rate = 0.01
    with pytest.raises(ConfigError, match="another sample rate"):
        one_step(module, optimizer, *batch())


def test_the_charge_comes_before_the_noise_and_hooks_do_not_replace_it(monkeypatch):
    engine, module, optimizer, _ = private()
    seen = []
    optimizer.attach_step_hook(seen.append)
    monkeypatch.setattr(type(optimizer), "add_noise", lambda self: 1 / 0)
    before = flat(module)
    with pytest.raises(ZeroDivisionError):
        one_step(module, optimizer, *batch())
    assert engine.accountant.history == [(1.0, 1 / 3, 1)] and np.array_equal(flat(module), before)
    monkeypatch.undo()
    one_step(module, optimizer, *batch())
    assert seen == [optimizer] and engine.accountant.history == [(1.0, 1 / 3, 2)]


# --- randomness ---------------------------------------------------------------------------------------------------------


def test_no_generator_of_torch_is_asked_for_noise_or_coins():
    _, module, optimizer, loader = private(loader=DataLoader(pieces()["data_loader"].dataset, batch_size=20, shuffle=True))
    assert optimizer.generator is None
    torch.manual_seed(1)
    first = [len(y) for _, y in loader] + [moved_by_noise(module, optimizer)]
    torch.manual_seed(1)
    second = [len(y) for _, y in loader] + [moved_by_noise(module, optimizer)]
    assert first != second
    state = torch.get_rng_state()
    one_step(module, optimizer, *batch())
    assert torch.equal(state, torch.get_rng_state())


def test_a_given_generator_is_labelled_in_every_figure(tmp_path):
    with pytest.warns(UserWarning, match="seeded-simulation"):
        engine, module, optimizer, _ = private(noise_generator=torch.Generator().manual_seed(1))
    one_step(module, optimizer, *batch())
    with pytest.warns(UserWarning, match="seeded-simulation"):
        spent = engine.get_epsilon(1e-3)
    assert engine.noise_source == spent.noise_source == "seeded-simulation"
    assert all("seeded-simulation" in shown for shown in (str(spent), repr(spent), f"{spent:.2f}"))
    engine.save_checkpoint(path=tmp_path / "c.pt", module=module, optimizer=optimizer)
    again, fresh, private_again, _ = private()
    assert again.noise_source == "os-entropy"
    again.load_checkpoint(path=tmp_path / "c.pt", module=fresh, optimizer=private_again)
    assert again.noise_source == "seeded-simulation"
    again, fresh, private_again, _ = private()
    private_again.generator = torch.Generator()  # behind the engine's back
    one_step(fresh, private_again, *batch())
    assert again.noise_source == "seeded-simulation"


# --- what is refused by name --------------------------------------------------------------------------------------------


class MixInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x):
        made = self.linear(x.flatten(1))
        return made - made.mean(0) if self.training else made


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        made = self.linear(x.flatten(1))
        self.seen += made.detach().sum(0)
        return made


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x):
        made = self.linear(x.flatten(1))
        return made, made


class Words(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, **settings)
        self.linear = nn.Linear(4, 3)

    def forward(self, words):
        return self.linear(self.table(words).mean(1))


MODELS = {
    "mixes the examples": MixInTraining,
    "changes in the forward pass": Counter,
    "one float32 tensor": Twice,
    "random": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3)),
    "GroupNorm": lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 3)),
    "float64": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double(),
    "DataParallel": lambda: nn.DataParallel(nn.Sequential(nn.Flatten(), nn.Linear(36, 3))),
    "max_norm": lambda: Words(max_norm=5.0),
}


@pytest.mark.parametrize("said", MODELS)
def test_a_model_that_cannot_be_private_is_refused_in_the_mode_it_runs_in(said):
    def train():
        _, module, optimizer, _ = private(MODELS[said]())
        one_step(module, optimizer, *batch())

    with pytest.raises(ConfigError, match=said):
        train()


def test_a_change_of_mode_is_proven_anew():
    part = MixInTraining()
    module = nn.Sequential(part, nn.Dropout(0.0))
    part.eval()
    _, wrapped, optimizer, _ = private(module)
    one_step(wrapped, optimizer, *batch())
    wrapped.eval()
    wrapped(batch()[0])
    part.train()
    wrapped.training = True
    with pytest.raises(ConfigError, match="mixes the examples"):
        wrapped(batch()[0])
    part.eval()
    wrapped(batch()[0])
    optimizer.zero_grad()
    module[1].p, module[1].training = 0.5, True
    with pytest.raises(ConfigError, match="random numbers"):
        wrapped(batch()[0])


def freeze(module, optimizer):
    next(iter(module.parameters())).requires_grad_(False)


def replace(module, optimizer):
    module._module[-1].bias = nn.Parameter(torch.zeros(3))


def add_layer(module, optimizer):
    module._module.append(nn.Linear(3, 3))


def add_group(module, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def drop_group(module, optimizer):
    optimizer.param_groups[0]["params"].pop()


def tensor_hook(module, optimizer):
    next(iter(module.parameters())).register_hook(lambda g: g)


def backward_hook(module, optimizer):
    module._module[0].register_full_backward_hook(lambda *a: None)


def ranks(module, optimizer, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def gdp(module, optimizer):
    optimizer._charge.__self__.accountant = create_accountant("gdp")


CHANGES = {
    "frozen or thawed": freeze,
    "replaced": replace,
    "added": add_layer,
    "not the model's": add_group,
    "leaves out": drop_group,
    "hooks on its gradient": tensor_hook,
    "backward hooks": backward_hook,
    "several ranks": ranks,
    "gdp under-reports": gdp,
}


@pytest.mark.parametrize("between", ["before the forward", "before the step"])
@pytest.mark.parametrize("said", CHANGES)
def test_a_change_after_make_private_is_refused_before_a_release(said, between, monkeypatch):
    engine, module, optimizer, _ = private()
    change = CHANGES[said]
    arguments = (module, optimizer, monkeypatch) if change is ranks else (module, optimizer)
    if between == "before the step":
        loss = nn.functional.cross_entropy(module(batch()[0]), batch()[1])
        loss.backward()
    change(*arguments)
    before = flat(module)
    with pytest.raises(ConfigError, match=said):
        optimizer.step() if between == "before the step" else one_step(module, optimizer, *batch())
    assert np.array_equal(flat(module), before) and not len(engine.accountant)


def test_an_optimizer_over_some_parameters_and_lbfgs_are_refused():
    module = pieces()["module"]
    with pytest.raises(ConfigError, match=r"leaves out 0\.weight"):
        private(module, optimizer=torch.optim.SGD(module[-1].parameters(), lr=0.1))
    module[0].requires_grad_(False)
    _, wrapped, optimizer, _ = private(module, optimizer=torch.optim.SGD(module[-1].parameters(), lr=0.1))
    before = module[0].weight.detach().clone()
    one_step(wrapped, optimizer, *batch())
    assert torch.equal(module[0].weight, before)
    with pytest.raises(ConfigError, match="LBFGS"):
        private(optimizer=torch.optim.LBFGS(module.parameters()), module=module)


def test_inputs_that_are_not_offered_are_refused():
    _, module, _, _ = private()
    x = batch()[0]
    for call, said in (
        (lambda: module(x, x), "one tensor"),
        (lambda: module(input=x), "one tensor"),
        (lambda: module(x.requires_grad_()), "asks for a gradient"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        module(x.detach())


def test_gradient_scaling_is_refused_and_closures_run_once():
    _, module, optimizer, _ = private()
    x, y = batch()
    nn.functional.cross_entropy(module(x), y).backward()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(ConfigError, match="GradScaler"):
        scaler.step(optimizer)
    ran = []

    def closure():
        ran.append(1)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        return loss

    before = flat(module)
    optimizer.step(closure)
    assert ran == [1] and not np.array_equal(flat(module), before)


def test_several_backward_passes_for_a_step_are_refused():
    _, module, optimizer, _ = private()
    x, y = batch()
    nn.functional.cross_entropy(module(x), y).backward()
    for again in (x, x[:0]):
        with pytest.raises(ConfigError, match="several forward passes"):
            module(again)
    kept = module._open[:]
    module.drop()
    module(x)
    module._open += kept
    with pytest.raises(ConfigError, match="several forward passes"):
        optimizer.step()


@pytest.mark.parametrize("clear", ["optimizer", "module"])
def test_gradients_may_be_cleared_between_forward_and_backward(clear):
    _, module, optimizer, _ = private(noise_multiplier=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x, y = batch()
    for step in range(2):
        loss = nn.functional.cross_entropy(module(x), y)
        (optimizer if clear == "optimizer" else module).zero_grad()
        loss.backward()
        before = flat(module)
        optimizer.step()
        schedule.step()
        assert not np.array_equal(flat(module), before) and optimizer.param_groups[0]["lr"] == 0.5 ** (step + 1)
    nn.functional.cross_entropy(module(x), y).backward()
    optimizer.zero_grad()
    with pytest.raises(ConfigError, match="no backward pass"):
        optimizer.step()
    late = nn.functional.cross_entropy(module(x), y)
    optimizer.zero_grad()
    one_step(module, optimizer, x, y)
    with pytest.raises(ConfigError, match="earlier step"):
        late.backward()


def test_weights_changed_between_forward_and_backward_are_refused():
    _, module, _, _ = private()
    x, y = batch()
    loss = nn.functional.cross_entropy(module(x), y)
    with torch.no_grad():
        next(iter(module.parameters())).mul_(2)
    with pytest.raises(ConfigError, match="other weights"):
        loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps])
def test_copies_and_pickles_of_what_is_private_are_refused(copied):
    _, module, optimizer, _ = private()
    for one in (module, optimizer):
        with pytest.raises(ConfigError, match="private"):
            copied(one)
    copied(module.to_standard_module()), copied(module.state_dict()), copied(optimizer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
def test_the_default_dtype_changes_nothing(dtype):
    _, module, optimizer, _ = private(noise_multiplier=0.0, sparsity=0.5)
    x, y = batch()
    sums = []
    before = torch.get_default_dtype()
    try:
        for default in (before, dtype):
            torch.set_default_dtype(default)
            _, module, optimizer, _ = private(copy.deepcopy(pieces_in(before)), noise_multiplier=0.0, sparsity=0.5)
            nn.functional.cross_entropy(module(x), y).backward()
            sums.append(module.take_sum()[0])
            one_step(module, optimizer, x, y)
    finally:
        torch.set_default_dtype(before)
    assert np.array_equal(*sums) and all(p.dtype == torch.float32 for p in module.parameters())


def pieces_in(dtype: torch.dtype) -> nn.Module:
    asked = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    module = pieces()["module"]
    torch.set_default_dtype(asked)
    return module


# --- examples that break things -----------------------------------------------------------------------------------------


def test_a_word_past_the_dictionary_is_an_absent_example():
    words = torch.randint(0, 10, (60, 5))
    loader = DataLoader(TensorDataset(words, torch.zeros(60, dtype=torch.int64)), batch_size=20)
    _, module, optimizer, _ = private(Words(), loader)
    sums = []
    for rows in (words[1:8], torch.cat([torch.full((1, 5), 10), words[1:8]])):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(rows), torch.zeros(len(rows), dtype=torch.int64)).backward()
        sums.append(module.take_sum()[0])
    assert np.array_equal(*sums) and sums[0].any()


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_a_batch_of_bad_examples_is_a_step_of_noise_like_any_other(poison):
    engine, module, optimizer, _ = private(large_model(), sparsity=0.5)
    mask, before = module.support.mask, flat(module)
    one_step(module, optimizer, torch.full((4, 1, 6, 6), poison), torch.full((4,), 99))
    moved = flat(module) - before
    assert np.isfinite(moved).all() and (moved[mask] != 0).mean() > 0.99 and engine.accountant.history == [(1.0, 1 / 3, 1)]
    assert np.array_equal(flat(module)[~mask].view(np.uint32), before[~mask].view(np.uint32))
    assert np.sqrt(np.mean(moved[mask] ** 2)) * 20 == pytest.approx(1.0, rel=0.05)


def test_noise_that_leaves_the_range_of_float32_saturates():
    _, module, optimizer, _ = private(max_grad_norm=1e38, noise_multiplier=1e6)
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(batch()[0]), batch()[1]).backward()
    optimizer.pre_step()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


# --- what changes between two steps -------------------------------------------------------------------------------------


class Switch(nn.Module):
    """Mixes the examples once an attribute of any kind says so."""

    def __init__(self, attribute, on) -> None:
        super().__init__()
        self.attribute, self.on, self.linear = attribute, on, nn.Linear(36, 3)
        self.register_buffer("flag", torch.tensor(False))

    def forward(self, x):
        x = x.flatten(1)
        return self.linear(x - x.mean(0) if self.on(self) else x)


class Settings:
    def __init__(self) -> None:
        self.value = False
        self.stop = lambda: None  # cannot be pickled


SWITCHES = {
    "dict": (lambda: {"on": False}, lambda s: s.attribute["on"], lambda s: s.attribute.update(on=True)),
    "list": (lambda: [[False]], lambda s: s.attribute[0][0], lambda s: s.attribute[0].__setitem__(0, True)),
    "tensor": (lambda: torch.zeros(2), lambda s: bool(s.attribute.any()), lambda s: s.attribute.fill_(1)),
    "array": (lambda: np.zeros(2), lambda s: bool(s.attribute.any()), lambda s: s.attribute.fill(1)),
    "object": (Settings, lambda s: s.attribute.value, lambda s: setattr(s.attribute, "value", True)),
    "buffer": (lambda: None, lambda s: bool(s.flag), lambda s: s.flag.fill_(True)),
}


@pytest.mark.parametrize("kind", SWITCHES)
def test_an_attribute_of_any_kind_that_changes_is_proven_anew(kind):
    made, on, turn = SWITCHES[kind]
    module = Switch(made(), on)
    engine, wrapped, optimizer, _ = private(module)
    one_step(wrapped, optimizer, *batch())
    optimizer.zero_grad()
    proven = wrapped.gradient
    one_step(wrapped, optimizer, *batch())
    assert wrapped.gradient is proven
    turn(module)
    with pytest.raises(ConfigError, match="mixes the examples"):
        wrapped(batch()[0])
    assert engine.accountant.history[0][2] == 2


def test_examples_of_another_length_or_type_are_refused():
    words = torch.randint(1, 10, (60, 5))
    loader = DataLoader(TensorDataset(words, torch.zeros(60, dtype=torch.int64)), batch_size=20)
    _, module, optimizer, _ = private(Words(), loader)
    one_step(module, optimizer, words[:4], torch.zeros(4, dtype=torch.int64))
    for other in (nn.functional.pad(words[:4], (0, 9)), words[:4].int(), words[:0, :3]):
        with pytest.raises(ConfigError, match="pad to a fixed length"):
            module(other)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_checkpoint_gives_no_spent_epsilon_back(tmp_path, in_memory):
    engine, module, optimizer, _ = private()
    one_step(module, optimizer, *batch())
    path = io.BytesIO() if in_memory else tmp_path / "c.pt"
    engine.save_checkpoint(path=path, module=module, optimizer=optimizer)
    if in_memory:
        path.seek(0)
    one_step(module, optimizer, *batch())
    before, spent = flat(module), engine.get_epsilon(1e-3)
    with pytest.raises(ConfigError, match="lacks steps"):
        engine.load_checkpoint(path=path, module=module, optimizer=optimizer)
    assert engine.get_epsilon(1e-3) == spent and np.array_equal(flat(module), before)
    later, fresh, private_later, _ = private()
    later.load_checkpoint(path=path, module=fresh, optimizer=private_later)
    assert later.accountant.history == [(1.0, 1 / 3, 1)]


def test_gradients_of_another_backward_pass_are_refused_not_lost():
    _, module, optimizer, _ = private()
    for again in range(2):  # with no gradient before, and on top of the last step's
        if again:
            optimizer.zero_grad()
            one_step(module, optimizer, *batch())
        optimizer.module.drop()
        nn.functional.cross_entropy(module(batch()[0]), batch()[1]).backward()
        sum(p.square().sum() for p in module.parameters()).backward()
        before = flat(module)
        with pytest.raises(ConfigError, match="not of the private backward pass"):
            optimizer.step()
        assert np.array_equal(flat(module), before)
