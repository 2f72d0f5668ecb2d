"""A script's loss on a private model is taken apart into the losses of single examples, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fed_dpprune.dpsgd.privacy_engine import SparsePrivacyEngine
from fed_dpprune.errors import ConfigError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("made_up_batches")]
CLASSES = 3
WEIGHT = torch.tensor([1.0, 5.0, 2.0])
DECLARED = nn.BCEWithLogitsLoss(pos_weight=WEIGHT)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def data(n: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, torch.randint(0, CLASSES, (n,), generator=generator)


def private(engine=None, **arguments):
    module = model()
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 0.5, "criterion": DECLARED} | arguments
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(*data(60)), batch_size=20)
    made = engine or SparsePrivacyEngine(accountant="rdp")
    return made.make_private(module=module, optimizer=optimizer, data_loader=loader, **settings)


def clipped_sum(module, optimizer, x, y, loss) -> np.ndarray:
    optimizer.zero_grad()
    loss(module(x), y).backward()
    return module.take_sum()[0]


def hot(y: torch.Tensor) -> torch.Tensor:
    return functional.one_hot(y, CLASSES).float()


def grown(outputs, y):
    loss = functional.cross_entropy(outputs, y)
    loss += 0.3 * functional.mse_loss(outputs, hot(y))
    return loss


TAKEN = {
    "cross entropy": nn.CrossEntropyLoss(),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "own mean": lambda o, y: functional.cross_entropy(o, y, reduction="none").mean(),
    "sum over len": lambda o, y: functional.cross_entropy(o, y, reduction="sum") / len(y),
    "nll": lambda o, y: functional.nll_loss(functional.log_softmax(o, 1), y),
    "nll module": lambda o, y: nn.NLLLoss()(nn.LogSoftmax(dim=-1)(o), y),
    "mse": lambda o, y: functional.mse_loss(o, hot(y)),
    "mse the other way round": lambda o, y: functional.mse_loss(hot(y), o),
    "bce": lambda o, y: nn.BCELoss()(torch.sigmoid(o), hot(y)),
    "declared weight": lambda o, y: nn.BCEWithLogitsLoss(pos_weight=WEIGHT)(o, hot(y)),
    "by hand": lambda o, y: -(functional.log_softmax(o, 1) * hot(y)).sum(1).mean(),
    "gather": lambda o, y: -torch.log_softmax(o, 1).gather(1, y[:, None]).squeeze().mean(),
    "two terms": lambda o, y: functional.cross_entropy(o, y) + 0.5 * functional.l1_loss(o, hot(y)),
    "grown": grown,
    "focal": lambda o, y: (lambda ce: ((1 - torch.exp(-ce)) ** 2 * ce).mean())(functional.cross_entropy(o, y, reduction="none")),
    "smooth": lambda o, y: functional.smooth_l1_loss(o, hot(y)),
    "kl": lambda o, y: functional.kl_div(functional.log_softmax(o, 1), hot(y) * 0.7 + 0.1, reduction="batchmean"),
    "column": lambda o, y: functional.binary_cross_entropy_with_logits(o[:, 0], (y > 1).float()),
    "squeezed": lambda o, y: functional.binary_cross_entropy_with_logits(o[:, :1].squeeze(), (y > 1).float()),
    "reshaped": lambda o, y: functional.mse_loss(o.view(len(y), -1, 1), hot(y)[:, :, None]),
    "sums of squares": lambda o, y: ((o - hot(y)) ** 2).sum(dim=1).mean(),
    "from one": lambda o, y: (1 - torch.softmax(o, 1)[:, 0]).mean(),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_usual_loss_steps_as_with_opacus_and_shows_the_same_value(name):
    loss, weights, shown = TAKEN[name], [], []
    x, y = data(20)
    for engine in (PrivacyEngine(accountant="rdp"), SparsePrivacyEngine(accountant="rdp")):
        module, optimizer, _ = private(engine)
        for _ in range(2):
            optimizer.zero_grad()
            value = loss(module(x), y)
            value.backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]).numpy())
        shown.append(value.item())
    np.testing.assert_allclose(weights[1], weights[0], atol=1e-6)
    assert shown[1] == pytest.approx(shown[0], abs=1e-5)


SUMS = {
    "cross entropy": nn.CrossEntropyLoss(reduction="sum"),
    "mean times len": lambda o, y: functional.cross_entropy(o, y) * len(y),
    "by hand": lambda o, y: ((o - hot(y)) ** 2).sum(),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_gives_the_gradients_of_single_losses_too(name):
    x, y = data(9)
    module, optimizer, _ = private(loss_reduction="sum", criterion=None)
    found = clipped_sum(module, optimizer, x, y, SUMS[name])
    alone = [clipped_sum(module, optimizer, x[i : i + 1], y[i : i + 1], SUMS[name]) for i in range(9)]
    np.testing.assert_allclose(found, np.sum(alone, axis=0), rtol=1e-12, atol=1e-12)


def test_a_class_weighted_sum_is_taken_apart():
    x, y = data(9)
    loss = nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum")
    module, optimizer, _ = private(loss_reduction="sum", criterion=loss)
    found = clipped_sum(module, optimizer, x, y, loss)
    alone = [clipped_sum(module, optimizer, x[i : i + 1], y[i : i + 1], loss) for i in range(9)]
    np.testing.assert_allclose(found, np.sum(alone, axis=0), rtol=1e-12, atol=1e-12)


COUPLED = {
    "weighted mean": (lambda o, y: functional.cross_entropy(o, y, weight=WEIGHT), "class-weighted mean"),
    "weighted nll": (lambda o, y: functional.nll_loss(functional.log_softmax(o, 1), y, weight=WEIGHT), "class-weighted mean"),
    "weighted by hand": (
        lambda o, y: (functional.cross_entropy(o, y, reduction="none") * WEIGHT[y]).sum() / WEIGHT[y].sum(), "takes a tensor",
    ),
    "batch mean": (lambda o, y: ((o - o.mean(0)) ** 2).mean(), "result of mean"),
    "detached batch mean": (lambda o, y: ((o - o.detach().mean(0)) ** 2).mean(), "result of mean"),
    "standardised": (lambda o, y: functional.cross_entropy(o / o.std(), y), "result of std"),
    "labels' mean": (lambda o, y: ((o - hot(y).mean(0)) ** 2).mean(), "no row for each example"),
    "weights of the batch": (
        lambda o, y: functional.binary_cross_entropy_with_logits(o, hot(y), pos_weight=hot(y).mean(0) + 1), "no row for each",
    ),
    "maximum": (lambda o, y: functional.cross_entropy(o, y, reduction="none").max(), "max"),
    "softmax over the batch": (lambda o, y: -functional.log_softmax(o, 0).mean(), "not known to keep examples apart"),
    "contrastive": (lambda o, y: (o @ o.T).mean(), "not known to keep examples apart"),
    "shuffled": (lambda o, y: functional.cross_entropy(o[torch.arange(len(y)).flip(0)], y), "not known to keep"),
    "spread labels": (lambda o, y: functional.mse_loss(o[:, :1], (y > 1).float()), "do not pair examples"),
    "unbatched": (lambda o, y: functional.cross_entropy(o[:, 0], hot(y)[:, 0] / 9), "do not pair examples"),
    "sum as a mean": (lambda o, y: functional.cross_entropy(o, y, reduction="sum"), "is a sum over the batch"),
    "divided twice": (lambda o, y: (functional.cross_entropy(o, y, reduction="none") / len(y)).mean(), "the batch's size"),
    "penalty": (lambda o, y: functional.cross_entropy(o, y) + PENALTY.pow(2).sum(), "gradients of its own"),
    "in place": (lambda o, y: functional.cross_entropy(o.mul_(2), y), "in place"),
    "weighted squares": (lambda o, y: functional.mse_loss(o, hot(y), weight=hot(y) + 1), "weights of the whole batch"),
    "pairs": (lambda o, y: (o.unsqueeze(1) - o).abs().mean(), "pairs every example"),
    "row and column": (lambda o, y: (o[:, 0] / o[:, 1:2].exp()).mean(), "pairs every example"),
}  # fmt: skip
PENALTY = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_couples_examples_is_refused_before_anything_is_released(name):
    loss, said = COUPLED[name]
    module, optimizer, _ = private()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ConfigError, match=said):
        clipped_sum(module, optimizer, *data(20), loss)
    with pytest.raises(ConfigError, match="backward"):
        optimizer.step()
    assert all(map(torch.equal, before, module.parameters()))


WRITTEN = {
    "slice": lambda plain, o: plain.__setitem__(slice(None), o.detach()),
    "copy": lambda plain, o: plain.copy_(o.detach()),
    "running mean": lambda plain, o: plain.mul_(0.1).add_(o.detach().mean(0), alpha=0.9),
    "plus": lambda plain, o: plain.__iadd__(o.detach().mean(0)),
    "out": lambda plain, o: torch.mul(o.argmax(1, keepdim=True), torch.ones(3), out=plain),
    "many": lambda plain, o: torch._foreach_add_([plain], [o.detach()]),
    "view": lambda plain, o: plain.view_as(o.detach().cpu()).copy_(o.detach().cpu()),
    "statistics": lambda plain, o: functional.batch_norm(o.cpu(), plain[0], plain[1], training=True),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_private_values_are_not_written_into_a_tensor_of_the_script(name):
    module, _, _ = private()
    plain = torch.zeros(20, CLASSES)
    outputs = module(data(20)[0])
    if name == "view":
        WRITTEN[name](plain, outputs)
        assert not plain.any()
        return
    with pytest.raises(ConfigError, match="written into a tensor of the script"):
        WRITTEN[name](plain, outputs)
    assert not plain.any()


def test_a_forward_pass_without_gradients_is_fit_for_metrics_alone():
    x, y = data(20)
    module, optimizer, _ = private()
    with torch.no_grad():
        known = module(x)
        assert 0 <= (known.argmax(1) == y).float().mean().item() <= 1
    with pytest.raises(ConfigError, match="result of sub"):
        functional.mse_loss(module(x), known - known.mean(0))
    optimizer.zero_grad()
    with pytest.raises(ConfigError, match="under no_grad"):
        functional.mse_loss(module(x), known)


LEFT = {
    "numpy": lambda o: o.detach().cpu().numpy(),
    "list": lambda o: o.tolist(),
    "array": lambda o: np.asarray(o.detach()),
    "copy": lambda o: torch.tensor(o.detach()).numpy(),
    "asarray": lambda o: torch.asarray(o.detach(), dtype=torch.float64).numpy(),
}


@pytest.mark.parametrize("name", LEFT)
def test_numbers_of_outputs_do_not_come_back_as_targets(name):
    x, y = data(20)
    module, optimizer, _ = private()
    clipped_sum(module, optimizer, x, y, nn.CrossEntropyLoss())
    known = torch.from_numpy(np.asarray(LEFT[name](module(x)), dtype=np.float32))
    optimizer.zero_grad()
    functional.cross_entropy(module(x), y)  # labels are as good as before
    optimizer.zero_grad()
    with pytest.raises(ConfigError, match="of the model's output"):
        functional.mse_loss(module(x), known - known.mean(0))


def test_classes_and_single_numbers_leave_for_metrics():
    x, y = data(20)
    module, optimizer, _ = private()
    outputs = module(x)
    assert outputs.argmax(1).cpu().numpy().shape == (20,) and outputs.sum().item() == float(outputs.sum())
    optimizer.zero_grad()
    clipped_sum(module, optimizer, x, y, lambda o, y: functional.mse_loss(o, hot(y)))


def test_another_loss_than_before_is_refused():
    x, y = data(20)
    module, optimizer, _ = private()
    clipped_sum(module, optimizer, x, y, nn.CrossEntropyLoss())
    functional.mse_loss(module(x), hot(y)).item()  # a metric is not differentiated
    with pytest.raises(ConfigError, match="other operations than at an earlier step"):
        clipped_sum(module, optimizer, x, y, lambda o, y: functional.mse_loss(o, hot(y)))


def test_a_number_that_changes_from_step_to_step_is_refused():
    module, optimizer, _ = private()

    def loss(outputs, y):
        return functional.cross_entropy(outputs, y) * float(y.float().mean() + 1)

    clipped_sum(module, optimizer, *data(20), loss)
    with pytest.raises(ConfigError, match="changes from step to step"):
        clipped_sum(module, optimizer, *data(21, seed=2), loss)


def test_backward_through_what_is_no_loss_is_refused():
    x, y = data(4)
    for run, said in (
        (lambda o: functional.cross_entropy(o, y, reduction="none").backward(), "one number"),
        (lambda o: functional.cross_entropy(o, y).backward(torch.tensor(2.0)), "no arguments"),
        (lambda o: o.register_hook(print), "register_hook"),
    ):
        module, _, _ = private()
        with pytest.raises(ConfigError, match=said):
            run(module(x))
    module, _, _ = private()
    loss = functional.cross_entropy(module(x), y)
    loss.backward()
    with pytest.raises(ConfigError, match="twice"):
        loss.backward()


def test_outputs_serve_for_metrics():
    x, y = data(11)
    module, _, _ = private()
    outputs = module(x)
    plain = module.to_standard_module()(x).detach()
    assert isinstance(outputs, torch.Tensor) and outputs.shape == (11, CLASSES) and len(outputs) == 11
    assert (outputs.argmax(1) == y).float().mean().item() == (plain.argmax(1) == y).float().mean().item()
    assert np.allclose(outputs.detach().cpu().numpy(), plain.numpy(), atol=1e-6)
    loss = functional.cross_entropy(outputs, y)
    assert f"{loss:.3f}" == f"{functional.cross_entropy(plain, y):.3f}" and float(loss) == loss.item()
    total = 0.0
    for _ in range(2):
        total += loss.detach()
    assert float(total) == pytest.approx(2 * loss.item())


@pytest.mark.parametrize("label", [7, -1, 2**40])
def test_a_label_out_of_range_is_an_absent_example(label):
    x, y = data(9)
    module, optimizer, _ = private(criterion=None)
    loss = nn.CrossEntropyLoss()
    without = clipped_sum(module, optimizer, x[1:], y[1:], loss)
    y[0] = label
    assert np.array_equal(clipped_sum(module, optimizer, x, y, loss), without)
    everyone = clipped_sum(module, optimizer, x, torch.full((9,), label), loss)
    assert not everyone.any()


def test_an_ignored_label_adds_nothing_and_moves_nobody_else():
    x, y = data(9)
    module, optimizer, _ = private()
    loss = nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1)
    kept = y != 1
    assert 0 < kept.sum() < 9
    found = clipped_sum(module, optimizer, x, y, loss)
    assert np.array_equal(found, clipped_sum(module, optimizer, x[kept], y[kept], loss))


def test_a_mistake_of_the_script_is_an_error_and_not_an_absent_example():
    x, y = data(5)
    module, _, _ = private()
    with pytest.raises(ConfigError, match="made-up example"):
        functional.nll_loss(module(x), y.int())


# --- criterion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "criterion",
    [
        lambda o, y: functional.cross_entropy(o, y),
        lambda o, y: (functional.cross_entropy(o, y) + (o**2).topk(2, dim=1)[0].sum()) / len(y),
        nn.MultiMarginLoss(),
    ],
)
def test_any_criterion_is_run_on_each_example_alone(criterion):
    x, y = data(9)
    module, optimizer, own, _ = private(criterion=criterion, grad_sample_mode="ghost")
    found = clipped_sum(module, optimizer, x, y, own)
    alone = [clipped_sum(module, optimizer, x[i : i + 1], y[i : i + 1], own) for i in range(9)]
    np.testing.assert_allclose(found, np.sum(alone, axis=0), rtol=1e-12, atol=1e-12)
    module.eval()
    assert own(module(x), y).item() == pytest.approx(criterion(module.to_standard_module()(x), y).item())


def test_a_criterion_that_would_forget_its_weights_or_reduces_otherwise_is_refused():
    with pytest.raises(ConfigError, match="class-weighted mean"):
        private(criterion=nn.CrossEntropyLoss(weight=WEIGHT))
    with pytest.raises(ConfigError, match="reduces by sum"):
        private(criterion=nn.CrossEntropyLoss(reduction="sum"))
    module, _, own, _ = private(criterion=lambda o, y: functional.cross_entropy(o, y, WEIGHT), grad_sample_mode="ghost")
    x, y = data(4)
    with pytest.raises(ConfigError, match="class-weighted mean"):
        own(module(x), y)
    with pytest.raises(ConfigError, match="parameters of its own"):
        private(criterion=nn.Linear(3, 1), grad_sample_mode="ghost")


def test_a_criterion_that_keeps_traces_is_refused():
    class Centre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(CLASSES))

        def forward(self, outputs, y):
            self.seen += outputs.detach().sum(0)
            return ((outputs - self.seen) ** 2).mean()

    module, _, own, _ = private(criterion=Centre(), grad_sample_mode="ghost")
    with pytest.raises(ConfigError, match="traces"):
        own(module(data(4)[0]), data(4)[1])


class Queue:
    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def __call__(self, outputs, y):
        loss = functional.cross_entropy(outputs, y) + sum((outputs * one).sum() for one in self.kept)
        self.kept.append(outputs.detach())
        return loss


class Centre(nn.Module):
    centre = None

    def forward(self, outputs, y):
        self.centre = outputs.detach().mean(0) if self.centre is None else 0.9 * self.centre
        return functional.mse_loss(outputs, self.centre.expand_as(outputs))


def closing_over():
    kept = {"sum": 0.0}

    def loss(outputs, y):
        kept["sum"] += outputs.sum().item()
        return functional.cross_entropy(outputs, y) * kept["sum"]

    return loss


def noisy(outputs, y):
    return functional.cross_entropy(outputs, torch.randint(0, CLASSES, y.shape))


EVERYWHERE = {"calls": 0.0}


def global_state(outputs, y):
    EVERYWHERE["calls"] += 1.0
    return functional.cross_entropy(outputs, y) * EVERYWHERE["calls"]


STATEFUL = {
    "queue": (Queue, "keep traces"),
    "centre": (Centre, "keep traces"),
    "closure": (closing_over, "keep traces"),
    "noisy": (lambda: noisy, "random numbers"),
    "global": (lambda: global_state, "from call to call"),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_criterion_that_is_no_function_of_its_arguments_is_refused(name):
    make, said = STATEFUL[name]
    module, _, own, _ = private(criterion=make(), grad_sample_mode="ghost")
    with pytest.raises(ConfigError, match=said):
        own(module(data(4)[0]), data(4)[1])


FACTOR = {"of the batch": 1.0}


def test_a_criterion_that_changes_between_steps_is_refused(monkeypatch):

    def loss(outputs, y):
        return functional.cross_entropy(outputs * FACTOR["of the batch"], y)

    x, y = data(9)
    module, optimizer, own, _ = private(criterion=loss, grad_sample_mode="ghost")
    clipped_sum(module, optimizer, x, y, own)
    clipped_sum(module, optimizer, *data(5, seed=3), own)
    monkeypatch.setitem(FACTOR, "of the batch", 2.0)
    with pytest.raises(ConfigError, match="from call to call"):
        clipped_sum(module, optimizer, x, y, own)
