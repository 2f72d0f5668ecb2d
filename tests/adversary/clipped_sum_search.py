"""A search that optimises to break the bound on one example: how far can one more example move the sum, in units of C?

A `Case` is everything that the server and the data may choose: weights, support, clip norm and mode, the other examples, the
added one and its place, micro-batch and thread count, and the route. `move` runs the public interface on the batch with and
without the added example. `search` restarts from starts built to be hostile and improves each by mutations that are kept when
the move does not shrink: magnitudes log-uniform over all of float32, specials, copies, cancellations.

A failing restart is found again by its seed and number, since each restart draws from a generator of its own:

    PYTHONPATH=. python tests/adversary/clipped_sum_search.py --route auto --seed 0 --restart 17

Without `--restart` the command goes on for `--seconds`; `--above 1.5` looks for larger breaks only.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from fed_dpprune.dpsgd.clipping import MODES, Clipping
from fed_dpprune.dpsgd.gradient import PrivateGradient, cross_entropy
from fed_dpprune.models.flat import Layout, Tensor
from fed_dpprune.sparsity.support import from_mask

ROUTES = ("auto", "torch", "reference")
CLASSES = 3
F32 = np.float32
LARGEST = float(np.finfo(F32).max)
# Zeros, the smallest denormal and normal, "no data" of raster files, what is not finite.
SPECIAL = np.array([0, -0.0, 1e-45, 1.17549435e-38, LARGEST, -LARGEST, np.inf, -np.inf, np.nan, 1], F32)
# The move is measured in extended precision; this covers what is left of its own rounding.
MEASURED = 1e-12


def layout_of(module: nn.Module, frozen: tuple[str, ...] = ()) -> Layout:
    """The layout of a module's parameters."""
    return Layout(tuple(Tensor(n, tuple(p.shape), frozen=n in frozen) for n, p in module.named_parameters()))


def weighted_outputs(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A loss with any output gradient that is asked for: y has the outputs' shape."""
    return (outputs * y.to(outputs.dtype)).flatten(1).sum(1)


LOSSES = {"cross-entropy": cross_entropy, "weighted": weighted_outputs}


class Positions(nn.Module):
    """A net on each position of a sequence, (n, positions, features), then the mean over positions."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).mean(1)


class Twice(nn.Module):
    """One linear layer called twice; with `outside` its weight is also used outside any layer."""

    def __init__(self, outside: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.outside = nn.Linear(7, 7), nn.Linear(7, CLASSES), outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.layer(x))
        h = nn.functional.linear(h, self.layer.weight) if self.outside else self.layer(h)
        return self.head(torch.relu(h))


def _tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    net[2].weight = net[0].weight
    return net


def _mlp(act: type[nn.Module], sizes: tuple[int, ...] = (12, 9, CLASSES)) -> nn.Module:
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), act(), nn.Linear(sizes[1], sizes[2]))


@dataclass(frozen=True)
class Net:
    """A model to attack: how it is made, the shape of one example, words for an embedding (0: floats)."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    words: int = 0


S = nn.Sequential
NETS = {
    "linear": Net(lambda: nn.Linear(6, CLASSES, bias=False), (6,)),
    "mlp-relu": Net(lambda: _mlp(nn.ReLU), (12,)),
    "mlp-tanh": Net(lambda: _mlp(nn.Tanh), (12,)),
    "mlp-linear": Net(lambda: _mlp(nn.Identity), (12,)),
    "mlp-784": Net(lambda: _mlp(nn.ReLU, (784, 128, 8)), (784,)),
    "mlp-33": Net(lambda: _mlp(nn.ReLU, (33, 17, CLASSES)), (33,)),
    "conv": Net(
        lambda: S(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(27, CLASSES)
        ),
        (2, 6, 6),
    ),
    "conv1d": Net(lambda: S(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, CLASSES)), (2, 8)),
    "sequence": Net(lambda: Positions(S(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES))), (6, 5)),
    "embedding": Net(lambda: S(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(24, CLASSES)), (6,), words=11),
    "twice": Net(Twice, (7,)),
    "tied": Net(_tied, (6,)),
    "outside": Net(lambda: Twice(outside=True), (7,)),
    "group-norm": Net(
        lambda: S(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)), (2, 4, 4)
    ),
    "layer-norm": Net(lambda: S(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES)), (6,)),
}


@dataclass
class Case:
    """One attack. `x[place]` is the added example; the batch without it is the neighbour.

    Attributes:
        weights: Shape (d,), float32.
        mask: Shape (d,), True where live.
        x: Shape (n + 1, ...).
        y: Shape (n + 1,), or (n + 1, outputs) for the weighted loss.
        story: What start and mutations it went through.
    """

    net: str
    loss: str
    route: str
    weights: np.ndarray
    mask: np.ndarray
    x: np.ndarray
    y: np.ndarray
    place: int = 0
    clip_norm: float = 1.0
    mode: str = "flat"
    threads: int = 1
    micro_batch: int = 0
    story: list[str] = field(default_factory=list)

    def clone(self) -> Case:
        """A copy that shares no array."""
        return copy.deepcopy(self)


@functools.cache
def _module(net: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETS[net].build()


@functools.cache
def layout(net: str) -> Layout:
    """The layout of a net."""
    return layout_of(_module(net))


@functools.cache
def engine(net: str, loss: str, route: str, micro_batch: int) -> PrivateGradient:
    """One engine for each constructor call that a case can ask for."""
    module = copy.deepcopy(_module(net))
    return PrivateGradient(module, layout(net), backend=route, micro_batch=micro_batch, loss=LOSSES[loss])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """L2 distance in extended precision; infinite when an entry is not finite."""
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return float("inf")
    moved = one.astype(np.longdouble) - other
    return float(np.sqrt(np.square(moved).sum()))


def ready(case: Case) -> PrivateGradient:
    """The engine of a case, with its weights, support and thread count in place."""
    torch.set_num_threads(case.threads)
    gradient = engine(case.net, case.loss, case.route, case.micro_batch)
    gradient.set_weights(case.weights)
    gradient.set_support(from_mask(case.mask))
    return gradient


def moved_by(gradient: PrivateGradient, x: np.ndarray, y: np.ndarray, place: int, clipping: Clipping) -> float:
    """How far example `place` moves the sum, over what `Clipping.sensitivity` declares; above 1 the claim is broken."""
    without = gradient.clipped_sum(np.delete(x, place, 0), np.delete(y, place, 0), clipping)
    with_it = gradient.clipped_sum(x, y, clipping)  # second: what an example changes for good in the engine must show
    return distance(with_it, without) / clipping.sensitivity(gradient.layout)


def move(case: Case) -> float:
    """How far the added example of a case moves the sum; infinitely where it is answered by an error."""
    try:
        return moved_by(ready(case), case.x, case.y, case.place, Clipping(case.clip_norm, case.mode))
    except (IndexError, RuntimeError, ValueError) as error:
        case.story.append(f"[{type(error).__name__}: {error}]")
        return float("inf")


# ---- what starts and mutations are made of


def log_uniform(rng: np.random.Generator, shape: tuple[int, ...], low: float = -45.0, high: float = 38.53) -> np.ndarray:
    """Both signs, magnitudes log-uniform between powers of ten, float32; the defaults cover all of float32."""
    return (rng.choice([-1.0, 1.0], shape) * 10.0 ** rng.uniform(low, high, shape)).astype(F32)


def _labels(rng: np.random.Generator, loss: str, n: int, outputs: int) -> np.ndarray:
    if loss == "cross-entropy":
        return rng.integers(0, outputs, n)
    spread = rng.choice([0.5, 10.0, 38.0])
    return log_uniform(rng, (n, outputs), -spread, spread)


def _outputs(net: str) -> int:
    return 8 if net == "mlp-784" else CLASSES


def _examples(rng: np.random.Generator, net: Net, n: int, spread: float) -> np.ndarray:
    shape = (n, *net.shape)
    if net.words:
        return rng.integers(0, net.words, shape)
    return log_uniform(rng, shape, -45.0 if spread > 38 else -spread, min(spread, 38.53))


def _mask(rng: np.random.Generator, net: str) -> np.ndarray:
    """Random elements, rows, products of rows and columns, everything, or one coordinate."""
    parts, kind = [], rng.choice(["element", "row", "product", "dense", "one"], p=[0.45, 0.15, 0.15, 0.15, 0.1])
    density = 10 ** rng.uniform(-2, 0)
    for tensor in layout(net).tensors:
        rows = rng.random(tensor.shape[0]) < density
        columns = rng.random(tensor.size // tensor.shape[0]) < density
        made = {
            "element": rng.random(tensor.size) < density,
            "row": np.repeat(rows, columns.size),
            "product": np.outer(rows, columns).ravel(),
            "dense": np.ones(tensor.size, bool),
            "one": np.zeros(tensor.size, bool),
        }
        parts.append(made[str(kind)])
    mask = np.concatenate(parts)
    if not mask.any():
        mask[rng.integers(mask.size)] = True
    return mask


def _batch_size(rng: np.random.Generator) -> int:
    """0 to 70 others, small ones more often; sometimes around powers of two."""
    around = [*range(127, 132), *range(255, 258)]
    return int(rng.choice(around)) if rng.random() < 0.04 else int(rng.choice([rng.integers(0, 71), rng.integers(0, 6)]))


def _unit(rng: np.random.Generator, net: str, spread: float) -> np.ndarray:
    """Weights of every size, or as a library would draw them."""
    if spread:
        return log_uniform(rng, (layout(net).d,), -45.0 if spread > 38 else -spread, min(spread, 38.53))
    parts = [rng.normal(size=t.shape).ravel() / np.sqrt(max(1, t.size // t.shape[0])) for t in layout(net).tensors]
    return np.concatenate(parts).astype(F32)


def start(rng: np.random.Generator, route: str) -> Case:
    """A hostile beginning: one of several kinds, each the seed of a kind of fault."""
    kind = str(rng.choice(list(STARTS), p=[p for _, p in STARTS.values()]))
    case = STARTS[kind][0](rng, route)
    case.threads = int(rng.integers(1, 3))
    case.place = 0 if kind == "crowd" or rng.random() < 0.3 else int(rng.integers(len(case.x)))
    case.story.append(kind)
    return case


def _any_magnitude(rng: np.random.Generator, route: str) -> Case:
    """Everything log-uniform, over all of float32 or a part of it, weights, examples and labels apart."""
    net = str(rng.choice([n for n in NETS if n != "mlp-784"]))
    loss, n = str(rng.choice(list(LOSSES))), _batch_size(rng) + 1
    spread, weight_spread = rng.choice([0.5, 3.0, 20.0, 39.0]), rng.choice([0.0, 1.0, 20.0, 39.0])
    x, y = _examples(rng, NETS[net], n, spread), _labels(rng, loss, n, _outputs(net))
    case = Case(net, loss, route, _unit(rng, net, weight_spread), _mask(rng, net), x, y)
    case.clip_norm, case.mode = 10 ** rng.uniform(-6, 6), str(rng.choice(MODES))
    return case


def _no_data(rng: np.random.Generator, route: str) -> Case:
    """Fresh weights and ordinary rows, but one column is frozen and holds the no-data value."""
    net = str(rng.choice([n for n in NETS if n != "mlp-784" and not NETS[n].words]))
    n, shape = _batch_size(rng) + 1, NETS[net].shape
    x = (rng.normal(size=(n, *shape)) * 10 ** rng.uniform(0, 3)).astype(F32)
    x.reshape(n, -1)[:, 0] = rng.choice([-LARGEST, LARGEST, 1e30])
    mask, first = _mask(rng, net), layout(net).tensors[0]
    mask[: first.size].reshape(first.shape[0], -1)[:, 0] = False
    if not mask.any():
        mask[1] = True
    y = _labels(rng, "cross-entropy", n, _outputs(net))
    return Case(net, "cross-entropy", route, _unit(rng, net, 0.0), mask, x, y)


def _crowd(rng: np.random.Generator, route: str) -> Case:
    """Thousands of examples on a tiny net, one of whose coordinates hovers where float32 sums round (see `hovering`)."""
    lanes = int(rng.choice([1, 4, 8, 16, 32]))
    base = int(rng.choice([256, 1024, 2048, 4096])) // lanes
    values = hovering(max(base, 8), lanes)
    x, y = np.zeros((values.size, 6), F32), np.zeros((values.size, CLASSES), F32)
    x[:, 0], y[:, 0] = 1, values
    case = Case("linear", "weighted", route, np.zeros(layout("linear").d, F32), _mask(rng, "linear"), x, y)
    case.mask[0] = True
    case.clip_norm = 1.00001
    return case


def hovering(base: int, lanes: int = 1) -> np.ndarray:
    """Values of at most 1 whose float32 sum depends on the first one far beyond its size.

    After `base` ones (a power of two) the sum is at the edge where the spacing of float32 doubles. Pairs that nearly cancel
    follow: below the edge they add up exactly, above it both halves of each pair round up, by base * 2**-24 each. With `lanes`
    only every so-manieth example counts, for code that adds up so many examples side by side.
    """
    unit = base * 2.0**-24
    four = [1 - 5 * unit, 7 * unit - 1, 1 - 9 * unit, 7 * unit - 1]
    values = np.zeros((3 * base - 2, lanes))
    values[:, 0] = np.concatenate([np.ones(base), np.tile(four, base // 2)[: 2 * base - 2]])
    return values.ravel().astype(F32)


def _flip(rng: np.random.Generator, route: str) -> Case:
    """Neighbours whose activation hangs on the last bit of a sum (see `wired`), all alike."""
    net = str(rng.choice(["mlp-784", "mlp-33", "mlp-relu"], p=[0.7, 0.2, 0.1]))
    n = int(rng.choice([rng.integers(1, 71), rng.integers(1, 9)]))
    other = int(rng.choice([n + 1, n + 1, 1, 16, 32, 64, 128]))
    case = wired(rng, net, route, n, (n, other))
    case.clip_norm = 10 ** rng.uniform(-6, 0)
    return case


STARTS: dict[str, tuple[Callable[[np.random.Generator, str], Case], float]] = {
    "any-magnitude": (_any_magnitude, 0.5),
    "no-data": (_no_data, 0.12),
    "crowd": (_crowd, 0.08),
    "flip": (_flip, 0.3),
}


def wired(rng: np.random.Generator, net: str, route: str, n: int, sizes: tuple[int, int]) -> Case:
    """Weights of a relu net with one hidden layer under which one bit turns an example's gradient around.

    One hidden unit's bias is minus what its products come to in a batch of `sizes[0]` rows, so that it is exactly 0 there; in a
    batch of `sizes[1]` it is a bit of rounding noise. A gain of 1e30 behind it decides which of two logits is the larger, and so
    the sign of the gradient in the incoming weights of another hidden unit, the only live ones.
    """
    inputs, hidden = layout(net).tensors[0].shape[1], layout(net).tensors[0].shape[0]
    weights = np.zeros(layout(net).d, F32)
    w1, b1, w2, b2 = layout(net).split(weights).values()
    x = np.repeat(rng.normal(size=(1, inputs)).astype(F32), n + 1, 0)
    w1[:] = rng.normal(size=w1.shape)
    b1[:] = -_products(w1, b1, x[0], sizes[0])[0]
    shift = int(rng.integers(-2, 3))
    for _ in range(abs(shift)):
        b1[:] = np.nextafter(b1, F32(np.inf * shift))
    rows = min(sizes)
    one, two = (_products(w1, b1, x[0], size)[:rows] for size in sizes)
    unit = int(((one > 0) != (two > 0)).sum(0).argmax())
    steady = (unit + 1) % hidden  # an active unit; its incoming weights are live
    w1[steady], b1[steady] = 0, 1
    w2[0, unit], w2[0, steady], w2[1, steady], b2[1] = 1e30, 1, -1, 1e3
    mask = np.zeros(weights.size, bool)
    mask[steady * inputs : (steady + 1) * inputs] = True
    return Case(net, "cross-entropy", route, weights, mask, x, np.full(n + 1, 2))


def _products(w: np.ndarray, b: np.ndarray, row: np.ndarray, n: int) -> np.ndarray:
    with torch.no_grad():
        x = torch.tensor(row).repeat(n, 1)
        return nn.functional.linear(x, torch.tensor(w), torch.tensor(b)).numpy()


# ---- mutations


def _some(rng: np.random.Generator, array: np.ndarray) -> tuple[slice | np.ndarray | int, ...]:
    """An index into an array: one entry, one slice along one axis, or all of it."""
    kind = rng.integers(3)
    if kind == 0:
        return tuple(int(rng.integers(s)) for s in array.shape)
    axis = int(rng.integers(array.ndim))
    place = int(rng.integers(array.shape[axis]))
    return () if kind == 1 else tuple(place if a == axis else slice(None) for a in range(array.ndim))


def _scale(rng: np.random.Generator, array: np.ndarray) -> None:
    """By a power of ten; whole exponents keep ties that are exact in binary only by luck, powers of two always."""
    power = rng.choice([1.0, 6.0, 30.0])
    factor = 2.0 ** np.round(rng.normal() * power * 3.3)
    array[_some(rng, array)] *= F32(min(factor, LARGEST))


def _tensor(rng: np.random.Generator, case: Case) -> np.ndarray:
    return list(layout(case.net).split(case.weights).values())[int(rng.integers(len(layout(case.net).tensors)))]


def _scale_weights(rng: np.random.Generator, case: Case) -> None:
    _scale(rng, _tensor(rng, case))


def _special_weight(rng: np.random.Generator, case: Case) -> None:
    tensor = _tensor(rng, case)
    tensor[_some(rng, tensor)] = rng.choice(SPECIAL)


def _new_weights(rng: np.random.Generator, case: Case) -> None:
    tensor = _tensor(rng, case)
    chosen = _some(rng, tensor)
    tensor[chosen] = log_uniform(rng, np.shape(tensor[chosen]))


def _scale_examples(rng: np.random.Generator, case: Case) -> None:
    if not NETS[case.net].words:
        _scale(rng, case.x)


def _special_example(rng: np.random.Generator, case: Case) -> None:
    if NETS[case.net].words:
        case.x[_some(rng, case.x)] = rng.integers(NETS[case.net].words)
    else:
        case.x[_some(rng, case.x)] = rng.choice(SPECIAL)


def _new_added(rng: np.random.Generator, case: Case) -> None:
    spread = float(rng.choice([1.0, 20.0, 39.0]))
    case.x[case.place] = _examples(rng, NETS[case.net], 1, spread)[0]
    case.y[case.place] = _labels(rng, case.loss, 1, _outputs(case.net))[0]


def _copy_example(rng: np.random.Generator, case: Case) -> None:
    source = int(rng.integers(len(case.x)))
    target = slice(None) if rng.random() < 0.5 else int(rng.integers(len(case.x)))
    case.x[target], case.y[target] = case.x[source], case.y[source]


def _mirror(rng: np.random.Generator, case: Case) -> None:
    """Later positions repeat earlier ones with the other sign (almost, perhaps): sums that cancel."""
    if NETS[case.net].words:
        return
    axis = int(rng.integers(1, case.x.ndim))
    half = case.x.shape[axis] // 2
    front = np.take(case.x, range(half), axis)
    nearly = F32(1 + rng.choice([0.0, 2.0**-23, 2.0**-12]))
    index = [slice(None)] * case.x.ndim
    index[axis] = slice(case.x.shape[axis] - half, None)
    case.x[tuple(index)] = -front * nearly if rng.random() < 0.8 else front


def _mirror_weights(rng: np.random.Generator, case: Case) -> None:
    tensor = _tensor(rng, case)
    if tensor.shape[0] > 1:
        i, j = rng.choice(tensor.shape[0], 2, replace=False)
        tensor[i] = tensor[j] * F32(rng.choice([-1, 1, 1 + 2.0**-23]))


def _labels_anew(rng: np.random.Generator, case: Case) -> None:
    case.y[:] = _labels(rng, case.loss, len(case.y), _outputs(case.net))
    if rng.random() < 0.5:
        case.y[:] = case.y[0]


def _out_of_range(rng: np.random.Generator, case: Case) -> None:
    """The added example has a label past the classes, or a word past the vocabulary; rarely, or nothing else is tried."""
    if rng.random() < 0.3 and case.loss == "cross-entropy":
        case.y[case.place] = int(rng.choice([-1, 99, 2**40]))
    elif rng.random() < 0.3 and NETS[case.net].words:
        case.x[case.place] = int(rng.choice([-1, 99, 2**40]))


def _support(rng: np.random.Generator, case: Case) -> None:
    mask = case.mask.copy()
    if rng.random() < 0.4:
        mask = _mask(rng, case.net)
    elif rng.random() < 0.5:
        mask[rng.integers(mask.size, size=rng.integers(1, 4))] ^= True
    else:
        sizes = [t.size for t in layout(case.net).tensors]
        mask[np.repeat(np.arange(len(sizes)) == rng.integers(len(sizes)), sizes)] = False
    if mask.any():
        case.mask = mask


def _size(rng: np.random.Generator, case: Case) -> None:
    n = len(case.x)
    keep = rng.integers(0, n, _batch_size(rng) + 1) if rng.random() < 0.5 else np.arange(n)[: max(1, n - 1)]
    if rng.random() < 0.3:
        keep = np.append(np.arange(n), rng.integers(n))
    case.x, case.y = case.x[keep], case.y[keep]
    case.place = min(case.place, len(keep) - 1)


def _setting(rng: np.random.Generator, case: Case) -> None:
    what = rng.integers(5)
    if what == 0:
        case.clip_norm = float(10 ** rng.uniform(-6, 6))
    elif what == 1:
        case.mode = str(rng.choice(MODES))
    elif what == 2:
        case.threads = 3 - case.threads
    elif what == 3:
        case.micro_batch = int(rng.choice([0, 0, 1, 2, 3, 5, 16, 64, 100]))
    else:
        case.place = int(rng.integers(len(case.x)))


def _cancel(rng: np.random.Generator, case: Case) -> None:
    """A bias becomes minus the pre-activation of one example, up to a few units in the last place; a gain comes behind it."""
    module = copy.deepcopy(_module(case.net))
    layers = [
        (name, layer) for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv1d)) and layer.bias is not None
    ]  # fmt: skip
    if not layers:
        return
    name, layer = layers[int(rng.integers(len(layers)))]
    seen: list[np.ndarray] = []
    layer.register_forward_hook(lambda _layer, _args, out: seen.append(out.detach().numpy()))
    split = layout(case.net).split(case.weights)
    example = int(rng.integers(len(case.x)))
    rows = int(rng.choice([1, len(case.x), max(1, len(case.x) - 1), 16, 64]))
    with torch.no_grad():
        for own, parameter in module.named_parameters():
            parameter.copy_(torch.tensor(split[own]))
        module(torch.tensor(np.repeat(case.x[example : example + 1], rows, 0)))
    bias = split[f"{name}.bias" if name else "bias"]
    at = int(rng.integers(bias.size))
    features_first = isinstance(layer, (nn.Conv2d, nn.Conv1d))
    values = seen[0][0, at].ravel() if features_first else seen[0][0, ..., at].ravel()
    bias[at] -= rng.choice(values)
    for _ in range(int(rng.integers(0, 3))):
        bias[at] = np.nextafter(bias[at], F32(rng.choice([-np.inf, np.inf])))
    names = list(split)
    behind = names[names.index(f"{name}.bias" if name else "bias") + 1 :]
    if behind:
        split[behind[0]] *= F32(10 ** rng.uniform(5, 30))


MUTATIONS = (
    _scale_weights, _special_weight, _new_weights, _scale_examples, _scale_examples, _special_example, _new_added,
    _copy_example, _mirror, _mirror_weights, _labels_anew, _out_of_range, _support, _support, _size, _setting, _setting, _cancel,
)  # fmt: skip


def mutate(rng: np.random.Generator, case: Case) -> Case:
    """One to three changes on a copy."""
    made = case.clone()
    with np.errstate(all="ignore"):
        for _ in range(int(rng.integers(1, 4))):
            chosen = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
            chosen(rng, made)
            made.story.append(chosen.__name__.strip("_"))
    return made


# ---- the search


@dataclass(frozen=True)
class Found:
    """The best of one restart."""

    case: Case
    moved: float
    seed: int
    restart: int
    tried: int


def climb(route: str, seed: int, restart: int, steps: int = 24) -> Found:
    """One restart: keep a mutation when the move does not shrink."""
    rng = np.random.default_rng([seed, restart, ROUTES.index(route)])
    best = start(rng, route)
    moved = move(best)
    large = len(best.x) > 300 or best.net == "mlp-784"
    for _ in range(steps // 4 if large else steps):
        tried = mutate(rng, best)
        score = move(tried)
        if score >= moved:
            best, moved = tried, score
    return Found(best, moved, seed, restart, steps + 1)


def search(route: str, seed: int, seconds: float, restarts: int = 8) -> Iterator[Found]:
    """Restarts for some seconds, and at least `restarts` of them."""
    end, restart = time.monotonic() + seconds, 0
    while restart < restarts or time.monotonic() < end:
        yield climb(route, seed, restart)
        restart += 1


def shrink(case: Case, above: float, evaluations: int = 200) -> Case:
    """A smaller case that still moves the sum by more than `above`: fewer examples, plainer numbers."""
    for _ in range(evaluations // 20):
        before = case
        for smaller in _smaller(case):
            evaluations -= 1
            if evaluations and move(smaller) > above:
                case = smaller
                break
        if case is before or not evaluations:
            break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    n = len(case.x)
    for keep in (np.arange(n) == case.place, np.arange(n) <= n // 2, np.arange(n) >= n // 2, np.arange(n) != n - 1):
        keep = keep | (np.arange(n) == case.place)
        if keep.sum() < n:
            yield replace(case, x=case.x[keep], y=case.y[keep], place=int(keep[: case.place].sum()))
    for plain in ({"micro_batch": 0}, {"threads": 1}, {"mode": "flat"}, {"clip_norm": 1.0}):
        if any(getattr(case, key) != value for key, value in plain.items()):
            yield replace(case, **plain)
    for _, span in layout(case.net).spans():
        if case.weights[span].any():
            weights = case.weights.copy()
            weights[span] = 0
            yield replace(case, weights=weights)


def describe(found: Found, bound: float = 1 + MEASURED) -> str:
    """What a developer needs: the smallest case found and the command that finds it again."""
    case = shrink(found.case, bound)
    lines = [
        f"one example moves the sum by {found.moved:.9g} of what is declared ({move(case):.9g} after shrinking)",
        f"net {case.net}, loss {case.loss}, route {case.route} ({engine(case.net, case.loss, case.route, 0).route}), "
        f"C {case.clip_norm:g} {case.mode}, threads {case.threads}, micro-batch {case.micro_batch}",
        f"{len(case.x)} examples with the added one, which is at place {case.place}; {case.mask.sum()} live of {case.mask.size}",
        f"by {' '.join(case.story)}",
        f"PYTHONPATH=. python tests/adversary/clipped_sum_search.py --route {case.route} --seed {found.seed} "
        f"--restart {found.restart}",
    ]
    for name, values in (("weights", case.weights), ("live", np.flatnonzero(case.mask)), ("x", case.x), ("y", case.y)):
        lines.append(f"{name} = {np.array2string(np.asarray(values), threshold=64, max_line_width=120)}")
    return "\n".join(lines)


def main() -> None:
    """Search from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--route", choices=ROUTES, default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restart", type=int, default=None, help="this restart alone")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--above", type=float, default=1 + MEASURED, help="show what moves the sum by more")
    asked = parser.parse_args()
    begun, best = time.monotonic(), 0.0
    one = asked.restart is not None
    for found in [climb(asked.route, asked.seed, asked.restart)] if one else search(asked.route, asked.seed, asked.seconds):
        best = max(best, found.moved)
        if found.moved > asked.above or one:
            print(f"--- {time.monotonic() - begun:.1f} s\n{describe(found, asked.above)}\n", flush=True)
    print(f"largest move {best:.9g} in {time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    main()
